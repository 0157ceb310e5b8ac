"""Attention over stored and own keys, split over the keys, for canvases and for prefixes.

A program has a tile of rows, the query heads of one key head for a few tokens, and goes through
its share of the keys: first stored ones, then the tokens' own. Where there is more than one share
it leaves a partial result, and a second kernel joins them.
"""

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable, is_interpreted, require_gpu
from infilld.kernels.gpu._types import refuse_float64

LOG2_E = tl.constexpr(1.4426950408889634)
# E4M3 bits, shifted to the places of a float32, are a number 2^120 times too small.
E4M3_STEP = tl.constexpr(2.0**120)

HEAD_SIZES = (16, 32, 64, 128, 256, 512)
# Key tiles of a share, at the least: starting and joining a share costs about as much.
LEAST_TILES = 4
# Shares are as many as fill the device this often.
WAVES = 2
# What the interpreter pretends to have, so that small tests have several shares.
INTERPRETED_PROCESSORS = 16


@triton.jit
def from_e4m3(b_code):
    """Float32 values of E4M3 bytes. By bits, because no type of Triton's is one on sm_80."""
    b_code = b_code.to(tl.int32)
    b_bits = ((b_code & 0x80) << 24) | ((b_code & 0x7F) << 20)
    b_value = b_bits.to(tl.float32, bitcast=True) * E4M3_STEP
    return tl.where((b_code & 0x7F) == 0x7F, float("nan"), b_value)


@triton.jit
def to_e4m3(b_value):
    """E4M3 bytes of float32 values, rounded to the nearest, ties to even, at most +-448."""
    b_bits = b_value.to(tl.int32, bitcast=True)
    b_size = tl.minimum(tl.abs(b_value), 448.0)
    b_size_bits = b_size.to(tl.int32, bitcast=True)
    b_code = ((b_size_bits + 0x7FFFF + ((b_size_bits >> 20) & 1)) >> 20) - 960
    # Below 2^-6 codes are multiples of 2^-9; adding 2^23 rounds to whole ones.
    b_small = (b_size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    b_code = tl.where(b_size < 0.015625, b_small, b_code)
    b_code = tl.where(b_value == b_value, b_code, 0x7F)
    return (b_code | ((b_bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _tile(pointer, o_in, valid, TYPE: tl.constexpr, FP8: tl.constexpr):
    """A tile [BLOCK_N, A] in TYPE. What is not valid may be NaN in memory and is 0 here."""
    b_tile = tl.load(pointer + o_in, mask=valid[:, None], other=0)
    if FP8:
        b_tile = from_e4m3(b_tile)
    return b_tile.to(TYPE)


@triton.jit
def _step(
    b_q, b_k, b_v, seen, b_best, b_sum, b_out, TYPE: tl.constexpr
):  # fmt: skip
    """Take one tile of keys and values into the running softmax; `seen` [BLOCK_M or 1, BLOCK_N]."""
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * LOG2_E  # [BLOCK_M, BLOCK_N]
    b_score = tl.where(seen, b_score, float("-inf"))
    b_next = tl.maximum(b_best, tl.max(b_score, axis=1))
    # A row that has seen no key yet would subtract -inf from -inf.
    b_base = tl.where(b_next == float("-inf"), 0.0, b_next)
    b_weight = tl.exp2(b_score - b_base[:, None])
    b_fade = tl.exp2(b_best - b_base)
    b_sum = b_sum * b_fade + tl.sum(b_weight, axis=1)
    b_out = tl.dot(b_weight.to(TYPE), b_v, b_out * b_fade[:, None], input_precision="ieee")
    return b_next, b_sum, b_out


@triton.jit(do_not_specialize=["L", "shares", "window"])
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    past_keys_ptr,
    past_values_ptr,
    slots_ptr,
    first_ptr,
    count_ptr,
    lengths_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    slot_stride,
    head_stride,
    position_stride,
    L,
    shares,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    WRITES: tl.constexpr,
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    G: tl.constexpr = H // K
    i_block = tl.program_id(0)
    i_share = tl.program_id(1)
    i_row = tl.program_id(2) // K
    i_key_head = tl.program_id(2) % K
    if CAUSAL:
        # The last tokens see the most keys: they start first.
        i_block = tl.num_programs(0) - 1 - i_block
    # The interpreter computes garbage with bfloat16.
    TYPE: tl.constexpr = tl.float32 if INTERPRET else q_ptr.dtype.element_ty

    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_token = o_m // G
    o_n = tl.arange(0, BLOCK_N)
    o_a = tl.arange(0, A)
    first_token = i_block * BLOCK_M // G
    count = tl.load(count_ptr + i_row)
    length = L if CAUSAL else tl.load(lengths_ptr + i_row)
    if SPLIT:  # noqa: SIM102 - decided when compiled, the other one when run
        if first_token >= length:
            return

    # Positions of the slot, and own ones, that any row of this tile sees.
    if CAUSAL:
        start, own_start = 0, 0
        own_end = tl.minimum((i_block * BLOCK_M + BLOCK_M - 1) // G + 1, L)
        if WINDOWED:
            start = tl.minimum(tl.maximum(count + first_token - window + 1, 0), count)
            own_start = tl.maximum(first_token - window + 1, 0)
        end = count
    else:
        start = tl.load(first_ptr + i_row)
        end = start + count
        own_start, own_end = 0, tl.where(first_token < length, length, 0)
        end = tl.where(first_token < length, end, start)
    past_tiles = (end - start + BLOCK_N - 1) // BLOCK_N
    tiles = past_tiles + (own_end - own_start + BLOCK_N - 1) // BLOCK_N
    if SPLIT:
        of_a_share = tl.maximum((tiles + shares - 1) // shares, LEAST)
        from_tile = i_share * of_a_share
        to_tile = tl.minimum(from_tile + of_a_share, tiles)
    else:
        from_tile, to_tile = 0, tiles

    token_valid = o_token < length
    # Where the rows of this tile stand among all [R, L, H]: a scalar and small numbers, because
    # wide offsets of a whole tile would be held in registers through the loops.
    o_first = (i_row * L).to(tl.int64) * H + i_key_head * G
    o_row = o_token * H + o_m % G  # [BLOCK_M]
    slot = tl.load(slots_ptr + i_row).to(tl.int64)
    o_slot = slot * slot_stride + i_key_head.to(tl.int64) * head_stride
    o_own = (i_row * L).to(tl.int64) * (K * A) + i_key_head * A
    if WRITES:  # noqa: SIM102 - as above
        if i_share == 0:
            o_new = first_token + tl.arange(0, BLOCK_T)
            new_valid = (o_new < own_end)[:, None]
            o_from = o_own + o_new[:, None] * (K * A) + o_a[None, :]
            o_to = o_slot + (count + o_new).to(tl.int64)[:, None] * position_stride + o_a[None, :]
            b_k = tl.load(k_ptr + o_from, mask=new_valid, other=0.0)
            b_v = tl.load(v_ptr + o_from, mask=new_valid, other=0.0)
            if FP8:
                b_k = to_e4m3(b_k.to(tl.float32))
                b_v = to_e4m3(b_v.to(tl.float32))
            tl.store(past_keys_ptr + o_to, b_k.to(past_keys_ptr.dtype.element_ty), mask=new_valid)
            b_v = b_v.to(past_values_ptr.dtype.element_ty)
            tl.store(past_values_ptr + o_to, b_v, mask=new_valid)
    if SPLIT:
        o_first_lse = o_first + i_share.to(tl.int64) * (tl.num_programs(2) // K * L * H)
        if from_tile >= tiles:
            b_none = tl.full([BLOCK_M], float("-inf"), tl.float32)
            tl.store(lse_ptr + o_first_lse + o_row, b_none, mask=token_valid)
            return

    o_q = o_row[:, None] * A + o_a[None, :]
    b_q = tl.load(q_ptr + o_first * A + o_q, mask=token_valid[:, None], other=0.0)
    b_q = b_q.to(TYPE)  # [BLOCK_M, A]
    b_best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, A], tl.float32)

    o_in = o_n[:, None] * position_stride + o_a[None, :]
    for i_tile in tl.range(
        tl.minimum(from_tile, past_tiles), tl.minimum(to_tile, past_tiles), num_stages=STAGES
    ):
        at = start + i_tile * BLOCK_N
        o_tile = o_slot + tl.cast(at, tl.int64) * position_stride
        valid = o_n < end - at
        b_k = _tile(past_keys_ptr + o_tile, o_in, valid, TYPE, FP8)
        b_v = _tile(past_values_ptr + o_tile, o_in, valid, TYPE, FP8)
        seen = valid[None, :]
        if WINDOWED:
            seen = seen & ((count + o_token)[:, None] - (at + o_n)[None, :] < window)
        b_best, b_sum, b_out = _step(b_q, b_k, b_v, seen, b_best, b_sum, b_out, TYPE)

    o_in = o_n[:, None] * (K * A) + o_a[None, :]
    for i_tile in tl.range(
        tl.maximum(from_tile - past_tiles, 0),
        tl.maximum(to_tile - past_tiles, 0),
        num_stages=STAGES,
    ):
        at = own_start + i_tile * BLOCK_N
        o_tile = o_own + tl.cast(at, tl.int64) * (K * A)
        valid = o_n < own_end - at
        b_k = _tile(k_ptr + o_tile, o_in, valid, TYPE, False)
        b_v = _tile(v_ptr + o_tile, o_in, valid, TYPE, False)
        seen = valid[None, :]
        if CAUSAL:
            seen = seen & (o_token[:, None] >= (at + o_n)[None, :])
        if WINDOWED:
            seen = seen & (o_token[:, None] - (at + o_n)[None, :] < window)
        b_best, b_sum, b_out = _step(b_q, b_k, b_v, seen, b_best, b_sum, b_out, TYPE)

    if not INTERPRET:
        # What no compiler sees through: it computes rows and masks again here and does not hold
        # them in registers through the loops, where there are none left.
        i_block = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [i_block], dtype=tl.int32, is_pure=False, pack=1
        )
    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_token = o_m // G
    token_valid = o_token < length
    o_row = o_token * H + o_m % G
    o_q = o_row[:, None] * A + o_a[None, :]
    # A row may have seen no key, of a window that begins later; past the end of a canvas are zeros.
    b_scale = tl.where(token_valid & (b_sum > 0.0), 1.0, 0.0) / tl.where(b_sum > 0.0, b_sum, 1.0)
    b_out = b_out * b_scale[:, None]
    if SPLIT:
        tl.store(partial_ptr + o_first_lse * A + o_q, b_out, mask=token_valid[:, None])
        tl.store(lse_ptr + o_first_lse + o_row, b_best + tl.log2(b_sum), mask=token_valid)
    else:
        b_out = b_out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + o_first * A + o_q, b_out, mask=(o_token < L)[:, None])


@triton.jit(do_not_specialize=["L", "shares", "of_a_share"])
def join_kernel(
    partial_ptr,
    lse_ptr,
    lengths_ptr,
    out_ptr,
    L,
    shares,
    of_a_share,
    H: tl.constexpr,
    A: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    i_out = tl.program_id(0).to(tl.int64)
    i_token = tl.program_id(0) // H
    o_a = tl.arange(0, A)
    b_out = tl.zeros([A], tl.float32)
    used = shares
    if not CAUSAL:
        length = tl.load(lengths_ptr + i_token // L)
        used = tl.where(i_token % L < length, shares, 0)
    o_share = tl.arange(0, BLOCK_S)
    o_lse = o_share.to(tl.int64) * of_a_share + i_out
    b_lse = tl.load(lse_ptr + o_lse, mask=o_share < used, other=float("-inf"))
    best = tl.max(b_lse, axis=0)
    total = tl.sum(tl.exp2(b_lse - tl.where(best == float("-inf"), 0.0, best)), axis=0)
    for i_share in range(used):
        o_from = i_share * of_a_share + i_out
        weight = tl.exp2(tl.load(lse_ptr + o_from) - best) / total
        # Shares that had no key have written nothing.
        written = o_a < tl.where(weight > 0.0, A, 0)
        b_out += weight * tl.load(partial_ptr + o_from * A + o_a, mask=written, other=0.0)
    tl.store(out_ptr + i_out * A + o_a, b_out.to(out_ptr.dtype.element_ty))


@dataclass(frozen=True)
class Tile:
    """How a program is cut.

    Attributes:
        rows: query heads times tokens. keys: of one step. warps: of the program.
        stages: of the loop over keys. joins: a program leaves a partial result even where there is
            one share, because writing the result itself would spill.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    joins: bool = False


# By head size. All fit 99 KB, which is what a program may have on sm_86, 89 and 120.
NARROW_TILES = {
    16: Tile(64, 64, 4, 2),
    32: Tile(64, 64, 4, 2),
    64: Tile(64, 64, 4, 2),
    128: Tile(64, 64, 4, 2),
    256: Tile(64, 32, 8, 2),
    512: Tile(32, 32, 8, 2),
}
# For float32, which is multiplied without tensor cores: TF32 is not float32, and three of its
# products for one did not fit the registers.
WIDE_TILES = {
    16: Tile(32, 32, 4, 1),
    32: Tile(32, 32, 4, 1),
    64: Tile(32, 32, 4, 1),
    128: Tile(16, 16, 4, 1),
    256: Tile(16, 16, 8, 1),
    512: Tile(16, 16, 8, 1),
}
# By head size and whether attention is causal: sm_90 multiplies 64 rows at a time and has 227 KB.
# A causal one with heads of 512 would spill.
HOPPER_TILES = {
    (256, False): Tile(128, 32, 8, 2),
    (256, True): Tile(128, 32, 8, 2),
    (512, False): Tile(64, 16, 8, 2, joins=True),
}
INTERPRETED_TILE = Tile(16, 16, 4, 1)


@functools.cache
def device_traits(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and number of processors of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def tile_for(
    head_size: int,
    dtype: torch.dtype,
    past_dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    causal: bool,
    rows: int,
) -> Tile:
    """How programs are cut for heads of this size, of at most `rows` rows."""
    tile = (WIDE_TILES if dtype == torch.float32 else NARROW_TILES)[head_size]
    # Unpacking float8 takes registers that the larger tiles do not leave.
    if capability[0] == 9 and dtype != torch.float32 and past_dtype.itemsize > 1:
        tile = HOPPER_TILES.get((head_size, causal), tile)
    return replace(tile, rows=min(tile.rows, max(16, triton.next_power_of_2(rows))))


def shares_of(programs: int, tiles: int, processors: int) -> int:
    """Into how many shares the keys are cut, from shapes alone.

    Args:
        programs: that there are without a cut. tiles: of keys, at the most.
        processors: of the device.
    """
    return max(1, min(WAVES * processors // programs, tiles // LEAST_TILES))


def attend(
    operation: str,
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
    causal: bool,
    window: int | None,
    writes: bool,
) -> Tensor:
    """Attention of q [R, L, H, A]: [R, L, H * A].

    Args:
        operation: name for messages.
        q, k, v, past_keys, past_values, slots, first, count, lengths: as `canvas_attention` takes
            them; with `causal`, `first` and `lengths` are not read and R is 1.
        causal: a token sees no later one. window: positions that it sees. writes: k and v are
            stored behind `count`. The last two are for causal attention.

    Raises:
        KernelUnavailable: no CUDA device, a head size or type that no tile is for.
        ValueError: the slots are not laid out alike, or numbers of a position not side by side.
    """
    require_gpu(operation, q, k, v, past_keys, past_values, slots, first, count, lengths)
    refuse_float64(operation, q)
    refuse_float64(operation, past_keys)
    rows, tokens, heads, size = q.shape
    key_heads = k.shape[2]
    if size not in HEAD_SIZES:
        raise KernelUnavailable(f"{operation}: heads of {size}, this kernel takes {HEAD_SIZES}")
    if past_keys.stride() != past_values.stride() or past_keys.stride(3) != 1:
        raise ValueError(
            f"past_keys and past_values have strides {past_keys.stride()} and "
            f"{past_values.stride()}, expected the same, with 1 in the end"
        )
    out = torch.empty(rows, tokens, heads * size, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    group = heads // key_heads
    if is_interpreted():
        tile, processors = INTERPRETED_TILE, INTERPRETED_PROCESSORS
    else:
        capability, processors = device_traits(q.device.index)
        tile = tile_for(
            size, q.dtype, past_keys.dtype, capability, causal=causal, rows=tokens * group
        )
    blocks = triton.cdiv(tokens * group, tile.rows)
    held = past_keys.shape[2]
    if window is not None:
        held = min(held, window + triton.cdiv(tile.rows, group))
    tiles = triton.cdiv(held, tile.keys) + triton.cdiv(tokens, tile.keys)
    shares = shares_of(blocks * rows * key_heads, tiles, processors)
    split = shares > 1 or tile.joins
    partial = lse = out
    if split:
        partial = torch.empty(shares, *out.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(shares, rows, tokens, heads, dtype=torch.float32, device=q.device)
    fp8 = past_keys.dtype == torch.float8_e4m3fn
    if fp8:
        past_keys, past_values = past_keys.view(torch.uint8), past_values.view(torch.uint8)
    attention_kernel[(blocks, shares, rows * key_heads)](
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        past_keys,
        past_values,
        slots.contiguous(),
        first.contiguous(),
        count.contiguous(),
        lengths.contiguous(),
        out,
        partial,
        lse,
        *past_keys.stride()[:3],
        tokens,
        shares,
        0 if window is None else window,
        H=heads,
        K=key_heads,
        A=size,
        CAUSAL=causal,
        WINDOWED=window is not None,
        WRITES=writes,
        SPLIT=split,
        FP8=fp8,
        LEAST=LEAST_TILES,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_T=block_tokens(tile.rows, group),
        STAGES=tile.stages,
        INTERPRET=is_interpreted(),
        num_warps=tile.warps,
    )
    if split:
        join_kernel[(rows * tokens * heads,)](
            partial,
            lse,
            lengths.contiguous(),
            out,
            tokens,
            shares,
            rows * tokens * heads,
            H=heads,
            A=size,
            CAUSAL=causal,
            BLOCK_S=triton.next_power_of_2(shares),
            num_warps=max(1, size // 256),
        )
    return out


def block_tokens(rows: int, group: int) -> int:
    """Tokens, a power of two, among which are all that have a row in a tile of `rows`."""
    tokens: int = triton.next_power_of_2(
        rows // group if rows % group == 0 else (rows - 1) // group + 2
    )
    return tokens
