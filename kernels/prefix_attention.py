"""Causal attention of a prefix's new tokens over the stored ones and over themselves."""

from typing import Literal

from torch import Tensor

from infilld.kernels._expect import CACHED, FLOATS, INDEX, expect
from infilld.kernels._launch import require_triton


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    slot: Tensor,
    count: Tensor,
    *,
    window: int | None,
    writes: bool,
    impl: Literal["gpu", "reference"],
) -> Tensor:
    """New tokens see what is stored before them and, causally, each other.

    `count` positions are valid in the slot, the new tokens follow them. A token sees itself and
    everything before it; with a window only itself and the `window - 1` positions before it. There
    is no scale. What lies outside has no influence, even if it is NaN. The keys and values of the
    new tokens are read from `k` and `v` and not from the slot, so `writes` changes no result and a
    narrow cache rounds only what is read from it later.

    The softmax and both products are float32, of float64 inputs float64.

    Args:
        q: [R, T, H, A]. k: [R, T, K, A]. v: [R, T, K, A]. One type. R rows of new tokens, each
            behind its own prefix; a lone row may leave R out: [T, ...]. T may be 0.
        past_keys: [S, K, C, A], S slots of C positions; the type of q, another floating type, or
            float8_e4m3fn, which is taken as it is, without a scale. past_values: as past_keys.
        slot: [R] int32, in [0, S), no two alike where `writes` is set. count: [R] int32, 0 or more;
            `count <= C`, and `count + T <= C` where `writes` is set. The gpu implementation cannot
            check these values: it never waits for the device.
        window: positions that a token sees, itself included, 1 or more; None: all.
        writes: also store k and v as positions `[count, count + T)` of the slot, in the type of
            the cache; what float8_e4m3fn cannot hold becomes +-448.
        impl: implementation; nothing falls back to another one.

    Returns:
        [R, T, H * A] in the type of q, without R where q has none.

    Raises:
        ValueError: shapes, types, devices or the window are not as above; the reference checks
            the values too.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, models/diffusion_gemma; arXiv 2205.14135 (softmax in one pass).
    """
    _check(q, k, v, past_keys, past_values, slot, count, window)
    if impl == "gpu":
        require_triton("prefix_attention")
        from infilld.kernels.gpu.prefix_attention import prefix_attention as run
    elif impl == "reference":
        from infilld.kernels.reference.prefix_attention import prefix_attention as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    is_lone = q.ndim == 3
    if is_lone:
        q, k, v = q[None], k[None], v[None]
    out = run(q, k, v, past_keys, past_values, slot, count, window=window, writes=writes)
    return out[0] if is_lone else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    slot: Tensor,
    count: Tensor,
    window: int | None,
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"{window=}: expected 1 or more, or None")
    if q.ndim not in (3, 4) or k.ndim != q.ndim or past_keys.ndim != 4:
        raise ValueError("expected q [R, T, H, A], k [R, T, K, A] and past_keys [S, K, C, A]")
    *rows, _, heads, size = q.shape
    key_heads = k.shape[-2]
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"{heads} query heads do not divide among {key_heads} key heads")
    expect("q", q, q.shape, FLOATS, q.device)
    expect("k", k, (*q.shape[:-2], key_heads, size), (q.dtype,), q.device)
    expect("v", v, k.shape, (q.dtype,), q.device)
    slabs, _, capacity, _ = past_keys.shape
    expect("past_keys", past_keys, (slabs, key_heads, capacity, size), CACHED, q.device)
    expect("past_values", past_values, past_keys.shape, (past_keys.dtype,), q.device)
    expect("slot", slot, rows or (1,), INDEX, q.device)
    expect("count", count, slot.shape, INDEX, q.device)
