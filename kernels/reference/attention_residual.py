"""From an attention's output to the feed-forward branches: the definition."""

from torch import Tensor

from infilld.kernels.reference._norm import unit, work_type


def attention_residual(
    x: Tensor,
    attended: Tensor,
    after_weight: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    router_scale: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual and its three norms, [T, D]; see `infilld.kernels.attention_residual`.

    Source: transformers 5.23.0, models/diffusion_gemma (decoder layer, router).
    """
    work, root = work_type(x), x.shape[1] ** -0.5
    residual = x.to(work) + (unit(attended, eps) * after_weight.float()).to(work)
    normed = unit(residual, eps)
    outputs = (
        residual,
        normed * dense_weight.float(),
        normed * expert_weight.float(),
        normed.to(work) * router_scale.to(work) * root,
    )
    first, second, third, fourth = (each.to(x.dtype) for each in outputs)
    return first, second, third, fourth
