"""The encoder with the head as a causal language model: how likely is a finished text?

No other diffusion model has this for free: the encoder was trained to predict the next token, so
one causal pass gives the exact left-to-right log-likelihood of any candidate.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from infilld.engine.passes import CanvasModel
from infilld.engine.prefixes import Prefix


def score(model: CanvasModel, prefix: Prefix, candidates: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities of candidates that continue an encoded prefix.

    Args:
        model: weights. prefix: only read.
        candidates: token ids of each continuation; lengths may differ, and be 0.

    Returns:
        For each candidate [N] float32, nats: token i given the prefix and the tokens before it.
    """
    some = [list(candidate) for candidate in candidates if candidate]
    if not some:
        return [torch.empty(0) for _ in candidates]
    # Tokens stay on the host until a model takes them.
    rows = [torch.tensor(candidate) for candidate in some]
    # The last token of each is predicted and predicts nothing.
    longer = [row[:-1] for row in rows if len(row) > 1]
    read = iter(model.read(longer, prefix.cache) if longer else [])
    first = prefix.last_hidden[None]
    states = [torch.cat((first, next(read))) if len(row) > 1 else first for row in rows]
    found = model.log_probabilities(torch.cat(states), torch.cat(rows)).cpu()
    parts = iter(torch.split(found, [len(row) for row in rows]))
    return [next(parts) if candidate else torch.empty(0) for candidate in candidates]


def continue_greedily(
    model: CanvasModel,
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
        best = int(model.best(hidden[None], never))
        if best in ends:
            break
        written.append(best)
        (states,) = model.read([torch.tensor(written)], prefix.cache)
        hidden = states[-1]
    return written
