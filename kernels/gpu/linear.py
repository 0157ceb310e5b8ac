"""A product with one weight in tiles: the experts' kernel with a single expert."""

from torch import Tensor

from infilld.kernels._tiles import TiledWeight
from infilld.kernels.gpu._grouped import dense


def linear(x: Tensor, weight: TiledWeight) -> Tensor:
    """[T, N] in x's type; see `infilld.kernels.linear`.

    Raises:
        KernelUnavailable: no CUDA device, or a type that the kernel does not take.
    """
    return dense(x, weight, splits=None)
