"""Checks of tensors that public operations share."""

from collections.abc import Sequence

import torch
from torch import Tensor

# What a hidden state may be; float64 is for parity tests of the reference.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a stored key or value may be.
CACHED = (*FLOATS, torch.float8_e4m3fn)
INDEX = (torch.int32,)


def expect(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Refuse a tensor of another shape, type or place.

    Raises:
        ValueError: says what was found and what was expected.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}, expected one of {names}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
