"""A product with one weight in few bits."""

from typing import Literal

from torch import Tensor

from infilld.kernels._expect import FLOATS, expect
from infilld.kernels._launch import require_triton
from infilld.kernels._tiles import TiledWeight
from infilld.kernels._weights import QuantizedWeight


def linear(
    x: Tensor, weight: QuantizedWeight | TiledWeight, *, impl: Literal["gpu", "reference"]
) -> Tensor:
    """`x @ weight.T`, summed in float32, in x's dtype.

    Args:
        x: [T, K]; T may be 0. The GPU takes bfloat16 and float32.
        weight: [N, K]; the GPU reads tiles (`quant_pack`), the reference rows. Where there
            is more than one scale a row, the GPU rounds each weight to bfloat16 before the product;
            not where scales are float32, or float16 with biases.
        impl: implementation; nothing falls back to another one.

    Raises:
        ValueError: shapes, devices or the form of the weight are not as above.
        KernelUnavailable: this implementation cannot run here.
    """
    if len(weight.shape) != 2 or (isinstance(weight, TiledWeight) and weight.layout.gated):
        raise ValueError(f"the weight is {list(weight.shape)}, expected [N, K] that is not gated")
    tokens = x.shape[0] if x.ndim else 0
    expect("x", x, (tokens, weight.shape[1]), FLOATS, weight.device)
    if impl == "gpu":
        require_triton("linear")
        from infilld.kernels.gpu.linear import linear as run_gpu

        if not isinstance(weight, TiledWeight):
            raise ValueError("the GPU reads weights in tiles: quant_pack makes them")
        return run_gpu(x, weight)
    if impl != "reference":
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    from infilld.kernels.reference.linear import linear as run_reference

    if not isinstance(weight, QuantizedWeight):
        raise ValueError("the reference reads weights by rows, not in tiles")
    return run_reference(x, weight)
