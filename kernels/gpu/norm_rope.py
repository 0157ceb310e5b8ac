"""Norms and rotation before attention: a few heads of one token in each program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import require_gpu
from infilld.kernels.gpu._types import refuse_float64

# Numbers of one program; 4 warps hold 16 of them in each thread.
BLOCK_NUMBERS = 2048
WARPS = 4


@triton.jit
def _turned(
    b_left, b_right, weight_ptr, b_cosine_left, b_cosine_right, b_sine_left, b_sine_right,
    o_half, valid_half, eps, A: tl.constexpr,
):  # fmt: skip
    """Both halves of normed, weighted and rotated heads [BLOCK_H, BLOCK_A]."""
    b_square = tl.sum(b_left * b_left, axis=1) + tl.sum(b_right * b_right, axis=1)
    b_scale = (1.0 / tl.sqrt(b_square / A + eps))[:, None]
    b_weight = tl.load(weight_ptr + o_half, mask=valid_half, other=0.0).to(tl.float32)
    b_left = b_left * b_scale * b_weight[None, :]
    b_weight = tl.load(weight_ptr + A // 2 + o_half, mask=valid_half, other=0.0).to(tl.float32)
    b_right = b_right * b_scale * b_weight[None, :]
    return (
        b_left * b_cosine_left[None, :] - b_right * b_sine_left[None, :],
        b_right * b_cosine_right[None, :] + b_left * b_sine_right[None, :],
    )


@triton.jit
def norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cosine_ptr,
    sine_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    row_stride,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    HALF: tl.constexpr = A // 2
    Q_PARTS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    o_half = tl.arange(0, BLOCK_A)
    valid_half = o_half < HALF
    row_ptr = qkv_ptr + i_token * row_stride

    o_table = i_token * A + o_half
    b_cosine_left = tl.load(cosine_ptr + o_table, mask=valid_half, other=0.0).to(tl.float32)
    b_cosine_right = tl.load(cosine_ptr + o_table + HALF, mask=valid_half, other=0.0)
    b_cosine_right = b_cosine_right.to(tl.float32)
    b_sine_left = tl.load(sine_ptr + o_table, mask=valid_half, other=0.0).to(tl.float32)
    b_sine_right = tl.load(sine_ptr + o_table + HALF, mask=valid_half, other=0.0).to(tl.float32)

    if i_part < Q_PARTS:
        o_head = i_part * BLOCK_H + tl.arange(0, BLOCK_H)
        valid = (o_head < H)[:, None] & valid_half[None, :]
        o_in = o_head[:, None] * A + o_half[None, :]  # [BLOCK_H, BLOCK_A]
        b_left = tl.load(row_ptr + o_in, mask=valid, other=0.0).to(tl.float32)
        b_right = tl.load(row_ptr + o_in + HALF, mask=valid, other=0.0).to(tl.float32)
        b_left, b_right = _turned(
            b_left, b_right, q_weight_ptr, b_cosine_left, b_cosine_right, b_sine_left,
            b_sine_right, o_half, valid_half, eps, A,
        )  # fmt: skip
        to_ptr = q_ptr + i_token * (H * A) + o_in
        tl.store(to_ptr, b_left.to(q_ptr.dtype.element_ty), mask=valid)
        tl.store(to_ptr + HALF, b_right.to(q_ptr.dtype.element_ty), mask=valid)
    else:
        o_head = (i_part - Q_PARTS) * BLOCK_H + tl.arange(0, BLOCK_H)
        valid = (o_head < K)[:, None] & valid_half[None, :]
        o_in = o_head[:, None] * A + o_half[None, :]
        b_left = tl.load(row_ptr + H * A + o_in, mask=valid, other=0.0).to(tl.float32)
        b_right = tl.load(row_ptr + H * A + o_in + HALF, mask=valid, other=0.0).to(tl.float32)
        b_value_left, b_value_right = b_left, b_right
        b_left, b_right = _turned(
            b_left, b_right, k_weight_ptr, b_cosine_left, b_cosine_right, b_sine_left,
            b_sine_right, o_half, valid_half, eps, A,
        )  # fmt: skip
        o_to = i_token * (K * A) + o_in
        tl.store(k_ptr + o_to, b_left.to(k_ptr.dtype.element_ty), mask=valid)
        tl.store(k_ptr + o_to + HALF, b_right.to(k_ptr.dtype.element_ty), mask=valid)
        if VALUES:
            value_ptr = row_ptr + (H + K) * A + o_in
            b_value_left = tl.load(value_ptr, mask=valid, other=0.0).to(tl.float32)
            b_value_right = tl.load(value_ptr + HALF, mask=valid, other=0.0).to(tl.float32)
        b_square = tl.sum(b_value_left * b_value_left, axis=1)
        b_square += tl.sum(b_value_right * b_value_right, axis=1)
        b_scale = (1.0 / tl.sqrt(b_square / A + eps))[:, None]
        tl.store(v_ptr + o_to, (b_value_left * b_scale).to(v_ptr.dtype.element_ty), mask=valid)
        b_value_right = (b_value_right * b_scale).to(v_ptr.dtype.element_ty)
        tl.store(v_ptr + o_to + HALF, b_value_right, mask=valid)


def norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cosine: Tensor,
    sine: Tensor,
    *,
    heads: int,
    key_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives q [T, H, A], k [T, K, A] and v [T, K, A]; see `infilld.kernels.norm_rope`.

    Raises:
        KernelUnavailable: no CUDA device, or float64.
    """
    require_gpu("norm_rope", qkv, q_weight, k_weight, cosine, sine)
    refuse_float64("norm_rope", qkv)
    tokens, size = len(qkv), len(q_weight)
    if qkv.stride(1) != 1:
        qkv = qkv.contiguous()
    q = torch.empty(tokens, heads, size, dtype=qkv.dtype, device=qkv.device)
    k = torch.empty(tokens, key_heads, size, dtype=qkv.dtype, device=qkv.device)
    v = torch.empty_like(k)
    if tokens == 0:
        return q, k, v
    block_size = triton.next_power_of_2(size // 2)
    block_heads = min(
        triton.next_power_of_2(max(heads, key_heads)), max(1, BLOCK_NUMBERS // (2 * block_size))
    )
    parts = triton.cdiv(heads, block_heads) + triton.cdiv(key_heads, block_heads)
    norm_rope_kernel[(tokens, parts)](
        qkv,
        q_weight.contiguous(),
        k_weight.contiguous(),
        cosine.contiguous(),
        sine.contiguous(),
        q,
        k,
        v,
        qkv.stride(0),
        eps,
        H=heads,
        K=key_heads,
        A=size,
        VALUES=qkv.shape[1] == (heads + 2 * key_heads) * size,
        BLOCK_H=block_heads,
        BLOCK_A=block_size,
        num_warps=WARPS,
    )
    return q, k, v
