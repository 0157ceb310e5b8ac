"""The encoder with the head as a causal language model: how likely is a finished text?

No other diffusion model has this for free: the encoder was trained to predict the next token, so
one causal pass gives the exact left-to-right log-likelihood of any candidate.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.model import DiffusionGemma


def score(
    model: DiffusionGemma, cache: PrefixCache, candidates: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities of candidates that continue the cached prefix.

    The cache holds the same prefix afterwards; its last token is encoded again, because the
    first token of a candidate is predicted from that token's hidden state.

    Args:
        model: weights.
        cache: the encoded prefix, at least one token.
        candidates: token ids of each continuation; lengths may differ, and be 0.

    Returns:
        For each candidate [N] float32, nats: token i given the prefix and the tokens before it.

    Raises:
        ValueError: the prefix is empty.
    """
    if cache.tokens == 0:
        raise ValueError("a candidate needs a prefix of at least one token")
    longest = max(map(len, candidates), default=0)
    if longest == 0:
        return [torch.empty(0) for _ in candidates]
    last_hidden = _last_hidden(model, cache)
    # Reading is causal: what stands behind a shorter candidate cannot reach it.
    rows = torch.zeros(len(candidates), longest, dtype=torch.int64)
    for row, candidate in enumerate(candidates):
        rows[row, : len(candidate)] = torch.tensor(candidate, dtype=torch.int64)
    rows = rows.to(model.device)
    states = last_hidden.expand(len(candidates), 1, -1)
    if longest > 1:
        states = torch.cat((states, model.read(rows[:, :-1], cache)), dim=1)
    found = model.logits(states).log_softmax(-1).gather(-1, rows[..., None])[..., 0].cpu()
    return [found[row, : len(candidate)] for row, candidate in enumerate(candidates)]


def continue_greedily(
    model: DiffusionGemma,
    cache: PrefixCache,
    banned: Tensor,
    ends: Collection[int],
    most_tokens: int,
) -> list[int]:
    """Tokens that the encoder itself would write behind the prefix, one pass for each.

    Args:
        model: weights. cache: the encoded prefix; holds the same prefix afterwards.
        banned: tokens never written [V] bool. ends: tokens before which the text ends.
        most_tokens: that are written.

    Raises:
        ValueError: the prefix is empty.
    """
    if cache.tokens == 0:
        raise ValueError("a continuation needs a prefix of at least one token")
    written: list[int] = []
    hidden = _last_hidden(model, cache)
    while len(written) < most_tokens:
        best = int(model.logits(hidden).masked_fill(banned, -torch.inf).argmax())
        if best in ends:
            break
        written.append(best)
        hidden = model.read(torch.tensor([written], device=model.device), cache)[0, -1]
    return written


def _last_hidden(model: DiffusionGemma, cache: PrefixCache) -> Tensor:
    """Hidden state [D] of the last prefix token; leaves the cache as it was."""
    ids = cache.ids
    kept = cache.trim(len(ids) - 1)
    unread = torch.tensor(ids[kept:], dtype=torch.int64, device=model.device)
    return model.encode(unread, cache)[-1]
