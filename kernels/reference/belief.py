"""Expected embeddings: the definition."""

import torch
from torch import Tensor

# Gathered rows that are held at once, elements: 16 MB in float32.
LARGEST_GATHER = 2**22


def belief(ids: Tensor, probabilities: Tensor, embedding: Tensor, mean: Tensor) -> Tensor:
    """Expected embedding rows [T, D]; see `infilld.kernels.belief`.

    Source: transformers 5.23.0, DiffusionGemma's self-conditioning.
    """
    (tokens, count), width = ids.shape, embedding.shape[1]
    rest = 1.0 - probabilities.sum(-1, keepdim=True)
    out = rest.clamp(min=0.0) * mean.float()
    step = max(1, LARGEST_GATHER // max(1, count * width))
    for at in range(0, tokens, step):
        part = slice(at, at + step)
        rows = embedding[ids[part]].float()  # [step, k, D]
        out[part] += torch.bmm(probabilities[part, None], rows)[:, 0]
    return out.to(embedding.dtype)
