"""The experts' second product, its rows weighted."""

from torch import Tensor

from infilld.kernels._tiles import TiledWeight
from infilld.kernels.gpu._grouped import grouped


def expert_down(
    hidden: Tensor,
    weight: Tensor | TiledWeight,
    order: Tensor,
    tiles: Tensor,
    route_weights: Tensor,
) -> Tensor:
    """Rows [T * k, D] in hidden's type; see `infilld.kernels.expert_down`.

    Raises:
        KernelUnavailable: no CUDA device, or a type that the kernel does not take.
    """
    return grouped(
        "down",
        hidden,
        weight,
        columns=weight.shape[-2],
        order=order,
        tiles=tiles,
        route_weights=route_weights,
    )
