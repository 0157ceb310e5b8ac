"""Causal attention of a prefix's new tokens, split over the keys; stores the new keys."""

from torch import Tensor

from infilld.kernels.gpu._attention import attend


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
) -> Tensor:
    """[R, T, H * A] in the type of q; see `infilld.kernels.prefix_attention`.

    Raises:
        KernelUnavailable: no CUDA device, a head size or type that the kernel does not take.
        ValueError: the slots' strides differ, or numbers of a position are not side by side.
    """
    return attend(
        "prefix_attention",
        q,
        k,
        v,
        past_keys,
        past_values,
        slot,
        count,
        count,
        count,
        causal=True,
        window=window,
        writes=writes,
    )
