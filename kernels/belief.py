"""The expected embedding under what the last pass believed, from its most probable tokens."""

from typing import Literal

import torch
from torch import Tensor

from infilld.kernels._launch import require_triton


def belief(
    ids: Tensor,
    probabilities: Tensor,
    embedding: Tensor,
    mean: Tensor,
    *,
    impl: Literal["gpu", "reference"],
) -> Tensor:
    """Expected embedding rows [T, D] in the embedding's dtype.

    `sum_k p_k * embedding[id_k] + max(0, 1 - sum_k p_k) * mean`, summed in float32: what the k
    tokens leave of the probability is spread evenly over the vocabulary. Nothing else is scaled.

    Args:
        ids: [T, k] int64, each from 0 to V - 1, which is not checked; T may be 0.
        probabilities: [T, k] float32.
        embedding: [V, D] float32, bfloat16 or float16; D is contiguous.
        mean: [D], the embedding's mean over the vocabulary, floating point.
        impl: implementation; nothing falls back to another one.

    Raises:
        ValueError: shapes, dtypes, devices or strides are not as above.
        KernelUnavailable: this implementation cannot run here.

    Source: transformers 5.23.0, DiffusionGemma's self-conditioning. Differs: the reference takes
        all V probabilities.
    """
    _check(ids, probabilities, embedding, mean)
    if impl == "gpu":
        require_triton("belief")
        from infilld.kernels.gpu.belief import belief as run
    elif impl == "reference":
        from infilld.kernels.reference.belief import belief as run
    else:
        raise ValueError(f"{impl=}: expected 'gpu' or 'reference'")
    out: Tensor = run(ids, probabilities, embedding, mean)
    return out


def _check(ids: Tensor, probabilities: Tensor, embedding: Tensor, mean: Tensor) -> None:
    if ids.ndim != 2 or ids.dtype != torch.int64:
        raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}, expected int64 [T, k]")
    if probabilities.shape != ids.shape or probabilities.dtype != torch.float32:
        raise ValueError(
            f"probabilities are {probabilities.dtype} {list(probabilities.shape)}, "
            f"expected float32 [T, k] = {list(ids.shape)}"
        )
    if embedding.ndim != 2 or embedding.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"embedding is {embedding.dtype} {list(embedding.shape)}, "
            "expected float32, bfloat16 or float16 [V, D]"
        )
    if embedding.stride(1) != 1 and embedding.shape[1] > 1:
        raise ValueError(f"embedding has strides {embedding.stride()}, expected D contiguous")
    if mean.shape != embedding.shape[1:] or not mean.is_floating_point():
        raise ValueError(
            f"mean is {mean.dtype} {list(mean.shape)}, "
            f"expected floating point [D] = {[embedding.shape[1]]}"
        )
    for name, tensor in {
        "probabilities": probabilities,
        "embedding": embedding,
        "mean": mean,
    }.items():
        if tensor.device != ids.device:
            raise ValueError(f"{name} is on {tensor.device}, ids are on {ids.device}")
