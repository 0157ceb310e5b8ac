"""From the feed-forward branches to the next layer's input: the definition."""

from torch import Tensor

from infilld.kernels.reference._norm import unit, work_type


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
) -> tuple[Tensor, Tensor]:
    """Hidden state and its norm, [T, D]; see `infilld.kernels.feed_forward_residual`.

    Source: transformers 5.23.0, models/diffusion_gemma (decoder layer).
    """
    work = work_type(residual)
    chosen = expert_rows.to(work)[place.long()]
    routed = chosen.view(len(residual), -1, residual.shape[1]).sum(1)
    total = (unit(dense, eps) * dense_weight.float()).to(work)
    total = total + (unit(routed, eps) * expert_weight.float()).to(work)
    x = residual.to(work) + (unit(total, eps) * after_weight.float()).to(work)
    x = x * scalar.to(work)
    normed = unit(x, eps) * next_weight.float()
    return x.to(residual.dtype), normed.to(residual.dtype)
