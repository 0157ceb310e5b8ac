"""The first product of the experts' gated MLPs."""

from typing import Literal

from torch import Tensor

from infilld.kernels._expect import FLOATS, expect
from infilld.kernels._launch import require_triton
from infilld.kernels._tiles import TiledWeight
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.route import Routes


def expert_gate_up(
    x: Tensor,
    weight: Tensor | QuantizedWeight | TiledWeight,
    routes: Routes,
    *,
    impl: Literal["gpu", "reference"],
) -> Tensor:
    """`gelu(gate(x)) * up(x)` of every route, with the tanh form of GELU.

    Products are summed in float32, and the gate is computed in it.

    Args:
        x: [T, D]. The GPU takes bfloat16 and float32.
        weight: [E, 2 * F, D], gates first: a plain tensor; or in few bits, by rows for the
            reference and in tiles for the GPU (`quant_pack` with `gated`). Where there is more than
            one scale a row, the GPU rounds each weight to bfloat16 before the product; not where
            scales are float32, or float16 with biases.
        routes: of the T tokens.
        impl: implementation; nothing falls back to another one.

    Returns:
        Hidden rows [T * k, F] in x's dtype, in the order of `routes.order`.

    Raises:
        ValueError: shapes, devices or the form of the weight are not as above.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, models/diffusion_gemma (experts).
    """
    if len(weight.shape) != 3 or weight.shape[1] % 2:
        raise ValueError(f"the weight is {list(weight.shape)}, expected [E, 2 * F, D]")
    expect("x", x, (len(routes.ids), weight.shape[2]), FLOATS, weight.device)
    if impl == "gpu":
        require_triton("expert_gate_up")
        from infilld.kernels.gpu.expert_gate_up import expert_gate_up as run_gpu

        if isinstance(weight, QuantizedWeight):
            raise ValueError("the GPU reads weights in tiles: quant_pack makes them")
        if isinstance(weight, TiledWeight) and not weight.layout.gated:
            raise ValueError("the tiles do not hold gates beside their ups: pack with gated=True")
        return run_gpu(x, weight, routes.order, routes.tiles, routes.weights)
    if impl != "reference":
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    from infilld.kernels.reference.expert_gate_up import expert_gate_up as run_reference

    if isinstance(weight, TiledWeight):
        raise ValueError("the reference reads weights by rows, not in tiles")
    return run_reference(x, weight, routes.ids, routes.order)
