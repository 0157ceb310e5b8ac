"""Routing to experts: the definition."""

import torch
from torch import Tensor


def route(
    scores: Tensor, per_expert_scale: Tensor, *, chosen: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ids, weights, order, place and tiles; see `infilld.kernels.route`.

    Source: transformers 5.23.0, DiffusionGemmaTextRouter.
    """
    tokens, experts = scores.shape
    scores = scores.float()
    ranked = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ids = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :chosen]
    weights = scores.softmax(-1).gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True) * per_expert_scale.float()[ids]

    expert_of = ids.flatten()
    order = expert_of.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    tiles = _tiles(torch.bincount(expert_of, minlength=experts), tokens * chosen, tile_rows)
    return ids, weights, order.int(), place.int(), tiles


def _tiles(rows_of: Tensor, routes: int, tile_rows: int) -> Tensor:
    """The tile list for experts with so many rows each [E]."""
    most = min(len(rows_of), routes) + routes // tile_rows
    tiles = torch.zeros(most, 3, dtype=torch.int32, device=rows_of.device)
    tiles[:, 0] = -1
    tiles_of = (rows_of + tile_rows - 1) // tile_rows
    expert = torch.repeat_interleave(tiles_of)  # of each tile
    used = len(expert)
    number = torch.arange(used, device=expert.device) - (tiles_of.cumsum(0) - tiles_of)[expert]
    before = number * tile_rows
    tiles[:used, 0] = expert
    tiles[:used, 1] = (rows_of.cumsum(0) - rows_of)[expert] + before
    tiles[:used, 2] = (rows_of[expert] - before).clamp(max=tile_rows)
    return tiles
