"""The gated activation, with one exponential instead of a hyperbolic tangent."""

import functools
import math

import torch
from torch import Tensor


def gated(both: Tensor) -> Tensor:
    """`gelu_tanh(gate) * up` of both [..., 2 F], gates first: [..., F], contiguous.

    `gelu_tanh(x) = x * sigmoid(2 z)` with `z = sqrt(2 / pi) (x + 0.044715 x^3)`; torch's own is
    2 to 3 times as slow where there are no wide registers.
    """
    gate, up = both.chunk(2, dim=-1)
    first, third = _factors()
    out = torch.addcmul(first, gate, gate, value=third)
    return out.mul_(gate).sigmoid_().mul_(gate).mul_(up)


@functools.cache
def _factors() -> tuple[Tensor, float]:
    first = 2.0 * math.sqrt(2.0 / math.pi)
    with torch.inference_mode(False):
        return torch.tensor(first), 0.044715 * first
