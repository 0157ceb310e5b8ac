"""Values of a weight in few bits."""

from typing import Literal

import torch
from torch import Tensor

from infilld.kernels._launch import require_triton
from infilld.kernels._weights import QuantizedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dequantize(
    weight: QuantizedWeight,
    *,
    dtype: torch.dtype = torch.float32,
    impl: Literal["gpu", "reference"],
) -> Tensor:
    """`factor * (scales * codes + biases)`, computed in float32, rounded once to `dtype`.

    Args:
        weight: [..., N, K].
        dtype: float32, bfloat16, float16; the reference also takes float64.
        impl: implementation; nothing falls back to another one.

    Returns:
        A new tensor [..., N, K]. Codes of fp8 that are NaN are so in the reference only.

    Raises:
        ValueError: `dtype` is none of these.
        KernelUnavailable: this implementation cannot run here.
    """
    if dtype not in DTYPES and not (dtype == torch.float64 and impl == "reference"):
        raise ValueError(f"{dtype=}: expected one of {DTYPES}")
    if impl == "gpu":
        require_triton("dequantize")
        from infilld.kernels.gpu.dequantize import dequantize as run
    elif impl == "reference":
        from infilld.kernels.reference.dequantize import dequantize as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    return run(weight, dtype=dtype)
