"""Routing to experts, for a CPU."""

from torch import Tensor


def route(scores: Tensor, per_expert_scale: Tensor, *, chosen: int) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, k]; see `infilld.kernels.route`.

    A softmax over the chosen is the softmax over all, renormalised.
    """
    best, ids = scores.sort(dim=-1, descending=True, stable=True)
    ids = ids[:, :chosen]
    scale = per_expert_scale.index_select(0, ids.flatten()).view(ids.shape)
    return ids, best[:, :chosen].softmax(-1) * scale
