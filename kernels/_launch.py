"""What every GPU implementation shares: refusing what cannot run here."""

import functools
import importlib.metadata
import os

from torch import Tensor


class KernelUnavailable(RuntimeError):
    """This machine, or these shapes, cannot run the operation; the message names what is missing.

    There is no silent fallback: the caller chose the implementation.
    """


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors. For tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def triton_version() -> tuple[int, int]:
    """Major and minor version of the Triton that is installed; (0, 0): none."""
    try:
        major, minor, *_ = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


def require_triton(operation: str) -> None:
    """Refuse a machine without Triton, before a GPU implementation is imported.

    Raises:
        KernelUnavailable: Triton is not installed.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        raise KernelUnavailable(f"{operation}: Triton is not installed") from None


def require_gpu(operation: str, *tensors: Tensor) -> None:
    """Refuse tensors that no kernel can read.

    Raises:
        KernelUnavailable: a tensor is not on a CUDA device.
    """
    if is_interpreted():
        return
    for tensor in tensors:
        if not tensor.is_cuda:
            raise KernelUnavailable(
                f"{operation}: the tensors are on {tensor.device}, "
                "the GPU implementation needs a CUDA device"
            )
