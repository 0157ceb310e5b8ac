"""Checkpoint files to model: every tensor is used once, skipped by rule, or refused by name."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infilld.engine.config import ModelConfig, read_json
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing
from infilld.engine.layers import Rotation
from infilld.engine.model import DiffusionGemma

log = logging.getLogger(__name__)

_DECODER = "model.decoder."
_ENCODER_SCALAR = "model.encoder.language_model.layers.{}.layer_scalar"
_VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_HEAD = "lm_head.weight"
_SHOWN = 3


@dataclass(frozen=True)
class CheckpointSummary:
    """What a folder holds.

    Attributes:
        config: shapes.
        files: safetensors files, in reading order.
        parameters: numbers in text tensors. text_bytes: their bytes as stored.
        vision_tensors: how many are skipped, since only text is read.
        dtypes: stored types of the text tensors, sorted.
    """

    config: ModelConfig
    files: tuple[Path, ...]
    parameters: int
    text_bytes: int
    vision_tensors: int
    dtypes: tuple[str, ...]


def load_model(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusionGemma:
    """The text model of a checkpoint folder in the Hugging Face layout.

    Args:
        folder: config.json and one or several safetensors files.
        device: where the weights go.
        dtype: what they are cast to; layer scalars too, as the reference does.

    Raises:
        CheckpointMissing: a file is absent or cut off.
        CheckpointMismatch: not a DiffusionGemma, or tensors and configuration disagree.
    """
    config = _read_config(folder)
    with torch.device("meta"):
        model = DiffusionGemma(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected.pop("encoder_scalars")
    found: dict[str, Tensor] = {}
    scalars: dict[int, Tensor] = {}
    skipped, head = 0, None
    for name, tensor in _tensors(folder):
        if name.startswith(_VISION):
            skipped += 1
        elif name == _HEAD:
            head = tensor
        elif (layer := _encoder_layer(name, config.layers)) is not None:
            scalars[layer] = _shaped(name, tensor, torch.Size([1])).to(device, dtype)
        else:
            short = name.removeprefix(_DECODER)
            if short == name or short not in expected:
                raise _unexpected(name)
            found[short] = _shaped(name, tensor, expected[short]).to(device, dtype)
    _refuse_missing(expected.keys() - found.keys(), set(range(config.layers)) - scalars.keys())
    _refuse_untied(head, found["embed_tokens.weight"])
    found["encoder_scalars"] = torch.cat([scalars[i] for i in range(config.layers)])
    model.load_state_dict(found, assign=True)
    for rotation in model.rotations.values():
        assert isinstance(rotation, Rotation)
        rotation.frequencies = rotation.inverse_frequencies().to(device)
    if skipped:
        log.info("%s: skipped %d vision tensors, only text is read", folder, skipped)
    return model.requires_grad_(False).eval()


def inspect_checkpoint(folder: Path) -> CheckpointSummary:
    """What a folder holds, from the headers alone.

    Raises:
        CheckpointMissing, CheckpointMismatch: as `load_model`, except for tensor shapes.
    """
    config = _read_config(folder)
    parameters = size = vision = 0
    dtypes: set[str] = set()
    for path in _files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 -- a safetensors handle is no mapping
                piece = file.get_slice(name)
                count = int(torch.Size(piece.get_shape()).numel())
                if name.startswith(_VISION):
                    vision += 1
                    continue
                parameters += count
                dtypes.add(str(piece.get_dtype()))
                size += count * _DTYPE_BYTES.get(str(piece.get_dtype()), 1)
    return CheckpointSummary(
        config, tuple(_files(folder)), parameters, size, vision, tuple(sorted(dtypes))
    )


_DTYPE_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2}


def _read_config(folder: Path) -> ModelConfig:
    raw = read_json(folder, "config.json")
    quantized = raw.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "?"
        raise CheckpointMismatch(
            f"{folder}: a quantized checkpoint ({method}), expected plain bf16 or float32 tensors",
            remedy="Use the unquantized checkpoint; quantized ones cannot be read yet.",
        )
    return ModelConfig.from_dict(raw)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            named = sorted({os.fspath(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointMismatch(f"{index} is not a shard index: {error!r}") from None
        if outside := [name for name in named if Path(name).name != name]:
            raise CheckpointMismatch(f"{index} names a file outside the folder: {outside[0]}")
        absent = [name for name in named if not (folder / name).is_file()]
        if absent:
            raise CheckpointMissing(
                f"{folder} lacks {len(absent)} of {len(named)} shards: {absent}"
            )
        return [folder / name for name in named]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointMissing(f"{folder} holds no safetensors file")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointMissing(f"{path} is cut off or damaged: {error}") from None


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    seen: set[str] = set()
    for path in _files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 -- a safetensors handle is no mapping
                if name in seen:
                    raise CheckpointMismatch(f"{path.name}: {name} is in two files")
                seen.add(name)
                yield name, file.get_tensor(name)


def _encoder_layer(name: str, layers: int) -> int | None:
    before, _, after = _ENCODER_SCALAR.partition("{}")
    if not (name.startswith(before) and name.endswith(after)):
        return None
    number = name[len(before) : -len(after)]
    return int(number) if number.isdecimal() and int(number) < layers else None


def _shaped(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise CheckpointMismatch(
            f"{name} is {list(tensor.shape)}, config.json makes it {list(shape)}"
        )
    if not tensor.dtype.is_floating_point:
        raise CheckpointMismatch(
            f"{name} holds {tensor.dtype}, expected floating point",
            remedy="Use the unquantized checkpoint; quantized ones cannot be read yet.",
        )
    return tensor


def _unexpected(name: str) -> CheckpointMismatch:
    return CheckpointMismatch(f"tensor {name} is not part of the model config.json describes")


def _refuse_missing(names: set[str], encoder_layers: set[int]) -> None:
    if names:
        shown = ", ".join(_DECODER + name for name in sorted(names)[:_SHOWN])
        raise CheckpointMismatch(f"{len(names)} tensors are missing: {shown}")
    if encoder_layers:
        shown = ", ".join(_ENCODER_SCALAR.format(i) for i in sorted(encoder_layers)[:_SHOWN])
        # The reference would run on uninitialised memory here.
        raise CheckpointMismatch(
            f"{len(encoder_layers)} encoder layer scalars are missing: {shown}",
            remedy="Export the checkpoint with the encoder's layer_scalar tensors.",
        )


def _refuse_untied(head: Tensor | None, embedding: Tensor) -> None:
    if head is None:
        return
    if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
        raise CheckpointMismatch(
            f"{_HEAD} differs from the embedding; this engine runs the tied model only"
        )
