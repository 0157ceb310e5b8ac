"""From the outputs of the two feed-forward branches to the next layer's input."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from infilld.kernels._expect import FLOATS, INDEX, expect
from infilld.kernels._launch import require_triton


class LayerOutput(NamedTuple):
    """What a layer gives, each [T, D] in the type of the residual.

    Attributes:
        x: the hidden state. normed: x as the next layer's first norm gives it.
    """

    x: Tensor
    normed: Tensor


def feed_forward_residual(
    residual: Tensor,
    dense: Tensor,
    expert_rows: Tensor,
    place: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    after_weight: Tensor,
    next_weight: Tensor,
    scalar: Tensor,
    *,
    eps: float,
    impl: Literal["gpu", "reference"],
) -> LayerOutput:
    """Sum a token's expert rows, join both branches, and norm the sum for the next layer.

    With `unit(y) = y / sqrt(mean(y^2) + eps)` over the last axis and k experts a token:

        routed[t] = sum of expert_rows[place[t * k + i]] for i in [0, k), in that order
        total = unit(dense) * dense_weight + unit(routed) * expert_weight
        x = (residual + unit(total) * after_weight) * scalar
        normed = unit(x) * next_weight

    Norms are float32, also of float64 inputs; the rest is float32, of float64 inputs float64.
    Nothing is rounded to a narrower type before the end: `normed` reads x as it was computed.

    Args:
        residual: [T, D]. dense: [T, D], output of the dense MLP. One type. T may be 0.
        expert_rows: [T * k, D], rows of the experts' outputs, already weighted; same type.
        place: [T * k] int32, where the row of route t * k + i stands, in [0, T * k).
        dense_weight: [D]. expert_weight: [D]. after_weight: [D]. next_weight: [D].
        scalar: [1], of this layer.
        eps: added to the mean square.
        impl: implementation; nothing falls back to another one.

    Returns:
        New tensors; the arguments are not changed.

    Raises:
        ValueError: shapes, types or devices are not as above.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, models/diffusion_gemma (decoder layer).
    Differs: with bfloat16, the reference rounds after every line.
    """
    weights = {
        "dense_weight": dense_weight,
        "expert_weight": expert_weight,
        "after_weight": after_weight,
        "next_weight": next_weight,
    }
    _check(residual, dense, expert_rows, place, weights, scalar)
    if impl == "gpu":
        require_triton("feed_forward_residual")
        from infilld.kernels.gpu.feed_forward_residual import feed_forward_residual as run
    elif impl == "reference":
        from infilld.kernels.reference.feed_forward_residual import feed_forward_residual as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    if len(residual) == 0:
        return LayerOutput(torch.empty_like(residual), torch.empty_like(residual))
    out = run(
        residual,
        dense,
        expert_rows,
        place,
        dense_weight,
        expert_weight,
        after_weight,
        next_weight,
        scalar,
        eps=eps,
    )
    return LayerOutput(*out)


def _check(
    residual: Tensor,
    dense: Tensor,
    expert_rows: Tensor,
    place: Tensor,
    weights: dict[str, Tensor],
    scalar: Tensor,
) -> None:
    if residual.ndim != 2 or residual.shape[1] < 1:
        raise ValueError(f"residual is {list(residual.shape)}, expected [T, D]")
    (tokens, width), device = residual.shape, residual.device
    routes = place.numel()
    if (tokens == 0 and routes) or (tokens and (routes < tokens or routes % tokens)):
        raise ValueError(f"place has {routes} routes for {tokens} tokens, expected k for each")
    expect("residual", residual, residual.shape, FLOATS, device)
    expect("dense", dense, residual.shape, (residual.dtype,), device)
    expect("expert_rows", expert_rows, (routes, width), (residual.dtype,), device)
    expect("place", place, (routes,), INDEX, device)
    for name, weight in weights.items():
        expect(name, weight, (width,), FLOATS, device)
    expect("scalar", scalar, (1,), FLOATS, device)
