"""Checkpoint to weights, whatever format it is in; and to a model, where its tensors are plain."""

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from infilld.engine.checkpoints.files import Reader, refuse_pickles
from infilld.engine.checkpoints.gguf import gguf_in, inspect_gguf, read_gguf
from infilld.engine.checkpoints.kept import inspect_kept, is_kept, read_kept
from infilld.engine.checkpoints.places import HEAD
from infilld.engine.checkpoints.plan import Piece, Plan, make_plan
from infilld.engine.checkpoints.quantizing import is_quantized
from infilld.engine.checkpoints.stacking import (
    BLOCK_NUMBERS,
    Notes,
    make_plain,
    stack_plain,
    stack_quantized,
)
from infilld.engine.checkpoints.weights import (
    CheckpointSummary,
    StoredPart,
    Weights,
    part_of,
    tabulate,
    unfilled_model,
)
from infilld.engine.errors import CheckpointMismatch
from infilld.engine.model import DiffusionGemma
from infilld.kernels._weights import QuantizedWeight

log = logging.getLogger(__name__)


def read_weights(
    source: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Weights:
    """All weights of a checkpoint, in as few bits as it stores them.

    Host memory holds one tensor of the model at a time, beside what is kept there: experts are
    stacked as they are read.

    Args:
        source: a folder in the Hugging Face layout (config.json and one or several safetensors
            files), a GGUF file, or a folder with one and no safetensors file.
        device: where the weights go.
        dtype: what plain tensors are cast to; layer scalars too, as the reference does.

    Raises:
        CheckpointMissing: a file is absent or cut off.
        CheckpointMismatch: not a DiffusionGemma, a format that cannot be read, or tensors and
            configuration disagree.
    """
    if (path := gguf_in(source)) is not None:
        return read_gguf(path, device=device, dtype=dtype)
    refuse_pickles(source)
    if is_kept(source):
        return read_kept(source, device=device, dtype=dtype)
    return _read(make_plan(source), device, dtype)


def _read(plan: Plan, device: str | torch.device, dtype: torch.dtype) -> Weights:
    tensors: dict[str, Tensor | QuantizedWeight] = {}
    notes = Notes(dtype)
    with Reader() as reader:
        for target, pieces in plan.pieces.items():
            shape = plan.shapes[target]
            if pieces[0].scheme is None:
                notes.plain(pieces)
                tensors[target] = stack_plain(pieces, shape, reader, device, dtype)
                continue
            weight = stack_quantized(pieces, shape, reader)
            if is_quantized(target, shape):
                tensors[target] = weight.to(device)
            else:
                notes.widened(target, pieces[0])
                tensors[target] = make_plain(weight, device, dtype)
        if plan.head is not None:
            refuse_untied(reader.tensor(plan.head), tensors["embed_tokens.weight"])
    if plan.vision_tensors:
        folder = plan.files[0].parent
        log.info("%s: skipped %d vision tensors, only text is read", folder, plan.vision_tensors)
    return Weights(
        config=plan.config,
        tensors=tensors,
        format=plan.format,
        notes=(*plan.notes, *notes.lines()),
        vision_tensors=plan.vision_tensors,
    )


def load_model(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionGemma:
    """The text model of an unquantized checkpoint folder in the Hugging Face layout.

    Args:
        folder: config.json and one or several safetensors files.
        device, dtype: as for `read_weights`.

    Raises:
        CheckpointMissing: a file is absent or cut off.
        CheckpointMismatch: not a DiffusionGemma, tensors and configuration disagree, or weights
            are in few bits.
    """
    plan = make_plan(folder)
    if not plan.is_plain:
        raise CheckpointMismatch(
            f"{folder}: a quantized checkpoint ({plan.format}), expected plain tensors",
            remedy="Use the unquantized checkpoint.",
        )
    weights = _read(plan, device, dtype)
    model = unfilled_model(weights.config)
    model.load_state_dict(dict(weights.tensors), assign=True)
    # What the file does not hold: the frequencies of the rotary embedding.
    model.rotations.to(device)
    return model.requires_grad_(False).eval()


def inspect_checkpoint(source: Path) -> CheckpointSummary:
    """What a checkpoint holds, from the headers alone.

    Raises:
        CheckpointMissing, CheckpointMismatch: as `read_weights`, but for what only the numbers
            tell (an untied head).
    """
    if (path := gguf_in(source)) is not None:
        return inspect_gguf(path)
    refuse_pickles(source)
    if is_kept(source):
        return inspect_kept(source)
    plan = make_plan(source)
    pieces = [piece for pieces in plan.pieces.values() for piece in pieces]
    lines = [_line(piece) for piece in pieces]
    dtypes = {entry.dtype for piece in pieces for entry in piece.entries.values()}
    return CheckpointSummary(
        config=plan.config,
        files=plan.files,
        parameters=sum(line.parameters for line in lines),
        text_bytes=sum(line.stored_bytes for line in lines),
        vision_tensors=plan.vision_tensors,
        dtypes=tuple(sorted(dtypes)),
        format=plan.format,
        parts=tabulate(lines),
        notes=plan.notes,
    )


def _line(piece: Piece) -> StoredPart:
    held_bytes = piece.held_bytes
    return StoredPart(
        part=part_of(piece.place.target),
        storage=piece.storage,
        kind=None if held_bytes is None or piece.scheme is None else piece.scheme.kind,
        parameters=math.prod(piece.shape),
        stored_bytes=piece.nbytes,
        held_bytes=held_bytes,
    )


def refuse_untied(head: Tensor, embedding: Tensor | QuantizedWeight) -> None:
    """Raise CheckpointMismatch where an output matrix of its own is not the embedding."""
    assert isinstance(embedding, Tensor)
    same = head.shape == embedding.shape
    step = max(1, BLOCK_NUMBERS // max(1, embedding.shape[-1]))
    for start in range(0, len(head) if same else 0, step):
        part = embedding[start : start + step]
        same = same and torch.equal(head[start : start + step].to(part), part)
    if not same:
        raise CheckpointMismatch(
            f"{HEAD} differs from the embedding; this engine runs the tied model only"
        )
