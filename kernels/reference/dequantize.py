"""Values of a weight in few bits: the definition."""

from dataclasses import replace

import torch
from torch import Tensor

from infilld.kernels._weights import QuantizedWeight

# E2M1: sign, two bits of exponent, one of mantissa.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))


def dequantize(weight: QuantizedWeight, *, dtype: torch.dtype) -> Tensor:
    """[..., N, K] in `dtype`; see `infilld.kernels.dequantize`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = _codes(weight).to(wide)
    values = values * weight.scales.to(wide).repeat_interleave(weight.group, -1)
    if weight.biases is not None:
        values = values + weight.biases.to(wide).repeat_interleave(weight.group, -1)
    if weight.factor is not None:
        rows = weight.row_factor
        factor = weight.factor[..., None] if rows is None else rows
        values = values * factor[..., None].to(wide)
    return values.to(dtype)


def expert_matrix(weight: Tensor | QuantizedWeight, expert: int, dtype: torch.dtype) -> Tensor:
    """[N, K] of one expert of a weight [E, N, K]."""
    if isinstance(weight, Tensor):
        return weight[expert].to(dtype)
    parts = {name: part[expert] for name, part in weight.parts.items()}
    return dequantize(replace(weight, **parts), dtype=dtype)  # type: ignore[arg-type]


def _codes(weight: QuantizedWeight) -> Tensor:
    """What the scales multiply, [..., N, K]."""
    if weight.kind in ("int8", "fp8"):
        return weight.codes
    nibbles = torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).flatten(-2)
    if weight.kind == "nvfp4":
        return torch.tensor(E2M1_VALUES, device=nibbles.device)[nibbles.long()]
    return nibbles.to(torch.int8) - (8 if weight.biases is None else 0)
