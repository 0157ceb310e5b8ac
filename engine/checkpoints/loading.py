"""Checkpoint to weights, whatever format it is in; and to a model, where its tensors are plain."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from infilld.engine.checkpoints.files import Reader
from infilld.engine.checkpoints.gguf import gguf_in, inspect_gguf, read_gguf
from infilld.engine.checkpoints.places import HEAD
from infilld.engine.checkpoints.plan import Piece, make_plan
from infilld.engine.checkpoints.quantizing import is_quantized
from infilld.engine.checkpoints.weights import (
    CheckpointSummary,
    StoredPart,
    Weights,
    part_of,
    tabulate,
)
from infilld.engine.errors import CheckpointMismatch
from infilld.engine.layers import Rotation
from infilld.engine.model import DiffusionGemma
from infilld.kernels._weights import CODES_PER_BYTE, QuantizedWeight

log = logging.getLogger(__name__)

# What is turned into plain numbers, or compared, at a time.
_BLOCK_NUMBERS = 1 << 24
# Every number of a type is exactly one of these too.
_WIDENINGS = {
    "F64": (torch.float64,),
    "F32": (torch.float32, torch.float64),
    "BF16": (torch.bfloat16, torch.float32, torch.float64),
    "F16": (torch.float16, torch.float32, torch.float64),
}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


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
    if (path := _gguf_file(source)) is not None:
        return read_gguf(path, device=device, dtype=dtype)
    plan = make_plan(source)
    if plan.vision_tensors:
        log.info("%s: skipped %d vision tensors, only text is read", source, plan.vision_tensors)
    tensors: dict[str, Tensor | QuantizedWeight] = {}
    notes = _Notes(dtype)
    with Reader() as reader:
        for target, pieces in plan.pieces.items():
            shape = plan.shapes[target]
            if pieces[0].scheme is None:
                notes.plain(pieces)
                tensors[target] = _plain(pieces, shape, reader, device, dtype)
                continue
            weight = _quantized(pieces, shape, reader, notes)
            if is_quantized(target, shape):
                tensors[target] = weight.to(device)
            else:
                notes.widened(target, pieces[0])
                tensors[target] = _values(weight, device, dtype)
        if plan.head is not None:
            _refuse_untied(reader.tensor(plan.head), tensors["embed_tokens.weight"])
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
    weights = read_weights(folder, device=device, dtype=dtype)
    with torch.device("meta"):
        model = DiffusionGemma(weights.config)
    model.load_state_dict(dict(weights.tensors), assign=True)
    for rotation in model.rotations.values():
        assert isinstance(rotation, Rotation)
        rotation.frequencies = rotation.inverse_frequencies().to(device)
    return model.requires_grad_(False).eval()


def inspect_checkpoint(source: Path) -> CheckpointSummary:
    """What a checkpoint holds, from the headers alone.

    Raises:
        CheckpointMissing, CheckpointMismatch: as `read_weights`, but for what only the numbers
            tell (an untied head).
    """
    if (path := _gguf_file(source)) is not None:
        return inspect_gguf(path)
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


def _gguf_file(source: Path) -> Path | None:
    """The GGUF file that a path means; None: it means safetensors files."""
    return None if any(source.glob("*.safetensors*")) else gguf_in(source)


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


class _Notes:
    """What is not exactly what the files say, gathered while reading."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = str(dtype).removeprefix("torch.")
        self._wide_enough = {name for name, wider in _WIDENINGS.items() if dtype in wider}
        self._rounded: dict[str, int] = {}
        self._widened: dict[str, int] = {}
        self._rescaled, self._experts, self._largest = 0, 0, 0.0

    def plain(self, pieces: Sequence[Piece]) -> None:
        """Plain tensors are read."""
        for piece in pieces:
            if piece.entry.dtype not in self._wide_enough:
                stored = piece.entry.dtype
                self._rounded[stored] = self._rounded.get(stored, 0) + 1

    def widened(self, target: str, piece: Piece) -> None:
        """A weight in few bits is held as a plain tensor."""
        what = f"{part_of(target)} ({piece.storage})"
        self._widened[what] = self._widened.get(what, 0) + 1

    def rescaled(self, experts: int, largest: float) -> None:
        """Scales of experts were rounded to a factor that gate and up share."""
        self._experts += experts
        self._largest = max(self._largest, largest)

    def lines(self) -> tuple[str, ...]:
        """All of it."""
        rounded = [
            f"{count} {stored} tensors are rounded to {self._dtype}"
            for stored, count in sorted(self._rounded.items())
        ]
        widened = [
            f"{count} weights of the {what} are held as {self._dtype}"
            for what, count in sorted(self._widened.items())
        ]
        rescaled = [
            f"gate and up of {self._experts} experts have factors of their own: scales of one "
            f"were rounded to the other's, by up to {100 * self._largest:.2f} % of the largest"
        ]
        return (*rounded, *widened, *(rescaled if self._experts else ()))


def _plain(
    pieces: Sequence[Piece],
    shape: tuple[int, ...],
    reader: Reader,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Tensor:
    if len(pieces) == 1 and pieces[0].shape == shape:
        return reader.tensor(pieces[0].entry).to(device, dtype)
    whole = torch.empty(shape, dtype=dtype)
    for piece in pieces:
        piece.place.of(whole).copy_(reader.tensor(piece.entry))
    return whole.to(device)


def _quantized(
    pieces: Sequence[Piece], shape: tuple[int, ...], reader: Reader, notes: _Notes
) -> QuantizedWeight:
    """A weight in few bits, its pieces stacked, on the CPU."""
    scheme = pieces[0].scheme
    assert scheme is not None
    group = scheme.group or shape[-1]
    if len(pieces) == 1 and pieces[0].shape == shape:
        held = {name: part.contiguous() for name, part in _held(pieces[0], reader).items()}
        return QuantizedWeight(kind=scheme.kind, group=group, **held)
    whole: dict[str, Tensor] = {}
    for name, (part_shape, dtype) in scheme.parts(pieces[0].shape, pieces[0].entries).items():
        # One factor for gate and one for up, until they are joined.
        full = (shape[0], 2) if name == "factor" else (*shape[:-1], part_shape[-1])
        whole[name] = torch.empty(full, dtype=dtype)
    for piece in pieces:
        for name, part in _held(piece, reader).items():
            if name == "factor":
                halves = {None: slice(None), "gate": slice(0, 1), "up": slice(1, 2)}
                rows = slice(None) if piece.place.index is None else piece.place.index
                whole[name][rows, halves[piece.place.half]] = part[..., None]
            else:
                piece.place.of(whole[name]).copy_(part)
    if "factor" in whole:
        whole["scales"], whole["factor"] = _join_factors(whole["scales"], whole["factor"], notes)
    return QuantizedWeight(kind=scheme.kind, group=group, **whole)


def _held(piece: Piece, reader: Reader) -> dict[str, Tensor]:
    assert piece.scheme is not None
    tensors = {role: reader.tensor(entry) for role, entry in piece.entries.items()}
    try:
        return piece.scheme.hold(piece.shape, tensors)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{piece.name}: {error}", remedy=error.remedy) from None


def _join_factors(scales: Tensor, factors: Tensor, notes: _Notes) -> tuple[Tensor, Tensor]:
    """One factor an expert from one of its gate and one of its up.

    Where they differ, the scales of one are multiplied by their ratio. That is exact for a power
    of two, unless it leaves the range of E4M3; else it is rounded, and noted.

    Args:
        scales: [E, 2F, D / 16] E4M3, gate rows first; changed in place.
        factors: [E, 2] float32.
        notes: of the checkpoint.

    Returns:
        Scales, and factors [E].
    """
    differ = (factors[:, 0] != factors[:, 1]).nonzero().flatten().tolist()
    joined = factors.amax(dim=1)
    rounded, largest = 0, 0.0
    for expert in differ:
        halves = scales[expert].chunk(2)
        best: tuple[float, Tensor, int, Tensor] | None = None
        # Either may keep its scales: down to the larger factor, or up to the smaller.
        for kept in (int(factors[expert].argmax()), int(factors[expert].argmin())):
            other = halves[1 - kept].double()
            wanted = other * (factors[expert, 1 - kept].double() / factors[expert, kept].double())
            got = wanted.float().clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
            error = (got.double() - wanted).abs().max().item() / _largest(wanted)
            if best is None or error < best[0]:
                best = (error, got, kept, factors[expert, kept])
        assert best is not None
        error, got, kept, factor = best
        halves[1 - kept].copy_(got)
        joined[expert] = factor
        rounded += error > 0
        largest = max(largest, error)
    if rounded:
        notes.rescaled(rounded, largest)
    return scales, joined


def _largest(values: Tensor) -> float:
    return max(values.abs().max().item(), torch.finfo(torch.float32).tiny)


def _values(weight: QuantizedWeight, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """A matrix in few bits as a plain one, a block of rows at a time."""
    rows, columns = weight.shape
    whole = torch.empty(rows, columns, device=device, dtype=dtype)
    step = max(1, _BLOCK_NUMBERS // columns)
    for start in range(0, rows, step):
        parts = {
            name: part if name == "factor" else part[start : start + step]
            for name, part in weight.parts.items()
        }
        block = QuantizedWeight(kind=weight.kind, group=weight.group, **parts)
        whole[start : start + step] = _dequantized(block)
    return whole


def _dequantized(weight: QuantizedWeight) -> Tensor:
    if CODES_PER_BYTE[weight.kind] == 2:
        nibbles = torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).flatten(-2)
        if weight.kind == "nvfp4":
            codes = torch.tensor(_E2M1)[nibbles.long()]
        else:
            codes = nibbles.float() - (8 if weight.biases is None else 0)
    else:
        codes = weight.codes.float()
    scales = weight.scales.float().repeat_interleave(weight.group, -1)
    whole = codes * scales
    if weight.biases is not None:
        whole += weight.biases.float().repeat_interleave(weight.group, -1)
    return whole if weight.factor is None else whole * weight.factor[..., None, None]


def _refuse_untied(head: Tensor, embedding: Tensor | QuantizedWeight) -> None:
    assert isinstance(embedding, Tensor)
    same = head.shape == embedding.shape
    step = max(1, _BLOCK_NUMBERS // max(1, embedding.shape[-1]))
    for start in range(0, len(head) if same else 0, step):
        part = embedding[start : start + step]
        same = same and torch.equal(head[start : start + step].to(part), part)
    if not same:
        raise CheckpointMismatch(
            f"{HEAD} differs from the embedding; this engine runs the tied model only"
        )
