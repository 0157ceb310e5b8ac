"""Types that kernels take."""

import torch
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable


def refuse_float64(operation: str, tensor: Tensor) -> None:
    """Kernels compute in float32; float64 is the reference's.

    Raises:
        KernelUnavailable: the tensor is float64.
    """
    if tensor.dtype == torch.float64:
        raise KernelUnavailable(f"{operation}: float64, the GPU implementation computes in float32")
