"""Norms and rotation between the projections of a layer and its attention."""

from typing import Literal

from torch import Tensor

from infilld.kernels._expect import FLOATS, expect
from infilld.kernels._launch import require_triton


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
    impl: Literal["gpu", "reference"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that attention reads, from one row of projections per token.

    Queries and keys are divided by their root mean square, multiplied by a weight and turned by
    their positions; a value is only divided by its own. Where a row holds no values, they are the
    keys as projected, before norm and rotation. Pairs that turn are (i, i + A/2).

    Norms are float32, also of float64 inputs; the rest is float32, of float64 inputs float64.
    Nothing is rounded to a narrower type before the end.

    Args:
        qkv: [T, (H + 2 K) * A], queries, then keys, then values; [T, (H + K) * A] without values.
            Rows may be strided. T may be 0.
        q_weight: [A]. k_weight: [A].
        cosine: [T, A], any floating type. sine: as cosine.
        heads: H. key_heads: K, which divides H.
        eps: added to the mean square.
        impl: implementation; nothing falls back to another one.

    Returns:
        q [T, H, A], k [T, K, A] and v [T, K, A], contiguous, in the type of qkv.

    Raises:
        ValueError: shapes, types or devices are not as above.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, models/diffusion_gemma (DiffusionGemmaAttention).
    Differs: with bfloat16, the reference rounds between norm and rotation.
    """
    _check(qkv, q_weight, k_weight, cosine, sine, heads, key_heads)
    if impl == "gpu":
        require_triton("norm_rope")
        from infilld.kernels.gpu.norm_rope import norm_rope as run
    elif impl == "reference":
        from infilld.kernels.reference.norm_rope import norm_rope as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    return run(qkv, q_weight, k_weight, cosine, sine, heads=heads, key_heads=key_heads, eps=eps)


def _check(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    heads: int,
    key_heads: int,
) -> None:
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"{heads=} do not divide among {key_heads=}")
    size = len(q_weight) if q_weight.ndim == 1 else 0
    if size < 2 or size % 2:
        raise ValueError(f"q_weight is {list(q_weight.shape)}, expected [A] with an even A")
    widths = ((heads + 2 * key_heads) * size, (heads + key_heads) * size)
    if qkv.ndim != 2 or qkv.shape[1] not in widths:
        raise ValueError(
            f"qkv is {list(qkv.shape)}, expected [T, {widths[0]}] or, without values, "
            f"[T, {widths[1]}]"
        )
    tokens, device = len(qkv), qkv.device
    expect("qkv", qkv, qkv.shape, FLOATS, device)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        expect(name, weight, (size,), FLOATS, device)
    for name, table in (("cosine", cosine), ("sine", sine)):
        expect(name, table, (tokens, size), FLOATS, device)
    if cosine.dtype != sine.dtype:
        raise ValueError(f"cosine is {cosine.dtype}, sine is {sine.dtype}: expected the same")
