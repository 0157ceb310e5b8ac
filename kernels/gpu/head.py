"""Reading the output head: a lean matmul that keeps statistics, then one program a position.

Of a position's V scores the first launch keeps, for each tile of 128 tokens, the highest score and
two sums, and the logits in 16 bits. The second one finds the tiles and the tokens that matter from
those, and computes their scores again in float32: what is decided does not depend on the 16 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable, is_interpreted, require_gpu

TILE_TOKENS = 128
LARGEST_TOP = 64
LARGEST_VOCAB = 2**20
# Positions whose 16-bit logits are held at once: 128 MB for 262,144 tokens.
CHUNK_ROWS = 256
# Candidates whose scores are computed again, for each token that is asked.
CANDIDATES_A_TOKEN = 2
FEWEST_CANDIDATES = 16
MIN_INT64 = tl.constexpr(-(2**63))


@triton.jit
def tanh(x):
    # An infinite exponential gives 1, one of 0 gives -1, NaN stays.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def rank_bits(x):
    # Integers in the order of the floats; NaN ranks as +inf, -0.0 as 0.0.
    x = tl.where(x == x, x, float("inf"))
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def reached_at(units, share):
    # First index at which the units so far reach a share in (0, 1] of all of them.
    reached = tl.cumsum(units, axis=0)
    total = tl.sum(units, axis=0).to(tl.float64)
    point = tl.maximum(tl.ceil(share * total).to(tl.int64), 1)
    return tl.sum((reached < point).to(tl.int32), axis=0)


# Positions differ from call to call; a variant for each kind of number would gain nothing.
@triton.jit(do_not_specialize=["T", "stride_stat"])
def score_kernel(
    hidden_ptr,
    embedding_ptr,
    temperature_ptr,
    banned_ptr,
    ban_row_ptr,
    codes_ptr,
    stats_ptr,
    T,
    V,
    D,
    stride_t,
    stride_v,
    stride_ban,
    stride_stat,
    tiles,
    softcap,
    BANNED: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # Positions run fastest: the programs that read the same tokens run side by side.
    i_tile = tl.program_id(1)
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_v = i_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    o_d = tl.arange(0, BLOCK_D)
    is_token = o_v < V
    # Past the end the last one is read again: no load of the loop needs a mask.
    o_row = tl.minimum(o_t, T - 1).to(tl.int64)
    o_token = tl.minimum(o_v, V - 1).to(tl.int64)
    p_hidden = hidden_ptr + o_row[:, None] * stride_t + o_d[None, :]
    p_embedding = embedding_ptr + o_token[None, :] * stride_v + o_d[:, None]
    b_score = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            b_hidden = tl.load(p_hidden + start)
            b_embedding = tl.load(p_embedding + start)
        else:
            is_inside = o_d < D - start
            b_hidden = tl.load(p_hidden + start, mask=is_inside[None, :], other=0.0)
            b_embedding = tl.load(p_embedding + start, mask=is_inside[:, None], other=0.0)
        if INTERPRET:
            b_hidden = b_hidden.to(tl.float32)
            b_embedding = b_embedding.to(tl.float32)
        b_score = tl.dot(b_hidden, b_embedding, b_score, input_precision="ieee")

    is_row = o_t < T
    is_in = is_token[None, :]
    if BANNED:
        # Not the clamped numbers: neighbours that are seen to be neighbours are loaded together.
        p_ban = banned_ptr + (tl.load(ban_row_ptr + o_row) * stride_ban)[:, None] + o_v[None, :]
        is_in = tl.load(p_ban, mask=is_in, other=1) == 0
    b_score = tl.where(is_in, b_score, float("-inf"))
    b_highest = tl.max(b_score, axis=1)
    per_cap = 1.0 / softcap
    # Between -1 and 1; below that, what may not be taken. A mask would take as many registers.
    b_capped = tl.where(b_score == float("-inf"), -2.0, tanh(b_score * per_cap))
    # 16 bits for tanh; NaN has no code and needs none.
    b_code = tl.floor(b_capped * 32767.0 + 0.5)
    b_code = tl.where(b_capped >= -1.0, b_code, -32768.0).to(tl.int16)
    p_codes = codes_ptr + (i_tile.to(tl.int64) * T + o_t)[:, None] * BLOCK_V
    tl.store(p_codes + tl.arange(0, BLOCK_V)[None, :], b_code, mask=is_row[:, None])

    # Relative to the tile's highest logit, which is finite where the tile has none.
    b_scale = softcap / tl.load(temperature_ptr + o_row)  # [BLOCK_T]
    b_below = (b_capped - tanh(b_highest * per_cap)[:, None]) * b_scale[:, None]
    b_weight = tl.where(b_capped == -2.0, 0.0, tl.exp(b_below))
    p_stats = stats_ptr + o_row * tiles + i_tile
    tl.store(p_stats, b_highest, mask=is_row)
    tl.store(p_stats + stride_stat, tl.sum(b_weight, axis=1), mask=is_row)
    tl.store(p_stats + 2 * stride_stat, tl.sum(b_weight * b_below, axis=1), mask=is_row)


@triton.jit(do_not_specialize=["T", "stride_stat"])
def read_kernel(
    hidden_ptr,
    embedding_ptr,
    temperature_ptr,
    banned_ptr,
    ban_row_ptr,
    targets_ptr,
    uniforms_ptr,
    codes_ptr,
    stats_ptr,
    argmax_ptr,
    log_probability_ptr,
    entropy_ptr,
    top_ids_ptr,
    top_probabilities_ptr,
    sample_ptr,
    target_log_ptr,
    T,
    V,
    D,
    stride_t,
    stride_v,
    stride_ban,
    stride_stat,
    tiles,
    softcap,
    TOP: tl.constexpr,
    BANNED: tl.constexpr,
    UNBANNED_TOO: tl.constexpr,
    SAMPLED: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    KEPT_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    scale = softcap / tl.load(temperature_ptr + i_t)
    nan = float("nan")

    # The distribution from the tiles: masses relative to the most probable token.
    o_tile = tl.arange(0, BLOCK_TILES)
    is_tile = o_tile < tiles
    p_stats = stats_ptr + i_t * tiles + o_tile
    b_highest = tl.load(p_stats, mask=is_tile, other=float("-inf"))
    b_sum = tl.load(p_stats + stride_stat, mask=is_tile, other=0.0)
    b_mean = tl.load(p_stats + 2 * stride_stat, mask=is_tile, other=0.0)
    logit = tanh(tl.max(b_highest, axis=0) / softcap)
    b_below = (tanh(b_highest / softcap) - logit) * scale
    b_factor = tl.exp(b_below)
    b_mass = b_sum * b_factor
    total = tl.sum(b_mass, axis=0)
    total = tl.where(total == 0.0, nan, total)  # everything is banned
    entropy = tl.log(total) - tl.sum((b_mean + b_below * b_sum) * b_factor, axis=0) / total
    # Rounding may go below 0; NaN must stay.
    tl.store(entropy_ptr + i_t, tl.where(entropy < 0.0, 0.0, entropy))
    log_total = logit * scale + tl.log(total)

    # The best tokens lie in as many tiles: those with the highest scores, of equals the first.
    # All keys differ, and a loop of maxima is a hundredth of a sorting network's code.
    b_key = (rank_bits(b_highest).to(tl.int64) << 32) | (0x7FFFFFFF - o_tile).to(tl.int64)
    o_kept = tl.arange(0, KEPT_TILES)
    b_tile = tl.zeros((KEPT_TILES,), tl.int64)
    last = tl.max(b_key, axis=0) + 1
    for i in range(KEPT_TILES):
        last = tl.max(tl.where(b_key < last, b_key, MIN_INT64), axis=0)
        b_tile = tl.where(o_kept == i, 0x7FFFFFFF - (last & 0xFFFFFFFF), b_tile)
    o_within = tl.arange(0, BLOCK_V)
    p_codes = codes_ptr + (b_tile[:, None] * T + i_t) * BLOCK_V + o_within[None, :]
    b_code = tl.load(p_codes, mask=(b_tile < tiles)[:, None], other=-32768).to(tl.int64)
    b_key = (b_code << 32) | (0x7FFFFFFF - (b_tile[:, None] * BLOCK_V + o_within[None, :]))
    o_c = tl.arange(0, CANDIDATES)
    b_id = tl.zeros((CANDIDATES,), tl.int64)
    last = tl.max(tl.max(b_key, axis=1), axis=0) + 1
    for i in range(CANDIDATES):
        b_below_last = tl.where(b_key < last, b_key, MIN_INT64)
        last = tl.max(tl.max(b_below_last, axis=1), axis=0)
        b_id = tl.where(o_c == i, 0x7FFFFFFF - (last & 0xFFFFFFFF), b_id)

    # Their scores in float32, added in the same order for each: equal rows are equal.
    o_d = tl.arange(0, BLOCK_D)
    o_row = tl.minimum(b_id, V - 1)  # [CANDIDATES]
    b_products = tl.zeros((CANDIDATES, BLOCK_D), tl.float32)
    b_target = tl.zeros((BLOCK_D,), tl.float32)
    if TARGETS:
        p_target = embedding_ptr + tl.load(targets_ptr + i_t) * stride_v
    for start in range(0, D, BLOCK_D):
        is_inside = start + o_d < D
        b_hidden = tl.load(hidden_ptr + i_t * stride_t + start + o_d, mask=is_inside, other=0.0)
        b_hidden = b_hidden.to(tl.float32)
        p_rows = embedding_ptr + o_row[:, None] * stride_v + start + o_d[None, :]
        b_rows = tl.load(p_rows, mask=is_inside[None, :], other=0.0)
        b_products += b_rows.to(tl.float32) * b_hidden[None, :]
        if TARGETS:
            b_row = tl.load(p_target + start + o_d, mask=is_inside, other=0.0)
            b_target += b_row.to(tl.float32) * b_hidden
    b_score = tl.sum(b_products, axis=1)
    is_out = b_id >= V
    if BANNED:
        p_ban = banned_ptr + tl.load(ban_row_ptr + i_t) * stride_ban + o_row
        is_out = is_out | (tl.load(p_ban) != 0)
    b_score = tl.where(is_out, float("-inf"), b_score)
    b_key = (rank_bits(b_score).to(tl.int64) << 32) | (0x7FFFFFFF - b_id)
    b_rank = tl.sum((b_key[None, :] > b_key[:, None]).to(tl.int32), axis=1)
    b_log = tanh(b_score / softcap) * scale - log_total
    b_log = tl.where(b_log > 0.0, 0.0, b_log)
    b_log = tl.where(b_score == float("-inf"), float("-inf"), b_log)
    b_log = tl.where(total == total, b_log, nan)
    tl.store(top_ids_ptr + i_t * TOP + b_rank, b_id, mask=b_rank < TOP)
    tl.store(top_probabilities_ptr + i_t * TOP + b_rank, tl.exp(b_log), mask=b_rank < TOP)
    tl.store(argmax_ptr + i_t + b_rank, b_id, mask=b_rank == 0)
    tl.store(log_probability_ptr + i_t + b_rank, b_log, mask=b_rank == 0)

    if SAMPLED:
        # The tile by its share of the mass, then the token by its share of the tile.
        b_units = (tl.where(b_mass == b_mass, b_mass, 0.0) * 1099511627776.0).to(tl.int64)
        uniform = tl.load(uniforms_ptr + i_t * 2).to(tl.float64)
        tile = tl.minimum(reached_at(b_units, 1.0 - uniform), tiles - 1)
        p_codes = codes_ptr + (tile.to(tl.int64) * T + i_t) * BLOCK_V + o_within
        b_code = tl.load(p_codes).to(tl.int32)
        b_below = (b_code - tl.max(b_code, axis=0)).to(tl.float32) / 32767.0 * scale
        b_weight = tl.where(b_code == -32768, 0.0, tl.exp(b_below))
        uniform = tl.load(uniforms_ptr + i_t * 2 + 1).to(tl.float64)
        within = reached_at((b_weight * 1099511627776.0).to(tl.int64), 1.0 - uniform)
        drawn = tile.to(tl.int64) * BLOCK_V + tl.minimum(within, BLOCK_V - 1)
        best = tl.sum(tl.where(b_rank == 0, b_id, 0), axis=0)
        tl.store(sample_ptr + i_t, tl.where(total == total, drawn, best))
    if TARGETS:
        if UNBANNED_TOO:
            p_free = p_stats + 3 * stride_stat
            b_highest = tl.load(p_free, mask=is_tile, other=float("-inf"))
            b_sum = tl.load(p_free + stride_stat, mask=is_tile, other=0.0)
            logit = tanh(tl.max(b_highest, axis=0) / softcap)
            b_below = (tanh(b_highest / softcap) - logit) * scale
            log_total = logit * scale + tl.log(tl.sum(b_sum * tl.exp(b_below), axis=0))
        target_log = tanh(tl.sum(b_target, axis=0) / softcap) * scale - log_total
        tl.store(target_log_ptr + i_t, tl.where(target_log > 0.0, 0.0, target_log))


def head(
    hidden: Tensor,
    embedding: Tensor,
    *,
    softcap: float,
    temperature: Tensor,
    top: int,
    banned: Tensor | None,
    ban_row: Tensor | None,
    targets: Tensor | None,
    uniforms: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The fields of a reading; see `infilld.kernels.head`.

    Raises:
        KernelUnavailable: no CUDA device, or more tokens are asked than one program sorts.
    """
    require_gpu("head", hidden, embedding)
    (tokens, width), vocab, device = hidden.shape, len(embedding), hidden.device
    if top > LARGEST_TOP or vocab > LARGEST_VOCAB:
        raise KernelUnavailable(
            f"head: the {top} best of {vocab} tokens are asked, "
            f"this kernel takes {LARGEST_TOP} of {LARGEST_VOCAB}"
        )
    log_probability = torch.empty(tokens, device=device)
    entropy = torch.empty(tokens, device=device)
    argmax = torch.empty(tokens, dtype=torch.int64, device=device)
    top_ids = torch.empty(tokens, top, dtype=torch.int64, device=device)
    top_probabilities = torch.empty(tokens, top, device=device)
    sample = None if uniforms is None else torch.empty_like(argmax)
    target_log = None if targets is None else torch.empty_like(entropy)
    if tokens == 0:
        return argmax, log_probability, entropy, top_ids, top_probabilities, sample, target_log

    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    if banned is not None and banned.stride(1) != 1:
        banned = banned.contiguous()
    temperature = temperature.contiguous()
    ban_row, targets, uniforms = (
        None if each is None else each.contiguous() for each in (ban_row, targets, uniforms)
    )
    step = min(tokens, CHUNK_ROWS)
    tiles = triton.cdiv(vocab, TILE_TOKENS)
    unbanned_too = banned is not None and targets is not None
    codes = torch.empty(tiles * step * TILE_TOKENS, dtype=torch.int16, device=device)
    stats = torch.empty(6 if unbanned_too else 3, step, tiles, device=device)
    kept = max(2, triton.next_power_of_2(top))
    block_d = 32 if hidden.dtype == torch.float32 else 64
    for at in range(0, tokens, step):
        part = slice(at, min(at + step, tokens))
        count = part.stop - at
        block_t = min(max(16, triton.next_power_of_2(count)), 128)
        given = (
            hidden[part],
            embedding,
            temperature[part],
            # What is not read needs a pointer all the same.
            codes if banned is None else banned,
            codes if ban_row is None else ban_row[part],
        )
        shape = (
            count,
            vocab,
            width,
            hidden.stride(0),
            embedding.stride(0),
            0 if banned is None else banned.stride(0),
            stats.stride(0),
            tiles,
            softcap,
        )
        # Targets are read from the distribution without bans: a launch of its own, before the one
        # whose codes are read.
        for is_banned in (False, True) if unbanned_too else (banned is not None,):
            score_kernel[(triton.cdiv(count, block_t), tiles)](
                *given,
                codes,
                stats[3:] if unbanned_too and not is_banned else stats,
                *shape,
                BANNED=is_banned,
                EVEN_D=width % block_d == 0,
                BLOCK_T=block_t,
                BLOCK_V=TILE_TOKENS,
                BLOCK_D=block_d,
                INTERPRET=is_interpreted(),
                num_warps=4 if block_t < 64 else 8,
                num_stages=3,
            )
        read_kernel[(count,)](
            *given,
            codes if targets is None else targets[part],
            codes if uniforms is None else uniforms[part],
            codes,
            stats,
            argmax[part],
            log_probability[part],
            entropy[part],
            top_ids[part],
            top_probabilities[part],
            argmax if sample is None else sample[part],
            entropy if target_log is None else target_log[part],
            *shape,
            TOP=top,
            BANNED=banned is not None,
            UNBANNED_TOO=unbanned_too,
            SAMPLED=uniforms is not None,
            TARGETS=targets is not None,
            BLOCK_V=TILE_TOKENS,
            BLOCK_TILES=max(kept, triton.next_power_of_2(tiles)),
            KEPT_TILES=kept,
            CANDIDATES=max(CANDIDATES_A_TOKEN * kept, FEWEST_CANDIDATES),
            BLOCK_D=512 if kept <= 8 else 128,
            num_warps=8,
        )
    return argmax, log_probability, entropy, top_ids, top_probabilities, sample, target_log
