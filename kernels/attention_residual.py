"""From an attention's output to what the two feed-forward branches and the router read."""

from typing import Literal, NamedTuple

from torch import Tensor

from infilld.kernels._expect import FLOATS, expect
from infilld.kernels._launch import require_triton


class Attended(NamedTuple):
    """The residual after attention, and its three norms, each [T, D] in the type of x.

    Attributes:
        residual: x plus the normed attention output.
        dense_in: input of the dense MLP. expert_in: input of the experts.
        router_in: input of the router's projection.
    """

    residual: Tensor
    dense_in: Tensor
    expert_in: Tensor
    router_in: Tensor


def attention_residual(
    x: Tensor,
    attended: Tensor,
    after_weight: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    router_scale: Tensor,
    *,
    eps: float,
    impl: Literal["gpu", "reference"],
) -> Attended:
    """Add the normed attention output to the residual and norm the sum for its three readers.

    With `unit(y) = y / sqrt(mean(y^2) + eps)` over the last axis:

        residual = x + unit(attended) * after_weight
        dense_in = unit(residual) * dense_weight
        expert_in = unit(residual) * expert_weight
        router_in = unit(residual) * router_scale / sqrt(D)

    Norms are float32, also of float64 inputs; the rest is float32, of float64 inputs float64.
    Nothing is rounded to a narrower type before the end: the norms read the sum as it was added.

    Args:
        x: [T, D]. attended: [T, D], the attention's output projection. One type. T may be 0.
        after_weight: [D]. dense_weight: [D]. expert_weight: [D]. router_scale: [D].
        eps: added to the mean square.
        impl: implementation; nothing falls back to another one.

    Returns:
        New tensors; the arguments are not changed.

    Raises:
        ValueError: shapes, types or devices are not as above.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, models/diffusion_gemma (decoder layer, router).
    Differs: with bfloat16, the reference rounds after every line.
    """
    weights = {
        "after_weight": after_weight,
        "dense_weight": dense_weight,
        "expert_weight": expert_weight,
        "router_scale": router_scale,
    }
    if x.ndim != 2 or x.shape[1] < 1:
        raise ValueError(f"x is {list(x.shape)}, expected [T, D]")
    expect("x", x, x.shape, FLOATS, x.device)
    expect("attended", attended, x.shape, (x.dtype,), x.device)
    for name, weight in weights.items():
        expect(name, weight, x.shape[1:], FLOATS, x.device)
    if impl == "gpu":
        require_triton("attention_residual")
        from infilld.kernels.gpu.attention_residual import attention_residual as run
    elif impl == "reference":
        from infilld.kernels.reference.attention_residual import attention_residual as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    return Attended(*run(x, attended, *weights.values(), eps=eps))
