"""The encoder with the head as a causal language model: how likely is a finished text?

No other diffusion model has this for free: the encoder was trained to predict the next token, so
one causal pass gives the exact left-to-right log-likelihood of any candidate.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from infilld.engine.model import DiffusionGemma
from infilld.engine.prefixes import Prefix


def score(
    model: DiffusionGemma, prefix: Prefix, candidates: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities of candidates that continue an encoded prefix.

    Args:
        model: weights. prefix: only read.
        candidates: token ids of each continuation; lengths may differ, and be 0.

    Returns:
        For each candidate [N] float32, nats: token i given the prefix and the tokens before it.
    """
    longest = max(map(len, candidates), default=0)
    if longest == 0:
        return [torch.empty(0) for _ in candidates]
    # Reading is causal: what stands behind a shorter candidate cannot reach it.
    rows = torch.zeros(len(candidates), longest, dtype=torch.int64)
    for row, candidate in enumerate(candidates):
        rows[row, : len(candidate)] = torch.tensor(candidate, dtype=torch.int64)
    rows = rows.to(model.device)
    states = prefix.last_hidden.expand(len(candidates), 1, -1)
    if longest > 1:
        states = torch.cat((states, model.read(rows[:, :-1], prefix.cache)), dim=1)
    found = model.logits(states).log_softmax(-1).gather(-1, rows[..., None])[..., 0].cpu()
    return [found[row, : len(candidate)] for row, candidate in enumerate(candidates)]


def continue_greedily(
    model: DiffusionGemma,
    prefix: Prefix,
    banned: Tensor,
    ends: Collection[int],
    most_tokens: int,
) -> list[int]:
    """Tokens that the encoder itself would write behind the prefix, one pass for each.

    Args:
        model: weights. prefix: only read.
        banned: tokens not written at first, and later [2, V] bool.
        ends: tokens before which the text ends. most_tokens: that are written.
    """
    written: list[int] = []
    hidden = prefix.last_hidden
    while len(written) < most_tokens:
        never = banned[min(1, len(written))]
        best = int(model.logits(hidden).masked_fill(never, -torch.inf).argmax())
        if best in ends:
            break
        written.append(best)
        hidden = model.read(torch.tensor([written], device=model.device), prefix.cache)[0, -1]
    return written
