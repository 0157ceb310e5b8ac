"""Checkpoint files to model: every tensor is used once, skipped by rule, or refused by name."""

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infilld.engine.checkpoints.weights import CheckpointSummary
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
    inventory = _Inventory(config)
    found: dict[str, Tensor] = {}
    scalars: dict[int, Tensor] = {}
    head = None
    for name, tensor in _tensors(folder):
        place = inventory.take(name, list(tensor.shape), str(tensor.dtype))
        if place == _HEAD:
            head = tensor
        elif isinstance(place, int):
            scalars[place] = tensor.to(device, dtype)
        elif place is not None:
            found[place] = tensor.to(device, dtype)
    inventory.refuse_missing()
    _refuse_untied(head, found["embed_tokens.weight"])
    found["encoder_scalars"] = torch.cat([scalars[i] for i in range(config.layers)])
    model = inventory.model
    model.load_state_dict(found, assign=True)
    for rotation in model.rotations.values():
        assert isinstance(rotation, Rotation)
        rotation.frequencies = rotation.inverse_frequencies().to(device)
    if inventory.vision:
        log.info("%s: skipped %d vision tensors, only text is read", folder, inventory.vision)
    return model.requires_grad_(False).eval()


def inspect_checkpoint(folder: Path) -> CheckpointSummary:
    """What a folder holds, from the headers alone.

    Raises:
        CheckpointMissing, CheckpointMismatch: as `load_model`, but for what only the numbers
            tell (an untied head).
    """
    config = _read_config(folder)
    inventory = _Inventory(config)
    parameters = size = 0
    dtypes: set[str] = set()
    files = tuple(_files(folder))
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 -- a safetensors handle is no mapping
                piece = file.get_slice(name)
                shape, dtype = list(piece.get_shape()), str(piece.get_dtype())
                if inventory.take(name, shape, dtype) is None:
                    continue
                count = math.prod(shape)
                parameters += count
                dtypes.add(dtype)
                size += count * _DTYPE_BYTES.get(dtype, 1)
    inventory.refuse_missing()
    return CheckpointSummary(
        config, files, parameters, size, inventory.vision, tuple(sorted(dtypes))
    )


class _Inventory:
    """The tensors a configuration asks for, ticked off one by one.

    Attributes:
        model: without numbers yet. vision: tensors skipped so far.
    """

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            self.model = DiffusionGemma(config)
        self.vision = 0
        self._layers = config.layers
        self._missing = {name: list(t.shape) for name, t in self.model.state_dict().items()}
        del self._missing["encoder_scalars"]
        self._shapes = dict(self._missing)
        self._missing_scalars = set(range(config.layers))
        self._taken: set[str] = set()

    def take(self, name: str, shape: list[int], dtype: str) -> str | int | None:
        """Where a tensor of the file belongs.

        Returns:
            A name of the model's state, a layer whose encoder scalar it is, the head's name, or
            None for a vision tensor.

        Raises:
            CheckpointMismatch: found twice, of another shape, quantized, or nobody asked for it.
        """
        if name in self._taken:
            raise CheckpointMismatch(f"{name} is in two files")
        self._taken.add(name)
        if name.startswith(_VISION):
            self.vision += 1
            return None
        if name == _HEAD:
            return _HEAD
        layer = _encoder_layer(name, self._layers)
        if layer is not None:
            _refuse_misfit(name, shape, [1], dtype)
            self._missing_scalars.discard(layer)
            return layer
        short = name.removeprefix(_DECODER)
        if short == name or short not in self._shapes:
            raise _unexpected(name)
        _refuse_misfit(name, shape, self._shapes[short], dtype)
        self._missing.pop(short, None)
        return short

    def refuse_missing(self) -> None:
        """Raise CheckpointMismatch if anything was not found."""
        _refuse_missing(set(self._missing), self._missing_scalars)


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
    for path in _files(folder):
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 -- a safetensors handle is no mapping
                yield name, file.get_tensor(name)


def _encoder_layer(name: str, layers: int) -> int | None:
    before, _, after = _ENCODER_SCALAR.partition("{}")
    if not (name.startswith(before) and name.endswith(after)):
        return None
    number = name[len(before) : -len(after)]
    return int(number) if number.isdecimal() and int(number) < layers else None


def _refuse_misfit(name: str, shape: list[int], expected: list[int], dtype: str) -> None:
    if shape != expected:
        raise CheckpointMismatch(f"{name} is {shape}, config.json makes it {expected}")
    # As torch writes a type, or as the file's header does.
    if not dtype.startswith(("torch.float", "torch.bfloat", "F", "BF")):
        raise CheckpointMismatch(
            f"{name} holds {dtype}, expected floating point",
            remedy="Use the unquantized checkpoint; quantized ones cannot be read yet.",
        )


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
