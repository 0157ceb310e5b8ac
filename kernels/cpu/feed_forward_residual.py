"""From the feed-forward branches to the next layer's input, for a CPU."""

import torch
from torch import Tensor

from infilld.kernels.cpu.norm import root


def feed_forward_residual(
    residual: Tensor,
    dense: Tensor,
    routed: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    after_weight: Tensor,
    next_weight: Tensor,
    scalar: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The hidden state [T, D] and its norm; see `infilld.kernels.feed_forward_residual`.

    Args:
        residual, dense: [T, D] float32. routed: [T, D], summed over a token's experts.
        dense_weight, expert_weight, after_weight, next_weight: [D], times sqrt(D).
        scalar: [1]. eps: of the norms.
    """
    total = dense / root(dense, eps) * dense_weight
    total = torch.addcmul(total, routed / root(routed, eps), expert_weight)
    x = torch.addcmul(residual, total / root(total, eps), after_weight) * scalar
    return x, x / root(x, eps) * next_weight
