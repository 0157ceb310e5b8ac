"""Expected embeddings: one program for a token and a block of D."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from infilld.kernels._launch import require_gpu

LARGEST_BLOCK_WIDTH = 512


@triton.jit
def belief_kernel(
    ids_ptr,
    probabilities_ptr,
    embedding_ptr,
    mean_ptr,
    out_ptr,
    D,
    k,
    stride_v,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = o_d < D
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    given = 0.0
    for start in range(0, k, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        b_id = tl.load(ids_ptr + i_t * k + o_k, mask=o_k < k, other=0)
        b_share = tl.load(probabilities_ptr + i_t * k + o_k, mask=o_k < k, other=0.0)
        given += tl.sum(b_share, axis=0)
        b_rows = tl.load(
            embedding_ptr + b_id[:, None] * stride_v + o_d[None, :],
            mask=(o_k < k)[:, None] & valid[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_D]
        b_sum += tl.sum(b_rows.to(tl.float32) * b_share[:, None], axis=0)
    rest = 1.0 - given
    # Not `maximum`, which would lose a NaN.
    rest = tl.where(rest < 0.0, 0.0, rest)
    b_mean = tl.load(mean_ptr + o_d, mask=valid, other=0.0).to(tl.float32)
    b_out = b_sum + rest * b_mean
    tl.store(out_ptr + i_t * D + o_d, b_out.to(out_ptr.dtype.element_ty), mask=valid)


def belief(ids: Tensor, probabilities: Tensor, embedding: Tensor, mean: Tensor) -> Tensor:
    """Expected embedding rows [T, D]; see `infilld.kernels.belief`.

    Raises:
        KernelUnavailable: no CUDA device.
    """
    require_gpu("belief", ids, probabilities, embedding, mean)
    (tokens, count), width = ids.shape, embedding.shape[1]
    out = torch.empty(tokens, width, dtype=embedding.dtype, device=embedding.device)
    if out.numel() == 0:
        return out
    block = min(max(32, triton.next_power_of_2(width)), LARGEST_BLOCK_WIDTH)
    belief_kernel[(tokens, triton.cdiv(width, block))](
        ids.contiguous(),
        probabilities.contiguous(),
        embedding,
        mean.contiguous(),
        out,
        width,
        count,
        embedding.stride(0),
        BLOCK_D=block,
        BLOCK_K=8,
        num_warps=4,
    )
    return out
