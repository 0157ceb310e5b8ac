"""Which of the sorted rows belong to which expert."""

from collections.abc import Iterator

import torch
from torch import Tensor


def expert_rows(ids: Tensor, order: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and these rows, of routes sorted by expert.

    Args:
        ids: [T, k], experts of each token.
        order: [T * k], routes by expert.
    """
    found, counts = torch.unique_consecutive(ids.flatten()[order.long()], return_counts=True)
    start = 0
    for expert, count in zip(found.tolist(), counts.tolist(), strict=True):
        yield expert, slice(start, start + count)
        start += count
