"""Compile the attention kernel as its launcher would, for GPUs that are not here."""

from pathlib import Path

import pytest
import torch
from compiling import Compiled, compile_kernel

HEADS = 16
KEY_HEADS = {256: 8, 512: 2}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float8_e4m3fn: "u8"}


def compile_attention(
    size: int,
    capability: int,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    past: torch.dtype | None = None,
    causal: bool = False,
    split: bool = True,
    rows: int = 4096,
) -> Compiled:
    """The kernel for the 26B's layers with heads of `size`; a causal one also stores.

    Args:
        size: of heads, 256 in sliding layers (causal ones have a window), 512 in full layers.
        capability: of the GPU. folder: for Triton's cache.
        dtype: of queries. past: of stored keys; None: the same.
        causal: for a prefix, not for canvases. split: into several shares.
        rows: query heads of a key head times tokens.
    """
    from infilld.kernels.gpu._attention import (
        LEAST_TILES,
        attention_kernel,
        block_tokens,
        tile_for,
    )

    tile = tile_for(size, dtype, past or dtype, divmod(capability, 10), causal=causal, rows=rows)
    group = HEADS // KEY_HEADS[size]
    own, stored = f"*{NAMES[dtype]}", f"*{NAMES[past or dtype]}"
    pointers = {
        "q_ptr": own,
        "k_ptr": own,
        "v_ptr": own,
        "past_keys_ptr": stored,
        "past_values_ptr": stored,
        **dict.fromkeys(("slots_ptr", "first_ptr", "count_ptr", "lengths_ptr"), "*i32"),
        "out_ptr": own,
        "partial_ptr": "*fp32",
        "lse_ptr": "*fp32",
    }
    strides = dict.fromkeys(("slot_stride", "head_stride", "position_stride"), "i32")
    numbers = dict.fromkeys(("L", "shares", "window"), "i32")
    constants = {
        "H": HEADS,
        "K": KEY_HEADS[size],
        "A": size,
        "CAUSAL": causal,
        "WINDOWED": causal and size == 256,
        "WRITES": causal,
        "SPLIT": split,
        "FP8": past == torch.float8_e4m3fn,
        "LEAST": LEAST_TILES,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "BLOCK_T": block_tokens(tile.rows, group),
        "STAGES": tile.stages,
        "INTERPRET": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        return compile_kernel(
            attention_kernel,
            pointers | strides | numbers | dict.fromkeys(constants, "constexpr"),
            constants,
            capability=capability,
            warps=tile.warps,
            aligned=(*pointers, *strides),
        )
