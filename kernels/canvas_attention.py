"""Attention of canvases over stored prefixes and over themselves."""

from typing import Literal

from torch import Tensor

from infilld.kernels._expect import CACHED, FLOATS, INDEX, expect
from infilld.kernels._launch import require_triton


def canvas_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    slots: Tensor,
    first: Tensor,
    count: Tensor,
    lengths: Tensor,
    *,
    impl: Literal["gpu", "reference"],
) -> Tensor:
    """Every position of a canvas sees a range of one stored prefix and its whole canvas.

    Row r attends to `past[slots[r], :, first[r] : first[r] + count[r]]` and to its own first
    `lengths[r]` positions, without a mask and without a scale. Query head h reads key head
    h // (H / K). Positions from `lengths[r]` on give zeros. What lies outside the range of the
    prefix or past the length of a canvas has no influence, even if it is NaN.

    The softmax and both products are float32, of float64 inputs float64.

    Args:
        q: [R, L, H, A]. k: [R, L, K, A]. v: [R, L, K, A]. One type.
        past_keys: [S, K, C, A], S slots of C positions; the type of q, another floating type, or
            float8_e4m3fn, which is taken as it is, without a scale. past_values: as past_keys.
        slots: [R] int32, in [0, S) where `count` is not 0. first: [R] int32, 0 or more.
        count: [R] int32, 0 or more; `first + count <= C`. lengths: [R] int32, in [0, L].
            The gpu implementation cannot check these values: it never waits for the device.
        impl: implementation; nothing falls back to another one.

    Returns:
        [R, L, H * A] in the type of q.

    Raises:
        ValueError: shapes, types or devices are not as above; the reference checks the values too.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, models/diffusion_gemma; arXiv 2205.14135 (softmax in one pass).
    """
    _check(q, k, v, past_keys, past_values, slots, first, count, lengths)
    if impl == "gpu":
        require_triton("canvas_attention")
        from infilld.kernels.gpu.canvas_attention import canvas_attention as run
    elif impl == "reference":
        from infilld.kernels.reference.canvas_attention import canvas_attention as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    return run(q, k, v, past_keys, past_values, slots, first, count, lengths)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    slots: Tensor,
    first: Tensor,
    count: Tensor,
    lengths: Tensor,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or past_keys.ndim != 4:
        raise ValueError("expected q [R, L, H, A], k [R, L, K, A] and past_keys [S, K, C, A]")
    rows, tokens, heads, size = q.shape
    key_heads = k.shape[2]
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"{heads} query heads do not divide among {key_heads} key heads")
    expect("q", q, q.shape, FLOATS, q.device)
    expect("k", k, (rows, tokens, key_heads, size), (q.dtype,), q.device)
    expect("v", v, k.shape, (q.dtype,), q.device)
    slabs, _, capacity, _ = past_keys.shape
    expect("past_keys", past_keys, (slabs, key_heads, capacity, size), CACHED, q.device)
    expect("past_values", past_values, past_keys.shape, (past_keys.dtype,), q.device)
    indices = {"slots": slots, "first": first, "count": count, "lengths": lengths}
    for name, tensor in indices.items():
        expect(name, tensor, (rows,), INDEX, q.device)
