"""The matmul of weights in few bits with the rows of a token list, expert by expert."""

import functools
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable, is_interpreted, require_gpu
from infilld.kernels._tiles import LEAST_HALF, MOST_BLOCK_N, TiledWeight
from infilld.kernels.gpu._dequant import (
    Scaling,
    code_columns,
    constraints,
    decoder,
    e5m3_value,
    round_to_bf16,
    scaled_columns,
    spread,
)

Operation = Literal["gate_up", "down", "linear"]
WARPS = 4
# Columns of half a tile of weights that are no codes: 128 rows of them take 16 KB.
PLAIN_HALF = 32
# A part of a split sum takes at least so many tiles.
LEAST_TILES_OF_SPLIT = 4
SCALE_NAMES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "e4m3",
}


@triton.jit
def _split_word(word, SCALE: tl.constexpr):
    """The two scales of a word, float32: those of the tile's first and second half of K."""
    if SCALE == "bf16":
        first = (word << 16).to(tl.float32, bitcast=True)
        second = (word & -65536).to(tl.float32, bitcast=True)
    elif SCALE == "f16":
        first = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        first = (word & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        second = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _words(ptr, N: tl.constexpr, GROUPS: tl.constexpr):
    """The words of a tile's scales, [N, GROUPS]."""
    if GROUPS == 1:
        # One contiguous vector, which is what is copied ahead of its use.
        word = tl.load(ptr + tl.arange(0, N))[:, None]
    else:
        o_n = tl.arange(0, N)[:, None] * GROUPS
        word = tl.load(ptr + o_n + tl.arange(0, GROUPS)[None, :])
    return word


@triton.jit
def _e5m3_words(ptr, N: tl.constexpr):
    """The scales of both halves of a tile of nvfp4, a word of four each [N]."""
    o_n = tl.arange(0, N) * 2
    return tl.load(ptr + o_n), tl.load(ptr + o_n + 1)


@triton.jit
def _scales(ptr, N: tl.constexpr, GROUPS: tl.constexpr, SCALE: tl.constexpr):
    """The scales of both halves of a tile, float32 [N, GROUPS] each."""
    if SCALE == "e4m3":
        word0, word1 = _e5m3_words(ptr, N)
        first, second = e5m3_value(word0, GROUPS), e5m3_value(word1, GROUPS)
    else:
        first, second = _split_word(_words(ptr, N, GROUPS), SCALE)
    return first, second


@triton.jit
def _tiled_weights(
    p_words,
    p_scales,
    p_biases,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    SCALING: tl.constexpr,
    AFFINE: tl.constexpr,
    GROUPS: tl.constexpr,
    PERMUTED: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    INTERPRET: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
):
    """Both halves of a tile of weights, [N, H] each.

    SCALING is one of `_dequant.Scaling`; with "row" they are codes.
    """
    word0 = tl.load(p_words, eviction_policy="evict_first")
    word1 = word0
    if KIND == "int8" or KIND == "fp8":
        word1 = tl.load(p_words + N * H // 4, eviction_policy="evict_first")
    if (SCALING == "bf16" or SCALING == "split") and not INTERPRET:
        if KIND == "nvfp4":
            scale = _e5m3_words(p_scales, N)
        elif SCALING == "split":
            scale = _scales(p_scales, N, GROUPS, SCALE)
        else:
            scale = _words(p_scales, N, GROUPS)
        bias = scale
        if AFFINE:
            bias = _words(p_biases, N, GROUPS)
        v0, v1 = scaled_columns(
            word0,
            word1,
            scale,
            bias,
            KIND,
            SCALING,
            AFFINE,
            GROUPS,
            ASM,
            CONSTRAINTS,
            PERMUTED,
            N,
            H,
        )
    else:
        v0, v1 = code_columns(
            word0, word1, KIND, AFFINE, ASM, CONSTRAINTS, INTERPRET, PERMUTED, N, H
        )
        if SCALING != "row":
            s0, s1 = _scales(p_scales, N, GROUPS, SCALE)
            # Codes are divided by 64, scales in bfloat16 stored times 2^120 or 2^116.
            if SCALE == "bf16":
                s0 *= 4.81482486096809e-35
                s1 *= 7.703719777548943e-34 if KIND == "int4" else 4.81482486096809e-35
            elif KIND != "nvfp4":
                s0, s1 = s0 * 64.0, s1 * 64.0
            v0 = v0.to(tl.float32) * spread(s0, GROUPS, N, H)
            v1 = v1.to(tl.float32) * spread(s1, GROUPS, N, H)
        if AFFINE:
            z0, z1 = _scales(p_biases, N, GROUPS, SCALE)
            UNIT: tl.constexpr = 8192.0 if SCALE == "bf16" else 1.0
            v0 += spread(z0 * UNIT, GROUPS, N, H)
            v1 += spread(z1 * UNIT, GROUPS, N, H)
        if SCALING == "bf16" or SCALING == "split":
            v0, v1 = round_to_bf16(v0), round_to_bf16(v1)
    return v0, v1


@triton.jit
def _columns_of_k(p, o_k, left, EVEN_K: tl.constexpr):
    """A block at `p`, 0 where its columns `o_k` are not among the `left` ones."""
    return tl.load(p) if EVEN_K else tl.load(p, mask=o_k < left, other=0.0)


@triton.jit
def grouped_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    biases_ptr,
    factor_ptr,
    route_weights_ptr,
    order_ptr,
    tiles_ptr,
    out_ptr,
    T,
    N,
    K,
    x_stride,
    CHOSEN,
    K_TILES,
    OPERATION: tl.constexpr,
    KIND: tl.constexpr,
    SCALE: tl.constexpr,
    SCALING: tl.constexpr,
    AFFINE: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_FACTOR: tl.constexpr,
    PERMUTED: tl.constexpr,
    ASM: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    N_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr,
    FEWEST_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """One tile of rows by one tile of weight rows, or by a part of its columns.

    Weights are the first operand of the product: rows of x are then in steps of 8 where tensor
    cores take them, and a warp group takes the weights from registers.
    """
    i_n = tl.program_id(0) % N_TILES
    i_tile = tl.program_id(0) // N_TILES
    if OPERATION == "linear":
        i_expert = 0
        first = i_tile * BLOCK_T
        rows = tl.minimum(T - first, BLOCK_T)
    else:
        i_expert = tl.load(tiles_ptr + i_tile * 3)
        first = tl.load(tiles_ptr + i_tile * 3 + 1)
        rows = tl.load(tiles_ptr + i_tile * 3 + 2)
    # Tiles of other sizes have a launch of their own.
    if (rows < FEWEST_ROWS) | (rows > BLOCK_T):
        return
    COMPUTE: tl.constexpr = tl.float32 if INTERPRET else x_ptr.dtype.element_ty
    i_expert = tl.cast(i_expert, tl.int64)
    o_t = tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, HALF)
    valid = o_t < rows
    o_x = first + tl.where(valid, o_t, 0)
    if OPERATION == "gate_up":
        o_x = tl.load(order_ptr + o_x) // CHOSEN
    p_x = x_ptr + o_x.to(tl.int64)[None, :] * x_stride
    BLOCK_OUT: tl.constexpr = BLOCK_N // 2 if OPERATION == "gate_up" else BLOCK_N
    o_out = i_n * BLOCK_OUT + tl.arange(0, BLOCK_OUT)

    i_block = (i_expert * N_TILES + i_n) * K_TILES
    TILE_WORDS: tl.constexpr = BLOCK_N * HALF // (4 if KIND == "int4" or KIND == "nvfp4" else 2)
    SCALE_WORDS: tl.constexpr = BLOCK_N * (2 if KIND == "nvfp4" else GROUPS)
    if KIND == "plain":
        o_row = i_n * BLOCK_N + o_n
        weight_rows = N
        if OPERATION == "gate_up":
            # Eight gates, then their ups: the same order as in tiles.
            o_row = i_n * BLOCK_OUT + o_n // 16 * 8 + o_n % 8
            weight_rows = 2 * N
        o_row = tl.minimum(o_row, N - 1)
        if OPERATION == "gate_up":
            o_row += N * (o_n % 16 // 8)
        o_row = (i_expert * weight_rows + o_row) * K
        p_words = codes_ptr + o_row[:, None] + o_k[None, :]
    else:
        o_word = o_n[:, None] * (HALF // 4) + tl.arange(0, HALF // 4)[None, :]
        p_words = codes_ptr + i_block * TILE_WORDS + o_word
    p_scales = scales_ptr + i_block * SCALE_WORDS
    p_biases = biases_ptr + i_block * SCALE_WORDS
    i_first, i_last = 0, K_TILES
    if SPLITS > 1:
        i_first = K_TILES * tl.program_id(1) // SPLITS
        i_last = K_TILES * (tl.program_id(1) + 1) // SPLITS

    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for i in range(i_first, i_last):
        o_left = K - i * 2 * HALF
        if KIND == "plain":
            v0 = _columns_of_k(p_words + i * 2 * HALF, o_k[None, :], o_left, EVEN_K)
            v1 = _columns_of_k(p_words + i * 2 * HALF + HALF, o_k[None, :], o_left - HALF, EVEN_K)
        else:
            v0, v1 = _tiled_weights(
                p_words + i * TILE_WORDS,
                p_scales + i * SCALE_WORDS,
                p_biases + i * SCALE_WORDS,
                KIND,
                SCALE,
                SCALING,
                AFFINE,
                GROUPS,
                PERMUTED,
                ASM,
                CONSTRAINTS,
                INTERPRET,
                BLOCK_N,
                HALF,
            )
        v0, v1 = v0.to(COMPUTE), v1.to(COMPUTE)
        if PERMUTED:
            # One chain of a warp group's products: between two of them the weights in registers
            # would have to wait.
            o_both = tl.arange(0, 2 * HALF)[:, None]
            x = _columns_of_k(p_x + i * 2 * HALF + o_both, o_both, o_left, EVEN_K)
            v = tl.join(v0, v1).trans(0, 2, 1).reshape(BLOCK_N, 2 * HALF)
            acc = tl.dot(v, x.to(COMPUTE), acc, input_precision="ieee")
            if not INTERPRET:
                # Nothing, but it reads the sum: the chain ends here. Left under way to the next
                # turn, its registers are in the way of that turn's weights, and ptxas then waits
                # after each single product.
                acc = tl.inline_asm_elementwise("", "=f,0", [acc], tl.float32, True, 1)
        else:
            x0 = _columns_of_k(p_x + i * 2 * HALF + o_k[:, None], o_k[:, None], o_left, EVEN_K)
            x1 = _columns_of_k(
                p_x + i * 2 * HALF + HALF + o_k[:, None], o_k[:, None], o_left - HALF, EVEN_K
            )
            acc = tl.dot(v0, x0.to(COMPUTE), acc, input_precision="ieee")
            acc = tl.dot(v1, x1.to(COMPUTE), acc, input_precision="ieee")

    if KIND != "plain":
        if SCALING == "row":
            acc *= tl.load(scales_ptr + (i_expert * N_TILES + i_n) * BLOCK_N + o_n)[:, None]
        elif SCALING == "bf16" and not INTERPRET:
            # The power of two that the scales lacked.
            acc *= 256.0 if KIND == "nvfp4" else 8192.0
        if ROW_FACTOR:
            acc *= tl.load(factor_ptr + (i_expert * N_TILES + i_n) * BLOCK_N + o_n)[:, None]
        else:
            acc *= tl.load(factor_ptr + i_expert)
    out = acc
    if OPERATION == "gate_up":
        # Gates and their ups stand eight rows apart, in the same thread.
        pairs = acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_T).trans(0, 2, 3, 1)
        gate, up = tl.split(pairs)
        # The tanh form: gate * sigmoid(2 * sqrt(2 / pi) * (gate + 0.044715 * gate^3)).
        turn = gate * (1.5957691216057308 + 0.07135481282247233 * gate * gate)
        out = (gate / (1.0 + tl.exp(-turn)) * up).reshape(BLOCK_OUT, BLOCK_T)
    elif OPERATION == "down":
        route = tl.load(order_ptr + first + o_t, mask=valid, other=0)
        out *= tl.load(route_weights_ptr + route, mask=valid, other=0.0)[None, :]
    p_out = out_ptr + (first + o_t).to(tl.int64)[None, :] * N + o_out[:, None]
    if SPLITS > 1:
        p_out += tl.program_id(1).to(tl.int64) * T * N
    if INTERPRET and out_ptr.dtype.element_ty == tl.bfloat16:
        out = round_to_bf16(out)
    tl.store(p_out, out.to(out_ptr.dtype.element_ty), mask=valid[None, :] & (o_out[:, None] < N))


def constants(operation: Operation, weight: Tensor | TiledWeight, rows: int) -> dict[str, Any]:
    """What the kernel is compiled for, but for sizes of blocks of rows; `rows` is N."""
    if isinstance(weight, Tensor):
        block_n = min(MOST_BLOCK_N, max(LEAST_HALF, triton.next_power_of_2(rows)))
        columns = weight.shape[-1]
        return {
            "OPERATION": operation,
            "KIND": "plain",
            "SCALE": "",
            "SCALING": "",
            "AFFINE": False,
            "GROUPS": 0,
            "ROW_FACTOR": False,
            "PERMUTED": False,
            "ASM": "",
            "CONSTRAINTS": "",
            "N_TILES": triton.cdiv(rows, block_n),
            "EVEN_K": columns % (2 * PLAIN_HALF) == 0,
            "BLOCK_N": block_n,
            "HALF": PLAIN_HALF,
        }
    layout = weight.layout
    affine = weight.biases is not None
    if layout.groups == 0:
        scaling: Scaling = "row"
    elif weight.kind == "int8" and affine:
        # The bias and what takes 128 away together do not fit a bfloat16.
        scaling = "f32"
    elif weight.scale_dtype in (torch.bfloat16, torch.float8_e4m3fn):
        scaling = "bf16"
    elif weight.scale_dtype == torch.float16 and not affine:
        scaling = "split"
    else:
        scaling = "f32"
    return {
        "OPERATION": operation,
        "KIND": weight.kind,
        "SCALE": SCALE_NAMES[weight.scale_dtype],
        "SCALING": scaling,
        "AFFINE": affine,
        "GROUPS": layout.groups,
        "ROW_FACTOR": weight.factor.ndim > 1,
        "PERMUTED": layout.permuted,
        "ASM": decoder(weight.kind, affine=affine, scaling=scaling),
        "CONSTRAINTS": constraints(weight.kind, scaling=scaling),
        "N_TILES": weight.codes.shape[1],
        "EVEN_K": weight.shape[-1] % (2 * layout.half) == 0,
        "BLOCK_N": layout.block_n,
        "HALF": layout.half,
    }


def row_classes(most_rows: int, capability: int) -> list[tuple[int, int]]:
    """(fewest, most) rows of the tiles that each launch takes.

    A warp group's instruction takes 64 rows for the price of 16; elsewhere every 16 rows cost.
    """
    sizes = [16, 64] if 90 <= capability < 100 else [16, 32, 64]
    fewest = [1, *(size + 1 for size in sizes[:-1])]
    return [(few, size) for few, size in zip(fewest, sizes, strict=True) if few <= most_rows]


def stages(capability: int) -> int:
    """Tiles of the loop that are under way at once.

    Where a multiprocessor has 100 KB of shared memory, more programs side by side are worth more.
    """
    return 3 if capability == 80 or 90 <= capability < 120 else 2


def grouped(
    operation: Literal["gate_up", "down"],
    x: Tensor,
    weight: Tensor | TiledWeight,
    *,
    columns: int,
    order: Tensor,
    tiles: Tensor,
    route_weights: Tensor,
) -> Tensor:
    """[T * k, columns] in x's type and in the order of the sorted rows.

    Raises:
        KernelUnavailable: no CUDA device, or a type that the kernel does not take.
    """
    out = torch.empty(len(order), columns, dtype=x.dtype, device=x.device)
    chosen = route_weights.shape[1]
    few_tokens = min(64, len(route_weights))
    for fewest, most in row_classes(few_tokens, _machine(x.device)[0]):
        _launch(
            operation,
            x,
            weight,
            out,
            (tiles.contiguous(), order.contiguous(), route_weights.contiguous(), chosen),
            tile_count=len(tiles),
            fewest_rows=fewest,
            block_t=most,
        )
    return out


def dense(x: Tensor, weight: TiledWeight, *, splits: int | None) -> Tensor:
    """[T, N] in x's type: every row of x by the only matrix of the weight.

    Args:
        splits: parts of K that are summed apart; None: what fills the device.

    Raises:
        KernelUnavailable: no CUDA device, or a type that the kernel does not take.
    """
    tokens, rows = len(x), weight.shape[-2]
    block_t = next((size for size in (16, 32) if tokens <= size), 64)
    tile_count = triton.cdiv(tokens, block_t)
    n_tiles, k_tiles = weight.codes.shape[1:3]
    if splits is None:
        processors = _machine(x.device)[1]
        splits = min(processors // max(1, tile_count * n_tiles), k_tiles // LEAST_TILES_OF_SPLIT)
        splits = max(1, splits)
    shape = (tokens, rows) if splits == 1 else (splits, tokens, rows)
    dtype = x.dtype if splits == 1 else torch.float32
    out = torch.empty(shape, dtype=dtype, device=x.device)
    nothing = (weight.codes, weight.codes, weight.factor, 1)
    _launch(
        "linear",
        x,
        weight,
        out,
        nothing,
        tile_count=tile_count,
        fewest_rows=1,
        block_t=block_t,
        splits=splits,
    )
    return out.sum(0).to(x.dtype) if splits > 1 else out


def _launch(
    operation: Operation,
    x: Tensor,
    weight: Tensor | TiledWeight,
    out: Tensor,
    routes: tuple[Tensor, Tensor, Tensor, int],
    *,
    tile_count: int,
    fewest_rows: int,
    block_t: int,
    splits: int = 1,
) -> None:
    require_gpu(operation, x, weight if isinstance(weight, Tensor) else weight.codes)
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise KernelUnavailable(f"{operation}: x is {x.dtype}, this kernel takes bfloat16, float32")
    if out.numel() == 0:
        return
    x = x if x.stride(-1) == 1 else x.contiguous()
    columns = weight.shape[-1]
    fixed = constants(operation, weight, out.shape[-1] * (2 if operation == "gate_up" else 1))
    if isinstance(weight, Tensor):
        codes = scales = biases = factor = weight.contiguous()
    else:
        codes, scales, factor = weight.codes, weight.scales, weight.factor
        biases = scales if weight.biases is None else weight.biases
    tiles, order, route_weights, chosen = routes
    grouped_kernel[(tile_count * fixed["N_TILES"], splits)](
        x,
        codes,
        scales,
        biases,
        factor,
        route_weights,
        order,
        tiles,
        out,
        len(x),
        out.shape[-1],
        columns,
        x.stride(0),
        chosen,
        triton.cdiv(columns, 2 * fixed["HALF"]),
        **fixed,
        SPLITS=splits,
        FEWEST_ROWS=fewest_rows,
        BLOCK_T=block_t,
        INTERPRET=is_interpreted(),
        num_warps=WARPS,
        num_stages=stages(_machine(x.device)[0]),
    )


@functools.cache
def _machine(device: torch.device) -> tuple[int, int]:
    """Compute capability, 10 * major + minor, and multiprocessors; interpreted, a few."""
    if device.type != "cuda":
        return 80, 4
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
