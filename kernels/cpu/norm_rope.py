"""Norms and rotation before attention, for a CPU."""

import math

import torch
from torch import Tensor

from infilld.kernels.cpu.norm import root, size_root


def norm_rope(
    qkv: Tensor,
    weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    *,
    key_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; see `infilld.kernels.norm_rope`.

    Args:
        qkv: [T, (H + 2 K) * A] float32, or without values [T, (H + K) * A].
        weight: [H + K, 2, A]: for each head its norm's weight, and the same with its halves
            swapped; see `head_weights`.
        cosine: [T, 1, A]. sine: [T, 1, A], the first half negated.
        key_heads: K. eps: of the norms.

    Returns:
        q [T, H, A], k [T, K, A], v [T, K, A]; views of common memory.
    """
    turned, size = len(weight), weight.shape[-1]
    parts = qkv.view(len(qkv), qkv.shape[1] // size, size)
    parts = parts / root(parts, eps)
    x = parts[:, :turned]
    # The halves of a head change places: x2 turns into x1 and x1 into x2.
    q_and_k = torch.addcmul(x * weight[:, 0] * cosine, x.roll(size // 2, -1) * weight[:, 1], sine)
    heads = turned - key_heads
    return q_and_k[:, :heads], q_and_k[:, heads:], parts[:, -key_heads:] * size_root(size)


def head_weights(q_weight: Tensor, k_weight: Tensor, *, heads: int, key_heads: int) -> Tensor:
    """The weights [A] of the norms of queries and keys as `norm_rope` reads them, [H + K, 2, A]."""
    size = len(q_weight)
    each = torch.cat((q_weight.expand(heads, size), k_weight.expand(key_heads, size)))
    return torch.stack((each, each.roll(size // 2, -1)), dim=1) * math.sqrt(size)
