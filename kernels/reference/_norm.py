"""What the definitions of a layer's operations share."""

import torch
from torch import Tensor


def unit(x: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, float32 whatever x is."""
    wide = x.float()
    return wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + eps, -0.5)


def work_type(x: Tensor) -> torch.dtype:
    """The type in which a definition computes: float64 of float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)
