"""Acceptance within an entropy budget: the definition."""

import torch
from torch import Tensor

UNITS_PER_NAT = 2.0**40
# 2^10 nats in 2^-40 units, times 4096 positions, stays below 2^63.
LARGEST_NATS = 2.0**10
LARGEST_BUDGET_NATS = 2.0**22


def accept(
    entropy_nats: Tensor,
    proposal: Tensor,
    noise: Tensor,
    pinned: Tensor | None,
    pins: Tensor | None,
    *,
    budget_nats: float,
) -> tuple[Tensor, Tensor]:
    """Next canvas [R, L] int64 and accepted positions [R, L] bool; see `infilld.kernels.accept`.

    Source: arXiv 2505.24857; transformers 5.23.0, EntropyBoundSampler.accept_canvas.
    """
    free = torch.ones_like(proposal, dtype=torch.bool) if pinned is None else ~pinned
    entropy = entropy_nats.nan_to_num(nan=torch.inf, posinf=torch.inf).clamp(min=0.0)
    # Two stable sorts: by entropy, ties by position; then the pinned ones behind all others.
    by_entropy = entropy.sort(dim=-1, stable=True).indices
    behind = (~free).gather(-1, by_entropy).to(torch.int8).sort(dim=-1, stable=True).indices
    order = by_entropy.gather(-1, behind)

    ranked = entropy.gather(-1, order)
    units = (ranked.clamp(max=LARGEST_NATS) * UNITS_PER_NAT).to(torch.int64)
    before = units.cumsum(-1) - units
    budget = torch.tensor(budget_nats, dtype=torch.float32).clamp(max=LARGEST_BUDGET_NATS)
    within = (before <= (budget * UNITS_PER_NAT).to(torch.int64).item()) & ranked.isfinite()
    within[:, :1] = True  # the lowest always, whatever it is

    accepted = torch.empty_like(free).scatter_(-1, order, within) & free
    canvas = torch.where(accepted, proposal, noise)
    if pinned is not None and pins is not None:
        canvas = torch.where(pinned, pins, canvas)
    return canvas, accepted
