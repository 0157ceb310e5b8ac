"""Routing: one launch chooses, a second gives every expert a program that lists its rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import require_gpu

BLOCK_TOKENS = 4
LARGEST_BLOCK_ROUTES = 1024
BLOCK_TILES = 128


@triton.jit
def choose_kernel(
    scores_ptr,
    scale_ptr,
    ids_ptr,
    weights_ptr,
    T,
    E,
    stride_t,
    stride_e,
    CHOSEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.arange(0, BLOCK_E)
    o_k = tl.arange(0, BLOCK_K)
    is_expert = o_e < E
    valid = (o_t < T)[:, None] & is_expert[None, :]
    at = o_t[:, None] * stride_t + o_e[None, :] * stride_e
    b_scores = tl.load(scores_ptr + at, mask=valid, other=float("-inf")).to(tl.float32)

    # NaN ranks as +inf, -0.0 as 0.0. As integers the bits of negative floats are ordered
    # backwards, those of others forwards.
    b_ranked = tl.where(b_scores == b_scores, b_scores, float("inf"))
    b_highest = tl.max(b_ranked, axis=1)
    b_bits = tl.where(b_ranked == 0.0, 0.0, b_ranked).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    lowest: tl.constexpr = -2147483648
    b_bits = tl.where(is_expert[None, :], b_bits, lowest)
    # A row of padding is -inf all over; subtracting it from itself would be NaN.
    b_highest = tl.where(o_t < T, b_highest, 0.0)
    b_shares = tl.exp(b_scores - b_highest[:, None])  # [BLOCK_T, BLOCK_E]
    b_shares = b_shares / tl.sum(b_shares, axis=1)[:, None]

    b_ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int64)
    b_weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for place in range(CHOSEN):
        _, b_id = tl.max(b_bits, axis=1, return_indices=True)  # of equals the first
        is_it = o_e[None, :] == b_id[:, None]
        b_share = tl.sum(tl.where(is_it, b_shares, 0.0), axis=1)
        here = o_k[None, :] == place
        b_ids = tl.where(here, b_id[:, None].to(tl.int64), b_ids)
        b_weights = tl.where(here, b_share[:, None], b_weights)
        b_bits = tl.where(is_it, lowest, b_bits)
    stored = (o_t < T)[:, None] & (o_k < CHOSEN)[None, :]
    b_scale = tl.load(scale_ptr + b_ids, mask=stored, other=0.0).to(tl.float32)
    b_weights = b_weights / tl.sum(b_weights, axis=1)[:, None] * b_scale
    to = o_t[:, None] * CHOSEN + o_k[None, :]
    tl.store(ids_ptr + to, b_ids, mask=stored)
    tl.store(weights_ptr + to, b_weights, mask=stored)


@triton.jit
def lists_kernel(
    ids_ptr,
    order_ptr,
    place_ptr,
    tiles_ptr,
    routes,
    E,
    most,
    TILE_ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    expert = tl.program_id(0)
    o_n = tl.arange(0, BLOCK_N)
    o_e = tl.arange(0, BINS)
    b_rows = tl.zeros((BINS,), tl.int32)
    for start in range(0, routes, BLOCK_N):
        # Padding is counted in a bin behind the experts.
        b_ids = tl.load(ids_ptr + start + o_n, mask=start + o_n < routes, other=E)
        b_rows += tl.histogram(b_ids.to(tl.int32), BINS)
    b_rows = tl.where(o_e < E, b_rows, 0)
    b_tiles = (b_rows + TILE_ROWS - 1) // TILE_ROWS
    rows = tl.sum(tl.where(o_e == expert, b_rows, 0), axis=0)
    rows_before = tl.sum(tl.where(o_e < expert, b_rows, 0), axis=0)
    tiles_before = tl.sum(tl.where(o_e < expert, b_tiles, 0), axis=0)
    tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
    # The first program writes the unused tiles, the others see none.
    first_unused = tl.where(expert == 0, tl.sum(b_tiles, axis=0), most)

    row = rows_before
    for start in range(0, routes, BLOCK_N):
        o_route = start + o_n
        b_ids = tl.load(ids_ptr + o_route, mask=o_route < routes, other=E)
        is_mine = b_ids == expert
        b_mine = is_mine.to(tl.int32)
        b_row = row + tl.cumsum(b_mine, axis=0) - 1
        tl.store(order_ptr + b_row, o_route, mask=is_mine)
        tl.store(place_ptr + o_route, b_row, mask=is_mine)
        row += tl.sum(b_mine, axis=0)

    for start in range(0, most, BLOCK_TILES):
        o_tile = start + tl.arange(0, BLOCK_TILES)
        b_done = (o_tile - tiles_before) * TILE_ROWS
        is_mine = (o_tile >= tiles_before) & (o_tile < tiles_before + tiles)
        tl.store(tiles_ptr + o_tile * 3, tl.where(is_mine, expert, -1), mask=is_mine)
        tl.store(tiles_ptr + o_tile * 3 + 1, rows_before + b_done, mask=is_mine)
        tl.store(tiles_ptr + o_tile * 3 + 2, tl.minimum(rows - b_done, TILE_ROWS), mask=is_mine)
        is_unused = (o_tile >= first_unused) & (o_tile < most)
        tl.store(tiles_ptr + o_tile * 3, -1, mask=is_unused)
        tl.store(tiles_ptr + o_tile * 3 + 1, 0, mask=is_unused)
        tl.store(tiles_ptr + o_tile * 3 + 2, 0, mask=is_unused)


def route(
    scores: Tensor, per_expert_scale: Tensor, *, chosen: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Ids, weights, order, place and tiles; see `infilld.kernels.route`.

    Raises:
        KernelUnavailable: no CUDA device.
    """
    require_gpu("route", scores, per_expert_scale)
    tokens, experts = scores.shape
    routes, device = tokens * chosen, scores.device
    most = min(experts, routes) + routes // tile_rows
    ids = torch.empty(tokens, chosen, dtype=torch.int64, device=device)
    weights = torch.empty(tokens, chosen, dtype=torch.float32, device=device)
    order = torch.empty(routes, dtype=torch.int32, device=device)
    place = torch.empty(routes, dtype=torch.int32, device=device)
    tiles = torch.empty(most, 3, dtype=torch.int32, device=device)
    if routes == 0:
        return ids, weights, order, place, tiles
    choose_kernel[(triton.cdiv(tokens, BLOCK_TOKENS),)](
        scores,
        per_expert_scale.contiguous(),
        ids,
        weights,
        tokens,
        experts,
        scores.stride(0),
        scores.stride(1),
        CHOSEN=chosen,
        BLOCK_T=BLOCK_TOKENS,
        BLOCK_E=max(16, triton.next_power_of_2(experts)),
        BLOCK_K=triton.next_power_of_2(chosen),
        num_warps=BLOCK_TOKENS,
    )
    lists_kernel[(experts,)](
        ids,
        order,
        place,
        tiles,
        routes,
        experts,
        most,
        TILE_ROWS=tile_rows,
        # One bin more than experts, for padding.
        BINS=max(32, triton.next_power_of_2(experts + 1)),
        BLOCK_N=min(max(16, triton.next_power_of_2(routes)), LARGEST_BLOCK_ROUTES),
        BLOCK_TILES=BLOCK_TILES,
        num_warps=4,
    )
    return ids, weights, order, place, tiles
