"""Names of a file's tensors, and where in the model they belong."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

DECODER = "model.decoder."
ENCODER_SCALAR = "model.encoder.language_model.layers.{}.layer_scalar"
SCALARS = "encoder_scalars"
HEAD = "lm_head.weight"
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")

# Experts are stored all in one, all gates in one, or each by itself.
_EXPERTS = re.compile(
    r"(?P<block>layers\.\d+\.experts)\.(?:(?P<expert>\d+)\.|switch_glu\.)?"
    r"(?P<which>gate|up|gate_up|down)_proj(?:\.weight)?"
)
_SCALAR = re.compile(ENCODER_SCALAR.replace(".", r"\.").format(r"(\d+)"))


@dataclass(frozen=True)
class Place:
    """A tensor of the model, or a part of one.

    Attributes:
        target: internal name.
        index: of the expert, or of the layer of an encoder's scalar; None: all of them.
        half: of the rows of `gate_up_proj`; None: both.
    """

    target: str
    index: int | None = None
    half: Literal["gate", "up"] | None = None

    def of(self, whole: Tensor) -> Tensor:
        """The part of the target's tensor [E, 2F, ...] (or of any other) that is meant."""
        if self.target == SCALARS:
            return whole if self.index is None else whole[self.index : self.index + 1]
        part = whole if self.index is None else whole[self.index]
        if self.half is None:
            return part
        first, second = part.chunk(2, dim=-2)
        return first if self.half == "gate" else second

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of that part, given the target's."""
        if self.target == SCALARS:
            return (1,)
        part = whole if self.index is None else whole[1:]
        if self.half is None:
            return part
        *leading, rows, columns = part
        return (*leading, rows // 2, columns)

    def slots(self, whole: tuple[int, ...]) -> frozenset[tuple[int, str]]:
        """What it fills of the target: experts and halves of their rows, or layers."""
        if self.target != SCALARS and not self.target.endswith(".experts.gate_up_proj"):
            counted = range(whole[0]) if ".experts." in self.target else range(1)
            halves: tuple[str, ...] = ("",)
        else:
            counted = range(whole[0])
            halves = ("",) if self.target == SCALARS else ("gate", "up")
        chosen = counted if self.index is None else (self.index,)
        return frozenset(
            (index, half)
            for index in chosen
            for half in (halves if self.half is None else (self.half,))
        )


def find_place(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Place | None:
    """Where a tensor of the file belongs; None: nowhere.

    Args:
        name: in the file; of a weight in few bits, the name its plain form would have.
        shapes: of the model's tensors, by internal name.
    """
    if scalar := _SCALAR.fullmatch(name):
        layer = int(scalar[1])
        return Place(SCALARS, layer) if layer < shapes[SCALARS][0] else None
    short = name.removeprefix(DECODER)
    if short in (name, SCALARS):
        return None
    if found := _EXPERTS.fullmatch(short):
        which = found["which"]
        target = f"{found['block']}.{'down' if which == 'down' else 'gate_up'}_proj"
        index = None if found["expert"] is None else int(found["expert"])
        if target not in shapes or (index is not None and index >= shapes[target][0]):
            return None
        half: Literal["gate", "up"] | None = None
        if which == "gate":
            half = "gate"
        elif which == "up":
            half = "up"
        return Place(target, index, half)
    return Place(short) if short in shapes else None


def missing_names(
    target: str, shape: tuple[int, ...], filled: frozenset[tuple[int, str]]
) -> list[str]:
    """What the file's names would be of the slots of a target that nothing fills."""
    if not filled and target != SCALARS:
        return [DECODER + target]
    names = []
    for index, half in sorted(Place(target).slots(shape) - filled):
        if target == SCALARS:
            names.append(ENCODER_SCALAR.format(index))
            continue
        block, _, last = (DECODER + target).rpartition(".")
        names.append(f"{block}.{index}.{half + '_proj' if half else last}")
    return names
