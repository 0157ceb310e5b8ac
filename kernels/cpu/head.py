"""Reading the output head, for a CPU: as its definition does, over a packed embedding.

A logistic function costs a third of a hyperbolic tangent, and `c tanh(s / c)` is
`2 c sigmoid(2 s / c) - c`; what is the same for all tokens does not change a distribution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.kernels.cpu.packed import PackedWeight
from infilld.kernels.reference.head import (
    FEWEST_ROWS,
    LARGEST_SCORES,
    TILE_TOKENS,
    best_of,
    draw,
)


def head(
    hidden: Tensor,
    embedding: PackedWeight,
    *,
    softcap: float,
    temperature: Tensor,
    top: int,
    banned: Tensor | None,
    ban_row: Tensor | None,
    targets: Tensor | None,
    uniforms: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The fields of a reading of hidden [T, D] float32; see `infilld.kernels.head`."""
    step = max(FEWEST_ROWS, LARGEST_SCORES // embedding.shape[0])
    parts = [
        _read(
            hidden[part],
            embedding,
            softcap,
            temperature[part, None],
            top,
            None if banned is None or ban_row is None else banned[ban_row[part]],
            None if targets is None else targets[part],
            None if uniforms is None else uniforms[part],
        )
        for part in (slice(at, at + step) for at in range(0, max(1, len(hidden)), step))
    ]
    columns = ([x for x in column if x is not None] for column in zip(*parts, strict=True))
    return tuple(torch.cat(found) if found else None for found in columns)  # type: ignore[return-value]


def _read(
    hidden: Tensor,
    embedding: PackedWeight,
    softcap: float,
    temperature: Tensor,
    top: int,
    banned: Tensor | None,
    targets: Tensor | None,
    uniforms: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`head` of a few positions."""
    count, vocab = len(hidden), embedding.shape[0]
    x, steep, scale = embedding(hidden), 2.0 / softcap, 2.0 * softcap / temperature
    target_log = None
    if targets is not None:
        logits = torch.mul(x, steep).sigmoid_().mul_(scale)
        target_log = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    if banned is not None:
        x.masked_fill_(banned, -torch.inf)
    if spare := -vocab % TILE_TOKENS:
        x = F.pad(x, (0, spare), value=-torch.inf)
    ids, best = best_of(x, top)

    # From here on x is the logit less the highest one, which is finite for banned tokens too.
    highest = torch.sigmoid(best[:, :1] * steep)
    x.mul_(steep).sigmoid_().sub_(highest).mul_(scale)
    e = x.exp()
    e[:, vocab:] = 0.0
    if banned is not None:
        e[:, :vocab].masked_fill_(banned, 0.0)
    masses = e.view(count, x.shape[1] // TILE_TOKENS, TILE_TOKENS).sum(-1)
    # With every token banned there is no distribution: 0 becomes NaN.
    total = masses.sum(-1, keepdim=True)
    total = total.where(total != 0, torch.nan)
    mean = x.mul_(e).sum(-1, keepdim=True) / total
    sample = None
    if uniforms is not None:
        sample = draw(masses, e, uniforms).where(total[:, 0].isfinite(), ids[:, 0])
    return (
        ids[:, 0].clone(),
        -total.log()[:, 0],
        (total.log() - mean)[:, 0],
        ids,
        e.gather(1, ids) / total,
        sample,
        target_log,
    )
