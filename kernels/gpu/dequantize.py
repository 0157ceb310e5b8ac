"""Values of a weight in few bits: one program for each piece of some rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import is_interpreted, require_gpu
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.gpu._dequant import code_value, e4m3_value, round_to_bf16

BLOCK_N = 8
BLOCK_K = 256


@triton.jit
def dequantize_kernel(
    codes_ptr,
    scales_ptr,
    biases_ptr,
    factor_ptr,
    out_ptr,
    ROWS,
    N,
    K,
    G,
    KIND: tl.constexpr,
    AFFINE: tl.constexpr,
    FACTOR: tl.constexpr,
    ROW_FACTOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    valid = (o_n < ROWS)[:, None] & (o_k < K)[None, :]
    o_group = o_n[:, None] * (K // G) + (o_k // G)[None, :]
    if KIND == "int4" or KIND == "nvfp4":
        o_code = o_n[:, None] * (K // 2) + (o_k // 2)[None, :]
        b_byte = tl.load(codes_ptr + o_code, mask=valid, other=0).to(tl.int32)
        b_code = (b_byte >> (o_k % 2 * 4)[None, :]) & 15
    else:
        o_code = o_n[:, None] * K + o_k[None, :]
        b_code = tl.load(codes_ptr + o_code, mask=valid, other=0).to(tl.int32)
        if KIND == "int8":
            b_code ^= 128
    b_scale = tl.load(scales_ptr + o_group, mask=valid, other=0)
    if KIND == "nvfp4":
        b_scale = e4m3_value(b_scale.to(tl.int32))
    b_value = code_value(b_code, KIND, AFFINE) * b_scale.to(tl.float32)  # [BLOCK_N, BLOCK_K]
    if AFFINE:
        b_value += tl.load(biases_ptr + o_group, mask=valid, other=0).to(tl.float32)
    if FACTOR:
        o_factor = o_n if ROW_FACTOR else o_n // N
        b_value *= tl.load(factor_ptr + o_factor, mask=o_n < ROWS, other=0.0)[:, None]
    if INTERPRET and out_ptr.dtype.element_ty == tl.bfloat16:
        b_value = round_to_bf16(b_value)
    tl.store(
        out_ptr + o_n[:, None] * K + o_k[None, :], b_value.to(out_ptr.dtype.element_ty), mask=valid
    )


def dequantize(weight: QuantizedWeight, *, dtype: torch.dtype) -> Tensor:
    """[..., N, K] in `dtype`; see `infilld.kernels.dequantize`.

    Raises:
        KernelUnavailable: no CUDA device.
    """
    require_gpu("dequantize", weight.codes)
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.numel() == 0:
        return out
    rows, columns = weight.shape[-2:]
    all_rows = out.numel() // columns
    scales = weight.scales.contiguous()
    # Bytes: there are devices without arithmetic on E4M3.
    dequantize_kernel[(triton.cdiv(all_rows, BLOCK_N), triton.cdiv(columns, BLOCK_K))](
        weight.codes.contiguous().view(torch.uint8),
        scales.view(torch.uint8) if weight.kind == "nvfp4" else scales,
        scales if weight.biases is None else weight.biases.contiguous(),
        out if weight.factor is None else weight.factor.contiguous(),
        out,
        all_rows,
        rows,
        columns,
        weight.group,
        KIND=weight.kind,
        AFFINE=weight.biases is not None,
        FACTOR=weight.factor is not None,
        ROW_FACTOR=weight.row_factor is not None,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        INTERPRET=is_interpreted(),
        num_warps=4,
    )
    return out
