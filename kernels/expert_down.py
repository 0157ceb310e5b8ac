"""The second product of the experts' gated MLPs."""

from typing import Literal

from torch import Tensor

from infilld.kernels._expect import FLOATS, expect
from infilld.kernels._launch import require_triton
from infilld.kernels._tiles import TiledWeight
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.route import Routes


def expert_down(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight | TiledWeight,
    routes: Routes,
    *,
    impl: Literal["gpu", "reference"],
) -> Tensor:
    """`down(hidden)` of every route, times the route's weight.

    Products are summed and weighted in float32.

    Args:
        hidden: [T * k, F], in the order of `routes.order`. The GPU takes bfloat16 and float32.
        weight: [E, D, F], a plain tensor; or in few bits, by rows for the reference and in tiles
            for the GPU (`quant_pack`). Where there is more than
            one scale a row, the GPU rounds each weight to bfloat16 before the product; not where
            scales are float32, or float16 with biases.
        routes: of the T tokens.
        impl: implementation; nothing falls back to another one.

    Returns:
        [T * k, D] in hidden's dtype, in the same order; a token's result is the sum of its rows.

    Raises:
        ValueError: shapes, devices or the form of the weight are not as above.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, models/diffusion_gemma (experts).
    """
    if len(weight.shape) != 3:
        raise ValueError(f"the weight is {list(weight.shape)}, expected [E, D, F]")
    expect("hidden", hidden, (len(routes.order), weight.shape[2]), FLOATS, weight.device)
    if impl == "gpu":
        require_triton("expert_down")
        from infilld.kernels.gpu.expert_down import expert_down as run_gpu

        if isinstance(weight, QuantizedWeight):
            raise ValueError("the GPU reads weights in tiles: quant_pack makes them")
        if isinstance(weight, TiledWeight) and weight.layout.gated:
            raise ValueError("the tiles hold gates beside ups: pack without gated")
        return run_gpu(hidden, weight, routes.order, routes.tiles, routes.weights)
    if impl != "reference":
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    from infilld.kernels.reference.expert_down import expert_down as run_reference

    if isinstance(weight, TiledWeight):
        raise ValueError("the reference reads weights by rows, not in tiles")
    return run_reference(hidden, weight, routes.ids, routes.order, routes.weights)
