"""Which experts a token goes to, and the lists by which experts find their tokens."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from infilld.kernels._launch import require_triton

# Rows that one tile of an expert's matmul takes at most.
TILE_ROWS = 64


class Routes(NamedTuple):
    """T tokens on their way to k experts each.

    A route is a token and one of its experts: number t * k + place among its experts.

    Attributes:
        ids: [T, k] int64, experts of a token, by falling score.
        weights: [T, k] float32, renormalised over the chosen, times the expert's scale.
        order: [T * k] int32, routes sorted by expert; those of one expert by number.
        place: [T * k] int32, inverse of `order`: where a route stands among the sorted rows.
        tiles: [min(E, T * k) + T * k // 64, 3] int32: expert, first sorted row, rows (1 to 64).
            By expert; those of one expert by row, full ones first. Unused ones come last and are
            (-1, 0, 0).
    """

    ids: Tensor
    weights: Tensor
    order: Tensor
    place: Tensor
    tiles: Tensor


def route(
    scores: Tensor,
    per_expert_scale: Tensor,
    *,
    chosen: int,
    impl: Literal["gpu", "reference"],
) -> Routes:
    """Choose each token's experts and sort the routes by expert.

    Experts are ranked by their score in float32, equal scores by lower id; NaN ranks as +inf and
    makes the token's weights NaN. Weights are the softmax over all experts in float32, divided by
    its sum over the chosen ones, times the scale of each.

    Args:
        scores: [T, E] float32 or bfloat16, the router's logits; T may be 0.
        per_expert_scale: [E], floating point.
        chosen: k, experts of a token, 1 to E.
        impl: implementation; nothing falls back to another one.

    Raises:
        ValueError: shapes, dtypes, devices or `chosen` are not as above.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, DiffusionGemmaTextRouter. Differs: it ranks probabilities and
        leaves ties open.
    """
    _check(scores, per_expert_scale, chosen)
    if impl == "gpu":
        require_triton("route")
        from infilld.kernels.gpu.route import route as run
    elif impl == "reference":
        from infilld.kernels.reference.route import route as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    return Routes(*run(scores, per_expert_scale, chosen=chosen, tile_rows=TILE_ROWS))


def _check(scores: Tensor, per_expert_scale: Tensor, chosen: int) -> None:
    if scores.ndim != 2 or scores.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"scores are {scores.dtype} {list(scores.shape)}, expected float32 or bfloat16 [T, E]"
        )
    experts = scores.shape[1]
    if per_expert_scale.shape != (experts,) or not per_expert_scale.is_floating_point():
        raise ValueError(
            f"per_expert_scale is {per_expert_scale.dtype} {list(per_expert_scale.shape)}, "
            f"expected floating point [E] = {[experts]}"
        )
    if per_expert_scale.device != scores.device:
        raise ValueError(
            f"per_expert_scale is on {per_expert_scale.device}, scores are on {scores.device}"
        )
    if not 1 <= chosen <= experts:
        raise ValueError(f"{chosen=}: expected 1 to {experts} experts")
