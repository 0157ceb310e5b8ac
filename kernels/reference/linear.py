"""A product with one weight in few bits: the definition."""

import torch
from torch import Tensor

from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.reference.dequantize import dequantize


def linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """[T, N] in x's type; see `infilld.kernels.linear`."""
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide @ dequantize(weight, dtype=wide.dtype).T).to(x.dtype)
