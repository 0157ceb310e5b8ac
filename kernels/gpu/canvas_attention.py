"""Attention of canvases over stored prefixes and over themselves, split over the keys."""

from torch import Tensor

from infilld.kernels.gpu._attention import attend


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
) -> Tensor:
    """[R, L, H * A] in the type of q; see `infilld.kernels.canvas_attention`.

    Raises:
        KernelUnavailable: no CUDA device, a head size or type that the kernel does not take.
        ValueError: the slots' strides differ, or numbers of a position are not side by side.
    """
    return attend(
        "canvas_attention",
        q,
        k,
        v,
        past_keys,
        past_values,
        slots,
        first,
        count,
        lengths,
        causal=False,
        window=None,
        writes=False,
    )
