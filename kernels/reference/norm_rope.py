"""Norms and rotation before attention: the definition."""

import torch
from torch import Tensor

from infilld.kernels.reference._norm import unit, work_type


def norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    *,
    heads: int,
    key_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives q [T, H, A], k [T, K, A] and v [T, K, A]; see `infilld.kernels.norm_rope`.

    Source: transformers 5.23.0, models/diffusion_gemma (DiffusionGemmaAttention).
    """
    work, size = work_type(qkv), len(q_weight)
    parts = qkv.view(len(qkv), qkv.shape[1] // size, size)
    queries, keys = parts[:, :heads], parts[:, heads : heads + key_heads]
    values = parts[:, -key_heads:]  # the keys themselves where there are no values
    turn = (cosine.to(work)[:, None], sine.to(work)[:, None])
    q = _rotate((unit(queries, eps) * q_weight.float()).to(work), *turn)
    k = _rotate((unit(keys, eps) * k_weight.float()).to(work), *turn)
    return q.to(qkv.dtype), k.to(qkv.dtype), unit(values, eps).to(qkv.dtype)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-right, left), dim=-1) * sine
