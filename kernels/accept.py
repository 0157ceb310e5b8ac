"""Which canvas positions keep their proposal in a denoising step."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from infilld.kernels._launch import require_triton


class Accepted(NamedTuple):
    """The next canvas.

    Attributes:
        canvas: [R, L] int64. accepted: positions that took the proposal [R, L] bool.
    """

    canvas: Tensor
    accepted: Tensor


def accept(
    entropy_nats: Tensor,
    proposal: Tensor,
    noise: Tensor,
    pinned: Tensor | None,
    pins: Tensor | None,
    *,
    budget_nats: float,
    impl: Literal["gpu", "reference"],
) -> Accepted:
    """Accept the most certain positions of each row, re-noise the others, impose the pins.

    The positions that are not pinned are ranked by entropy, equal entropies by position. A
    position is accepted while the entropies ranked before it sum to the budget or less, so the
    first one always is. Accepted positions take the proposal, all others the noise; pinned ones
    take their pin, are never accepted and spend no budget.

    The sum is exact in units of 2^-40 nats (each entropy rounded down, the budget first to
    float32): it does not depend on the order of additions, so that every implementation decides
    alike. An entropy below 0, which rounding can leave, counts as 0. NaN counts as +inf, and +inf
    is accepted only where it is ranked first, that is, where the whole row is like that. Finite
    entropies above 1024 nats are ranked as they are and summed as 1024.

    Args:
        entropy_nats: [R, L] float32.
        proposal: [R, L] int64.
        noise: [R, L] int64.
        pinned: [R, L] bool, or None: nothing is pinned.
        pins: [R, L] int64, read where `pinned` is True; None exactly when `pinned` is.
        budget_nats: 0 or more; infinity accepts every finite entropy.
        impl: implementation; nothing falls back to another one.

    Returns:
        New tensors; the arguments are not changed.

    Raises:
        ValueError: shapes, dtypes, devices or the budget are not as above.
        KernelUnavailable: this implementation cannot run here.

    Source: arXiv 2505.24857 (entropy bound); transformers 5.23.0, EntropyBoundSampler.
    Differs: pins; and the reference rounds every partial sum to float32.
    """
    _check(entropy_nats, proposal, noise, pinned, pins, budget_nats)
    if impl == "gpu":
        require_triton("accept")
        from infilld.kernels.gpu.accept import accept as run
    elif impl == "reference":
        from infilld.kernels.reference.accept import accept as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    return Accepted(*run(entropy_nats, proposal, noise, pinned, pins, budget_nats=budget_nats))


def _check(
    entropy_nats: Tensor,
    proposal: Tensor,
    noise: Tensor,
    pinned: Tensor | None,
    pins: Tensor | None,
    budget_nats: float,
) -> None:
    if (pinned is None) != (pins is None):
        raise ValueError("pinned and pins belong together: give both or neither")
    if math.isnan(budget_nats) or budget_nats < 0:
        raise ValueError(f"{budget_nats=}: expected 0 or more")
    expected = {
        "entropy_nats": (entropy_nats, torch.float32),
        "proposal": (proposal, torch.int64),
        "noise": (noise, torch.int64),
        "pinned": (pinned, torch.bool),
        "pins": (pins, torch.int64),
    }
    for name, (tensor, dtype) in expected.items():
        if tensor is None:
            continue
        if tensor.ndim != 2 or tensor.shape != entropy_nats.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, expected [R, L] = {list(entropy_nats.shape)}"
            )
        if tensor.dtype != dtype or tensor.device != entropy_nats.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, "
                f"expected {dtype} on {entropy_nats.device}"
            )
