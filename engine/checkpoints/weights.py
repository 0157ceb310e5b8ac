"""What a checkpoint's readers hand over, whatever the file's format was."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from infilld.engine.config import ModelConfig
from infilld.engine.model import DiffusionGemma
from infilld.kernels._weights import Kind, QuantizedWeight

Part = Literal[
    "embedding", "attention", "dense MLP", "experts", "router", "self-conditioning", "rest"
]
PARTS: tuple[Part, ...] = (
    "embedding",
    "attention",
    "dense MLP",
    "experts",
    "router",
    "self-conditioning",
    "rest",
)
PLAIN = "plain"


@dataclass(frozen=True, eq=False, kw_only=True)
class Weights:
    """All weights of one text model, under the names of `DiffusionGemma.state_dict()`.

    Attributes:
        config: shapes.
        tensors: plain tensors and weights in few bits. Experts are stacked, gate rows first:
            `layers.N.experts.gate_up_proj` [E, 2F, D]; `encoder_scalars` is [layers].
        format: what the file was, "plain" or for example "compressed-tensors int4".
        notes: what is not exactly what the file says, and what of it is ignored.
        vision_tensors: tensors of the file that are skipped, since only text is read.
    """

    config: ModelConfig
    tensors: Mapping[str, Tensor | QuantizedWeight]
    format: str
    notes: tuple[str, ...] = ()
    vision_tensors: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes all of them take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class StoredPart:
    """How the tensors of one part of the model are stored; a part may have several such lines.

    Attributes:
        part: of the model.
        storage: as the file calls it: "BF16", "int4, groups of 32", "Q4_K".
        kind: what it is held as; None: as a plain tensor.
        parameters: numbers it stands for.
        stored_bytes: in the file, scales included.
        held_bytes: as held; None: one number of the type asked for per parameter.
    """

    part: Part
    storage: str
    kind: Kind | None
    parameters: int
    stored_bytes: int
    held_bytes: int | None

    @property
    def bits_per_weight(self) -> float:
        """Of the file, scales included."""
        return 8 * self.stored_bytes / self.parameters


@dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint holds, from its headers alone.

    Attributes:
        config: shapes.
        files: that hold weights, in reading order.
        parameters: numbers that the text tensors stand for. text_bytes: their bytes as stored.
        vision_tensors: how many are skipped, since only text is read.
        dtypes: stored types of the text tensors, sorted.
        format: as in `Weights`.
        parts: how the model's parts are stored, in the order of `PARTS`.
        notes: as in `Weights`.
    """

    config: ModelConfig
    files: tuple[Path, ...]
    parameters: int
    text_bytes: int
    vision_tensors: int
    dtypes: tuple[str, ...]
    format: str = PLAIN
    parts: tuple[StoredPart, ...] = ()
    notes: tuple[str, ...] = ()


def part_of(name: str) -> Part:
    """The part of the model that an internal tensor name belongs to."""
    if name == "embed_tokens.weight":
        return "embedding"
    if name.startswith("self_conditioning.") and name.endswith("_proj.weight"):
        return "self-conditioning"
    block = name.split(".")[2] if name.startswith("layers.") else ""
    if block == "self_attn" and name.endswith("_proj.weight"):
        return "attention"
    named: dict[str, Part] = {"mlp": "dense MLP", "experts": "experts", "router": "router"}
    return named.get(block, "rest")


def unfilled_model(config: ModelConfig) -> DiffusionGemma:
    """A model whose matrices have shapes, but neither numbers nor memory ("meta")."""
    with _Unfilled():
        return DiffusionGemma(config)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that a configuration asks for, by internal name."""
    state = unfilled_model(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills matrices.

    With `torch.device("meta")` alone the first number drawn, and the first range, import torch's
    compiler: 2 of the 2.5 seconds that loading the starter took.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See torch.overrides."""
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def tabulate(lines: list[StoredPart]) -> tuple[StoredPart, ...]:
    """One line for each part and storage, summed, in the order of `PARTS`."""
    sums: dict[tuple[Part, str, Kind | None], StoredPart] = {}
    for line in lines:
        key = (line.part, line.storage, line.kind)
        held = sums.get(key)
        if held is None:
            sums[key] = line
            continue
        both = None if line.held_bytes is None else (held.held_bytes or 0) + line.held_bytes
        sums[key] = StoredPart(
            part=line.part,
            storage=line.storage,
            kind=line.kind,
            parameters=held.parameters + line.parameters,
            stored_bytes=held.stored_bytes + line.stored_bytes,
            held_bytes=both,
        )
    return tuple(sorted(sums.values(), key=lambda line: (PARTS.index(line.part), line.storage)))
