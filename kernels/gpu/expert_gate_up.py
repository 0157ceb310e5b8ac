"""Gates and ups of the experts: one grouped product, the gate in its epilogue."""

from torch import Tensor

from infilld.kernels._tiles import TiledWeight
from infilld.kernels.gpu._grouped import grouped


def expert_gate_up(
    x: Tensor, weight: Tensor | TiledWeight, order: Tensor, tiles: Tensor, route_weights: Tensor
) -> Tensor:
    """Hidden rows [T * k, F] in x's type; see `infilld.kernels.expert_gate_up`.

    Raises:
        KernelUnavailable: no CUDA device, or a type that the kernel does not take.
    """
    return grouped(
        "gate_up",
        x,
        weight,
        columns=weight.shape[-2] // 2,
        order=order,
        tiles=tiles,
        route_weights=route_weights,
    )
