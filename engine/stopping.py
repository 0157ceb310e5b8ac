"""Stop rules: when a canvas is done. Each is a frozen record with one method over the history."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from infilld.engine.config import SamplerConfig


@dataclass
class History:
    """What stop rules look at; reset for every canvas.

    Attributes:
        free: positions that count [R, L] bool; pinned ones would dilute every mean.
        argmax: one [R, L] int64 per pass so far.
        entropy_nats: of the last pass [R, L] float32.
    """

    free: Tensor
    argmax: list[Tensor] = field(default_factory=list)
    entropy_nats: Tensor = field(default_factory=lambda: torch.empty(0))

    def observe(self, argmax: Tensor, entropy_nats: Tensor) -> None:
        """Add one pass."""
        self.argmax.append(argmax)
        self.entropy_nats = entropy_nats


class StopRule(Protocol):
    """Decides per row whether the canvas is done."""

    def done(self, history: History) -> Tensor:
        """Rows that are done, [R] bool."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stable:
    """The argmax of the free positions was the same in `passes` + 1 passes running."""

    passes: int = 1

    def __post_init__(self) -> None:
        """Refuse a negative count."""
        if self.passes < 0:
            raise ValueError(f"{self.passes=}: expected 0 or more")

    def done(self, history: History) -> Tensor:
        """Rows that are stable."""
        if len(history.argmax) <= self.passes:
            return _none(history)
        last = history.argmax[-1]
        done = ~_none(history)
        for earlier in history.argmax[-1 - self.passes : -1]:
            done &= ((earlier == last) | ~history.free).all(-1)
        return done


@dataclass(frozen=True, kw_only=True)
class LowEntropy:
    """The mean entropy of the free positions is below `mean_nats`."""

    mean_nats: float = 0.005

    def done(self, history: History) -> Tensor:
        """Rows that are certain."""
        free = history.free
        total = torch.where(free, history.entropy_nats, 0.0).sum(-1)
        return total / free.sum(-1).clamp(min=1) < self.mean_nats


@dataclass(frozen=True)
class AllOf:
    """Every rule says so. No rule at all never does."""

    rules: Sequence[StopRule]

    def done(self, history: History) -> Tensor:
        """Rows on which all agree."""
        if not self.rules:
            return _none(history)
        return torch.stack([rule.done(history) for rule in self.rules]).all(0)


@dataclass(frozen=True)
class AnyOf:
    """At least one rule says so."""

    rules: Sequence[StopRule]

    def done(self, history: History) -> Tensor:
        """Rows on which one of them holds."""
        if not self.rules:
            return _none(history)
        return torch.stack([rule.done(history) for rule in self.rules]).any(0)


def reference_stop(config: SamplerConfig) -> StopRule:
    """Stable and certain, as `transformers` stops; never, when either threshold is None."""
    if config.stability_passes is None or config.mean_entropy_nats is None:
        return AllOf(())
    return AllOf(
        (
            Stable(passes=config.stability_passes),
            LowEntropy(mean_nats=config.mean_entropy_nats),
        )
    )


def _none(history: History) -> Tensor:
    return torch.zeros(history.free.shape[0], dtype=torch.bool, device=history.free.device)
