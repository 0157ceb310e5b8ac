"""Weights in few bits: the one canonical form of each bit width, row by row.

Checkpoint readers make it, a CPU computes with it, and `quant_pack` turns it into the tiles that
a GPU's matmuls read.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

Kind = Literal["int4", "int8", "fp8", "nvfp4"]

CODE_DTYPES: dict[Kind, torch.dtype] = {
    "int4": torch.uint8,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
    "nvfp4": torch.uint8,
}
# Codes in a byte.
CODES_PER_BYTE: dict[Kind, int] = {"int4": 2, "int8": 1, "fp8": 1, "nvfp4": 2}
NVFP4_GROUP = 16
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class InParts:
    """What the forms of a weight in few bits have in common: the tensors they are made of."""

    codes: Tensor
    scales: Tensor
    biases: Tensor | None
    factor: Tensor | None

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensors by name, without those it does not have."""
        named = {
            "codes": self.codes,
            "scales": self.scales,
            "biases": self.biases,
            "factor": self.factor,
        }
        return {name: part for name, part in named.items() if part is not None}

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        moved = {name: part.to(device) for name, part in self.parts.items()}
        return replace(self, **moved)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizedWeight(InParts):
    """A weight [..., N, K] in few bits; leading dimensions are experts.

    Its value is `factor * (scales[n, k // G] * code[n, k] + biases[n, k // G])`.

    Attributes:
        kind: int4: nibbles, 0..15 where there are biases, else 8 is subtracted first; int8: signed
            bytes; fp8: E4M3; nvfp4: E2M1 nibbles with E4M3 scales.
        codes: int4 and nvfp4 uint8 [..., N, K / 2], the low nibble is the even k; int8 and
            float8_e4m3fn [..., N, K].
        scales: [..., N, K / G], floating point; float8_e4m3fn for nvfp4.
        biases: as scales; int4 and int8 only.
        factor: float32 [...], one for each leading index, or [..., N], one for each row; None: 1.
        group: G, consecutive k that share a scale; K for one scale a row, 16 for nvfp4.
    """

    kind: Kind
    codes: Tensor
    scales: Tensor
    group: int
    biases: Tensor | None = None
    factor: Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not belong together."""
        if self.codes.ndim < 2 or self.codes.dtype != CODE_DTYPES[self.kind]:
            raise ValueError(
                f"codes are {self.codes.dtype} {list(self.codes.shape)}, "
                f"expected {CODE_DTYPES[self.kind]} [..., N, K] for {self.kind}"
            )
        *leading, rows, columns = self.shape
        if self.group < 1 or columns % self.group:
            raise ValueError(f"{columns} columns do not divide into groups of {self.group}")
        expected = (*self.shape[:-1], columns // self.group)
        allowed = (torch.float8_e4m3fn,) if self.kind == "nvfp4" else _FLOATS
        if tuple(self.scales.shape) != expected or self.scales.dtype not in allowed:
            raise ValueError(
                f"scales are {self.scales.dtype} {list(self.scales.shape)}, "
                f"expected {list(expected)} in one of {allowed}"
            )
        if self.kind == "nvfp4" and self.group != NVFP4_GROUP:
            raise ValueError(f"nvfp4 has groups of {NVFP4_GROUP}, not {self.group}")
        if self.biases is not None:
            if self.kind not in ("int4", "int8"):
                raise ValueError(f"{self.kind} has no biases")
            if self.biases.shape != self.scales.shape or self.biases.dtype != self.scales.dtype:
                raise ValueError("biases differ from the scales in shape or type")
        if self.factor is not None and (
            list(self.factor.shape) not in (leading, [*leading, rows])
            or self.factor.dtype != torch.float32
        ):
            raise ValueError(
                f"factor is {self.factor.dtype} {list(self.factor.shape)}, "
                f"expected float32 {leading} or {[*leading, rows]}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for, [..., N, K]."""
        *leading, columns = self.codes.shape
        return (*leading, columns * CODES_PER_BYTE[self.kind])

    @property
    def row_factor(self) -> Tensor | None:
        """The factors [..., N] of rows that have their own, else None."""
        has_rows = self.factor is not None and self.factor.ndim == len(self.shape) - 1
        return self.factor if has_rows else None
