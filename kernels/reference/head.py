"""Reading the output head: the definition, a few positions at a time."""

import torch
from torch import Tensor

TILE_TOKENS = 128
UNITS = 2.0**40
# Scores that are held at once, elements: 128 positions of 4,096 tokens stay in a processor's cache.
LARGEST_SCORES = 2**19
# A wide vocabulary is read once for each of these groups of positions.
FEWEST_ROWS = 64
# Tokens whose embedding is converted to float32 at once.
CONVERTED_TOKENS = 8192


def head(
    hidden: Tensor,
    embedding: Tensor,
    *,
    softcap: float,
    temperature: Tensor,
    top: int,
    banned: Tensor | None,
    ban_row: Tensor | None,
    targets: Tensor | None,
    uniforms: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The fields of a reading; see `infilld.kernels.head`.

    Source: transformers 5.23.0, DiffusionGemma's head and EntropyBoundSampler.
    """
    tokens, device = len(hidden), hidden.device
    padded = -(-len(embedding) // TILE_TOKENS) * TILE_TOKENS
    step = min(max(FEWEST_ROWS, LARGEST_SCORES // padded), max(1, tokens))
    # Two buffers for all: fresh memory of this size costs more than what is computed in it.
    scores, shares = torch.empty(2, step, padded, device=device).unbind()
    log_probability = torch.empty(tokens, device=device)
    entropy = torch.empty(tokens, device=device)
    top_ids = torch.empty(tokens, top, dtype=torch.int64, device=device)
    top_probabilities = torch.empty(tokens, top, device=device)
    sample = None if uniforms is None else torch.empty(tokens, dtype=torch.int64, device=device)
    target_log = None if targets is None else torch.empty(tokens, device=device)

    for at in range(0, tokens, step):
        part = slice(at, min(at + step, tokens))
        count = part.stop - at
        x, e = scores[:count], shares[:count]
        _score(hidden[part].float(), embedding, x)
        scale = softcap / temperature[part, None]
        if targets is not None and target_log is not None:
            target_log[part] = _log_of(x, targets[part], softcap, scale, len(embedding), e)
        ban = None
        if banned is not None and ban_row is not None:
            ban = banned[ban_row[part]]
            x[:, : len(embedding)].masked_fill_(ban, -torch.inf)
        ids, best = best_of(x, top)
        highest = torch.tanh(best[:, :1] / softcap) * scale

        # From here on x is the logit less the highest one, which is finite for banned tokens too.
        x.div_(softcap).tanh_().mul_(scale).sub_(highest)
        torch.exp(x, out=e)
        e[:, len(embedding) :] = 0.0
        if ban is not None:
            e[:, : len(embedding)].masked_fill_(ban, 0.0)
        masses = e.view(count, -1, TILE_TOKENS).sum(-1)
        # With every token banned there is no distribution: 0 becomes NaN.
        total = masses.sum(-1, keepdim=True)
        total = total.where(total != 0, torch.nan)
        mean = torch.bmm(x[:, None], e[:, :, None])[:, 0] / total
        entropy[part] = (total.log() - mean)[:, 0]
        top_ids[part] = ids
        top_probabilities[part] = e.gather(1, ids) / total
        log_probability[part] = -total.log()[:, 0]
        if uniforms is not None and sample is not None:
            drawn = draw(masses, e, uniforms[part])
            sample[part] = drawn.where(total[:, 0].isfinite(), ids[:, 0])
    return (
        top_ids[:, 0].clone(),
        log_probability,
        entropy,
        top_ids,
        top_probabilities,
        sample,
        target_log,
    )


def _score(hidden: Tensor, embedding: Tensor, out: Tensor) -> None:
    """Scores of float32 hidden [T, D] into [T, V padded]; the padding scores -inf."""
    vocab = len(embedding)
    out[:, vocab:] = -torch.inf
    step = vocab if embedding.dtype == torch.float32 else CONVERTED_TOKENS
    for at in range(0, vocab, step):
        part = slice(at, min(at + step, vocab))
        torch.mm(hidden, embedding[part].float().T, out=out[:, part])


def _log_of(
    x: Tensor, targets: Tensor, softcap: float, scale: Tensor, vocab: int, out: Tensor
) -> Tensor:
    """Log-probabilities [T] of targets under scores [T, V padded]; `out` is overwritten."""
    logits = torch.div(x, softcap, out=out).tanh_().mul_(scale)[:, :vocab]
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def best_of(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The best ids of scores [T, N], equals by lower id, and their scores, each [T, top].

    The order in which `topk` gives equals is open. One more than asked shows where there are any.
    """
    more = min(top + 1, x.shape[1])
    ids, best = _some_best(x, more)
    equal = (best[:, 1:] == best[:, :-1]).any(-1) | best[:, 0].isnan()
    ids, best = ids[:, :top], best[:, :top]
    (rows,) = equal.nonzero(as_tuple=True)
    if len(rows):
        exact = _ranked(x[rows], top)
        ids, best = (
            ids.index_copy(0, rows, exact),
            best.index_copy(0, rows, x[rows].gather(1, exact)),
        )
    return ids, best


def _some_best(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and values [T, count] of the highest of x [T, N], falling; any of equals.

    They lie in the `count` groups with the highest maxima. A group is every so-manieth token.
    """
    groups = x.shape[1]
    while groups % 2 == 0 and groups * groups > 2 * count * x.shape[1] and groups > 2 * count:
        groups //= 2
    if groups == x.shape[1]:
        best, ids = x.topk(count, dim=-1)
        return ids, best
    grouped = x.view(len(x), x.shape[1] // groups, groups)
    chosen = grouped.amax(1).topk(count, dim=-1).indices
    members = torch.arange(grouped.shape[1], device=x.device)[:, None] * groups
    ids = (chosen[:, None] + members).flatten(1)
    best, found = x.gather(1, ids).topk(count, dim=-1)
    return ids.gather(1, found), best


def _ranked(x: Tensor, count: int) -> Tensor:
    """Ids [T, count] of the highest of x [T, N], of equals those with the lower id."""
    values = x.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0
    # As integers the bits of negative floats are ordered backwards, those of others forwards.
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(x.shape[1], device=x.device)
    return ((ordered.long() << 32) - ids).topk(count, dim=-1).indices


def draw(masses: Tensor, e: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [T] drawn from weights e [T, V padded], whose sums over tiles are the masses."""
    tile = _invert(masses, uniforms[:, :1])
    index = tile[:, :, None].expand(-1, -1, TILE_TOKENS)
    weights = e.view(len(e), e.shape[1] // TILE_TOKENS, TILE_TOKENS).gather(1, index)[:, 0]
    # In units of the tile's best, which may be very small beside the row's.
    weights = weights / weights.amax(-1, keepdim=True)
    return (tile * TILE_TOKENS + _invert(weights, uniforms[:, 1:]))[:, 0]


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """First index [T, 1] at which the weights [T, N] so far reach 1 - uniform of all."""
    units = (weights.nan_to_num(nan=0.0).double() * UNITS).long()
    reached = units.cumsum(-1)
    point = ((1.0 - uniform.double()) * reached[:, -1:].double()).ceil().long().clamp(min=1)
    return (reached < point).sum(-1, keepdim=True).clamp(max=weights.shape[1] - 1)
