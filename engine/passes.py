"""Work that needs the model pass by pass, so that several pieces of it can share a pass.

A piece of work is a generator: it yields the passes it needs next and is sent their readings. What
it yields may be empty: then it only lets others have their turn.

    work ──passes──▶ driver ──▶ model.run ──readings──▶ work … ──▶ result
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import ModelConfig
from infilld.engine.reading import Ask, Belief, Reading

T = TypeVar("T")


@dataclass(frozen=True)
class CanvasPass:
    """What one pass reads: canvases that share an encoded prefix.

    Attributes:
        canvas: token ids [R, L] int64, any L of 1 or more.
        cache: the encoded prefix, only read.
        belief: what the canvas is told, from the step before or of what is given: a `Belief`, or
            logits [R, L, V]; None: nothing.
        ask: what is wanted of its logits.
    """

    canvas: Tensor
    cache: PrefixCache
    belief: Belief | Tensor | None
    ask: Ask


class CanvasModel(Protocol):
    """What the engine needs of a model, whatever its weights are and wherever they are."""

    @property
    def config(self) -> ModelConfig:
        """Shapes."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Type of hidden states and of the cache."""
        ...

    @property
    def belief_tokens(self) -> int | None:
        """Tokens a belief should hold; None: all logits."""
        ...

    @property
    def parameter_count(self) -> int:
        """Numbers in its weights."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""
        ...

    @property
    def context_tokens(self) -> int:
        """Longest prefix that leaves room for a canvas."""
        ...

    @property
    def most_prefixes(self) -> int:
        """Prefix caches that there may be at once."""
        ...

    def new_cache(self, margin_tokens: int | None = None) -> PrefixCache:
        """An empty prefix cache; see `PrefixCache` for the margin."""
        ...

    def encode(
        self, tokens: Tensor, cache: PrefixCache, check: Callable[[], None] | None = None
    ) -> Tensor:
        """Read tokens [N] causally, extending the cache; their normed hidden states [N, D].

        Tokens are on the host, here and in `read` and `log_probabilities`.
        """
        ...

    def read(self, rows: Sequence[Tensor], cache: PrefixCache) -> list[Tensor]:
        """Read token rows [N] causally, each after the prefix; hidden states [N, D] of each."""
        ...

    def run(self, passes: Sequence[CanvasPass]) -> list[Reading]:
        """One pass over the canvases of several prefixes, side by side."""
        ...

    def log_probabilities(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Of tokens [N] int64 behind hidden states [N, D]: [N] float32, nats."""
        ...

    def best(self, hidden: Tensor, banned: Tensor) -> Tensor:
        """The most probable tokens [N] int64 behind [N, D] that are not banned [V] bool."""
        ...


Work: TypeAlias = Generator[Sequence[CanvasPass], Sequence[Reading], T]


def drive(model: CanvasModel, work: Work[T]) -> T:
    """Run a piece of work to its end, alone."""
    readings: Sequence[Reading] | None = None
    while True:
        try:
            passes = next(work) if readings is None else work.send(readings)
        except StopIteration as end:
            result: T = end.value
            return result
        # Not in the try: a StopIteration of the model would pass for the work's end.
        readings = model.run(passes) if passes else []


def together(works: Sequence[Work[T]]) -> Work[list[T]]:
    """Several pieces of work side by side, their passes in one; results in the same order.

    When one of them raises, the others are closed.
    """
    results: dict[int, T] = {}
    wanted: dict[int, Sequence[CanvasPass]] = {}
    sent: dict[int, Sequence[Reading] | None] = dict.fromkeys(range(len(works)))
    try:
        while sent:
            for number, readings in sent.items():
                try:
                    work = works[number]
                    wanted[number] = next(work) if readings is None else work.send(readings)
                except StopIteration as end:
                    wanted.pop(number, None)
                    results[number] = end.value
            if not wanted:
                break
            all_readings = iter((yield [each for passes in wanted.values() for each in passes]))
            sent = {
                number: [next(all_readings) for _ in passes] for number, passes in wanted.items()
            }
    finally:
        for work in works:
            work.close()
    return [results[number] for number in range(len(works))]
