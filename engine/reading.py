"""What is asked of a pass over a canvas, and what is read of it.

A pass ends in a distribution over the whole vocabulary at every position. Nobody needs all of it:
the sampler wants the most probable token, how sure it is, and a proposal; the next pass is told a
belief. So a pass is asked, and answers with a reading; only the exact form of a belief keeps the
logits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from infilld.engine.draws import Draws


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Positions whose token is imposed.

    Attributes:
        mask: [R, L] bool, True where pinned. tokens: [R, L] int64, read where mask is True.
    """

    mask: Tensor
    tokens: Tensor

    def impose(self, canvas: Tensor) -> Tensor:
        """Canvas [R, L] with the pinned tokens in place."""
        return torch.where(self.mask, self.tokens, canvas)


@dataclass(frozen=True, kw_only=True)
class Bans:
    """Tokens that free positions may not take. Most positions share a row of it.

    Attributes:
        rows: [B, V] bool, True where a token is banned. places: [L] int64, each position's row.
    """

    rows: Tensor
    places: Tensor

    def to(self, device: torch.device) -> "Bans":
        """The same on another device."""
        return Bans(rows=self.rows.to(device), places=self.places.to(device))

    def dense(self) -> Tensor:
        """[L, V] bool."""
        return self.rows[self.places]


@dataclass(frozen=True, kw_only=True)
class Belief:
    """The most probable tokens of each position; the rest of the mass is spread evenly over all.

    Attributes:
        ids: [R, L, k] int64. probabilities: [R, L, k] float32, of sum 1 or less; tokens that
            nothing is known of have 0.
    """

    ids: Tensor
    probabilities: Tensor

    @classmethod
    def of_known(cls, canvas: Tensor, known: Tensor) -> "Belief":
        """Certain of the tokens of a canvas [R, L] where `known`, nothing is known elsewhere."""
        return cls(ids=canvas[..., None], probabilities=known[..., None].float())


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is asked of a pass.

    Attributes:
        temperature: divides the logits; a float32 scalar.
        pins: positions that are certain of their pin. banned: what free positions may not take.
        draws: of proposals; None: the proposal is the most probable token.
        top: tokens of the belief; None: all of the logits, or one token where none are kept.
        weighed: tokens [R, L] int64 whose probabilities are wanted, pins and bans apart.
    """

    temperature: Tensor
    pins: Pins | None = None
    banned: Bans | None = None
    draws: Draws | None = None
    top: int | None = None
    weighed: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a pass says of its canvases, at the temperature that was asked for.

    Attributes:
        argmax: most probable tokens [R, L] int64; pins where pinned.
        log_probability: of those [R, L] float32, nats; 0 where pinned.
        entropy_nats: [R, L] float32; 0 where pinned. Not finite: the model's logits were not.
        proposal: a token for each position [R, L] int64: a sample, or the argmax.
        belief: what the next pass is told: a `Belief`, or scaled logits [R, L, V] float32.
        weighed: log-probabilities [R, L] float32, nats, of the tokens that were to be weighed.
    """

    argmax: Tensor
    log_probability: Tensor
    entropy_nats: Tensor
    proposal: Tensor
    belief: "Belief | Tensor"
    weighed: Tensor | None = None


def read_logits(logits: Tensor, ask: Ask) -> Reading:
    """The reading of soft-capped logits [R, L, V] float32: the definition, over all of them."""
    temperature = ask.temperature.to(logits.device)
    weighed = None
    if ask.weighed is not None:
        logs = (logits / temperature).log_softmax(-1)
        weighed = logs.gather(-1, ask.weighed[..., None])[..., 0]
    if ask.banned is not None:
        logits = logits.masked_fill(ask.banned.dense(), -torch.inf)
    if ask.pins is not None:
        logits = _certain(logits, ask.pins)
    scaled = logits / temperature
    probabilities = scaled.softmax(-1)
    log_probabilities = scaled.log_softmax(-1)
    argmax = scaled.argmax(-1)
    # p log p is 0 where p is 0; -inf logits would make it NaN. A NaN of the model must stay one.
    terms = torch.where(probabilities == 0, 0.0, probabilities * log_probabilities)
    return Reading(
        argmax=argmax,
        log_probability=log_probabilities.gather(-1, argmax[..., None])[..., 0],
        entropy_nats=-terms.sum(-1),
        proposal=argmax if ask.draws is None else ask.draws.sample(probabilities),
        belief=scaled if ask.top is None else _most_probable(probabilities, ask.top),
        weighed=weighed,
    )


def _certain(logits: Tensor, pins: Pins) -> Tensor:
    """Logits whose pinned positions are certain of their pin: entropy 0, one-hot belief."""
    onehot = torch.full_like(logits, -torch.inf).scatter_(-1, pins.tokens[..., None], 0.0)
    return torch.where(pins.mask[..., None], onehot, logits)


def _most_probable(probabilities: Tensor, top: int) -> Belief:
    found = probabilities.topk(min(top, probabilities.shape[-1]), dim=-1)
    return Belief(ids=found.indices, probabilities=found.values)
