"""Division by the root mean square in few operations, of which each costs more than it computes."""

import functools
import math

import torch
from torch import Tensor


def root(x: Tensor, eps: float) -> Tensor:
    """`sqrt(sum(x^2) + N eps)` over the last axis, of N elements, which stays as an axis of one.

    `x / root(x) * sqrt(N)` is x divided by its root mean square. The factor sqrt(N) is left to
    what follows, which multiplies by a weight anyway.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.hypot(length, _constant(math.sqrt(x.shape[-1] * eps)))


@functools.cache
def _constant(value: float) -> Tensor:
    # A Python number would be turned into a tensor at each call, which takes longer than hypot.
    with torch.inference_mode(False):
        return torch.tensor(value)


@functools.cache
def size_root(size: int) -> Tensor:
    """sqrt(size), a float32 scalar."""
    return _constant(math.sqrt(size))
