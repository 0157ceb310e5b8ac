"""Random weights in few bits, of every form that there is, and how near a product must come."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from infilld.kernels._weights import CODES_PER_BYTE, Kind, QuantizedWeight


def random_weight(
    shape: Sequence[int],
    *,
    kind: Kind,
    group: int,
    dtype: torch.dtype = torch.bfloat16,
    affine: bool = False,
    factor: bool | Literal["rows"] = False,
    seed: int = 0,
) -> QuantizedWeight:
    """A weight [..., N, K] that uses every code; its values are about 1 / sqrt(K)."""
    draw = torch.Generator().manual_seed(seed)
    *leading, columns = shape
    codes = torch.randint(
        256, (*leading, columns // CODES_PER_BYTE[kind]), generator=draw, dtype=torch.uint8
    )
    if kind == "fp8":
        codes = torch.where((codes & 127) == 127, codes - 64, codes).view(torch.float8_e4m3fn)
    elif kind == "int8":
        codes = codes.view(torch.int8)
    size = {"int4": 5, "nvfp4": 3, "int8": 74, "fp8": 100}[kind]
    spread = 0.5 + torch.rand((*leading, columns // group), generator=draw)
    scales = spread / size / columns**0.5
    if kind == "nvfp4":
        # What is left to the factor there.
        scales = (100 * spread).to(torch.float8_e4m3fn)
    offsets = -(scales.float() * (8 if kind == "int4" else 3)).to(dtype) if affine else None
    factors = None
    if factor or kind == "nvfp4":
        each = leading if factor == "rows" else leading[:-1]
        factors = (0.5 + torch.rand(each, generator=draw)) / 100 / size / columns**0.5
    return QuantizedWeight(
        kind=kind,
        codes=codes,
        scales=scales if kind == "nvfp4" else scales.to(dtype),
        biases=offsets,
        factor=factors,
        group=group,
    )


# Name: arguments. Every kind, group and type that the checkpoints have; K that fills no tile.
FORMS: dict[str, dict[str, Any]] = {
    "int4-g16": {"kind": "int4", "group": 16},
    "int4-g32": {"kind": "int4", "group": 32},
    "int4-g48": {"kind": "int4", "group": 48},
    "int4-g32-affine": {"kind": "int4", "group": 32, "affine": True},
    "int4-g32-half": {"kind": "int4", "group": 32, "dtype": torch.float16},
    "int4-g48-half-affine": {
        "kind": "int4", "group": 48, "dtype": torch.float16, "affine": True,
    },
    "int4-g32-wide": {"kind": "int4", "group": 32, "dtype": torch.float32},
    "int4-row": {"kind": "int4", "group": 96},
    "int4-row-affine": {"kind": "int4", "group": 96, "affine": True},
    "int8-g32": {"kind": "int8", "group": 32},
    "int8-g32-affine": {"kind": "int8", "group": 32, "affine": True},
    "int8-g48-wide": {"kind": "int8", "group": 48, "dtype": torch.float32},
    "int8-row": {"kind": "int8", "group": 96, "factor": True},
    "fp8-row": {"kind": "fp8", "group": 96, "dtype": torch.float32},
    "nvfp4": {"kind": "nvfp4", "group": 16},
    "nvfp4-rows": {"kind": "nvfp4", "group": 16, "factor": "rows"},
}  # fmt: skip
FORM_COLUMNS = 96


def form(name: str, *leading: int, seed: int = 0) -> QuantizedWeight:
    """A weight [*leading, FORM_COLUMNS] of one of the forms."""
    return random_weight((*leading, FORM_COLUMNS), **FORMS[name], seed=seed)


def product_error(x: Tensor, weight: Tensor) -> Tensor:
    """Largest error [T, N] that rounding weights to bfloat16 makes of x @ weight.T.

    Half a unit in the last of eight bits for each weight, and as much again as the sum's own
    rounding in float32 could ever be.
    """
    return (x.double().abs() @ weight.double().abs().T) * (2.0**-8 + 2.0**-14)


def rounding_error(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of one rounding of `exact` to `dtype`, with room for what it was given."""
    return exact.double().abs() * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-20) + 1e-30
