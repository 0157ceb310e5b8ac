"""The residual after attention and its three norms: one token in each program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import require_gpu
from infilld.kernels.gpu._rows import row_warps
from infilld.kernels.gpu._types import refuse_float64


@triton.jit
def attention_residual_kernel(
    x_ptr,
    attended_ptr,
    after_weight_ptr,
    dense_weight_ptr,
    expert_weight_ptr,
    router_scale_ptr,
    residual_ptr,
    dense_in_ptr,
    expert_in_ptr,
    router_in_ptr,
    x_stride,
    attended_stride,
    eps,
    root,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_token = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    valid = o_d < D

    b_attended = tl.load(attended_ptr + i_token * attended_stride + o_d, mask=valid, other=0.0)
    b_attended = b_attended.to(tl.float32)  # [BLOCK_D]
    b_x = tl.load(x_ptr + i_token * x_stride + o_d, mask=valid, other=0.0).to(tl.float32)
    b_weight = tl.load(after_weight_ptr + o_d, mask=valid, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(b_attended * b_attended, axis=0) / D + eps)
    b_x += b_attended * scale * b_weight

    o_to = i_token * D + o_d
    tl.store(residual_ptr + o_to, b_x.to(residual_ptr.dtype.element_ty), mask=valid)
    b_x *= 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=0) / D + eps)
    b_weight = tl.load(dense_weight_ptr + o_d, mask=valid, other=0.0).to(tl.float32)
    tl.store(dense_in_ptr + o_to, (b_x * b_weight).to(dense_in_ptr.dtype.element_ty), mask=valid)
    b_weight = tl.load(expert_weight_ptr + o_d, mask=valid, other=0.0).to(tl.float32)
    tl.store(expert_in_ptr + o_to, (b_x * b_weight).to(expert_in_ptr.dtype.element_ty), mask=valid)
    b_weight = tl.load(router_scale_ptr + o_d, mask=valid, other=0.0).to(tl.float32)
    b_x = b_x * b_weight * root
    tl.store(router_in_ptr + o_to, b_x.to(router_in_ptr.dtype.element_ty), mask=valid)


def attention_residual(
    x: Tensor,
    attended: Tensor,
    after_weight: Tensor,
    dense_weight: Tensor,
    expert_weight: Tensor,
    router_scale: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual and its three norms, [T, D]; see `infilld.kernels.attention_residual`.

    Raises:
        KernelUnavailable: no CUDA device, or float64.
    """
    weights = (after_weight, dense_weight, expert_weight, router_scale)
    require_gpu("attention_residual", x, attended, *weights)
    refuse_float64("attention_residual", x)
    tokens, width = x.shape
    x, attended = (each if each.stride(1) == 1 else each.contiguous() for each in (x, attended))
    residual, dense_in, expert_in, router_in = (
        torch.empty(tokens, width, dtype=x.dtype, device=x.device) for _ in range(4)
    )
    if tokens:
        block = triton.next_power_of_2(width)
        attention_residual_kernel[(tokens,)](
            x,
            attended,
            *(weight.contiguous() for weight in weights),
            residual,
            dense_in,
            expert_in,
            router_in,
            x.stride(0),
            attended.stride(0),
            eps,
            width**-0.5,
            D=width,
            BLOCK_D=block,
            num_warps=row_warps(block),
        )
    return residual, dense_in, expert_in, router_in
