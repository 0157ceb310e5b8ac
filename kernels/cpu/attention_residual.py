"""From an attention's output to the feed-forward branches, for a CPU."""

import torch
from torch import Tensor

from infilld.kernels.cpu.norm import root


def attention_residual(
    x: Tensor, attended: Tensor, after_weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual [T, D] and its unit vectors, each divided by sqrt(D) of what it is elsewhere.

    The three norms that `infilld.kernels.attention_residual` gives are these unit vectors times
    weights; `wide_weight` makes the weights from those of the checkpoint.
    """
    residual = torch.addcmul(x, attended / root(attended, eps), after_weight)
    return residual, residual / root(residual, eps)
