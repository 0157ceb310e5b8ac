"""From the feed-forward branches to the next layer's input: one token in each program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import require_gpu
from infilld.kernels.gpu._rows import row_warps
from infilld.kernels.gpu._types import refuse_float64


@triton.jit
def feed_forward_residual_kernel(
    residual_ptr,
    dense_ptr,
    expert_rows_ptr,
    place_ptr,
    dense_weight_ptr,
    expert_weight_ptr,
    after_weight_ptr,
    next_weight_ptr,
    scalar_ptr,
    x_ptr,
    normed_ptr,
    residual_stride,
    dense_stride,
    expert_stride,
    eps,
    D: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    valid = o_d < D

    # Always in the order of the routes, so that a row's sum has the same bits in every run.
    b_routed = tl.zeros([BLOCK_D], dtype=tl.float32)
    for route in tl.static_range(CHOSEN):
        at = tl.load(place_ptr + i_token * CHOSEN + route).to(tl.int64)
        b_row = tl.load(expert_rows_ptr + at * expert_stride + o_d, mask=valid, other=0.0)
        b_routed += b_row.to(tl.float32)
    b_weight = tl.load(expert_weight_ptr + o_d, mask=valid, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(b_routed * b_routed, axis=0) / D + eps)
    b_total = b_routed * scale * b_weight

    b_dense = tl.load(dense_ptr + i_token * dense_stride + o_d, mask=valid, other=0.0)
    b_dense = b_dense.to(tl.float32)  # [BLOCK_D]
    b_weight = tl.load(dense_weight_ptr + o_d, mask=valid, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(b_dense * b_dense, axis=0) / D + eps)
    b_total += b_dense * scale * b_weight

    b_x = tl.load(residual_ptr + i_token * residual_stride + o_d, mask=valid, other=0.0)
    b_x = b_x.to(tl.float32)
    b_weight = tl.load(after_weight_ptr + o_d, mask=valid, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(b_total * b_total, axis=0) / D + eps)
    b_x = (b_x + b_total * scale * b_weight) * tl.load(scalar_ptr).to(tl.float32)

    o_to = i_token * D + o_d
    tl.store(x_ptr + o_to, b_x.to(x_ptr.dtype.element_ty), mask=valid)
    b_weight = tl.load(next_weight_ptr + o_d, mask=valid, other=0.0).to(tl.float32)
    b_x *= 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    tl.store(normed_ptr + o_to, (b_x * b_weight).to(normed_ptr.dtype.element_ty), mask=valid)


def feed_forward_residual(
    residual: Tensor,
    dense: Tensor,
    expert_rows: Tensor,
    place: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    after_weight: Tensor,
    next_weight: Tensor,
    scalar: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Hidden state and its norm, [T, D]; see `infilld.kernels.feed_forward_residual`.

    Raises:
        KernelUnavailable: no CUDA device, or float64.
    """
    weights = (dense_weight, expert_weight, after_weight, next_weight)
    require_gpu("feed_forward_residual", residual, dense, expert_rows, place, *weights, scalar)
    refuse_float64("feed_forward_residual", residual)
    tokens, width = residual.shape
    residual, dense, expert_rows = (
        each if each.stride(1) == 1 else each.contiguous()
        for each in (residual, dense, expert_rows)
    )
    x = torch.empty(tokens, width, dtype=residual.dtype, device=residual.device)
    normed = torch.empty_like(x)
    block = triton.next_power_of_2(width)
    feed_forward_residual_kernel[(tokens,)](
        residual,
        dense,
        expert_rows,
        place.contiguous(),
        *(weight.contiguous() for weight in weights),
        scalar,
        x,
        normed,
        residual.stride(0),
        dense.stride(0),
        expert_rows.stride(0),
        eps,
        D=width,
        CHOSEN=len(place) // tokens,
        BLOCK_D=block,
        num_warps=row_warps(block),
    )
    return x, normed
