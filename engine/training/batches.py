"""The batches of a run, one for each step: made when asked for, or ahead by other processes.

A batch depends on the seed, the number of its step and the shapes of its phase alone, so that a
resumed run sees the same ones. Workers are a few steps ahead: so is the change of phase with them.
"""

import multiprocessing
import os
import random
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor

from infilld.engine.training.examples import Batch, ExampleBuilder, ExampleShape

# Shape and share of the steps that have it.
Shapes = Sequence[tuple[ExampleShape, float]]
# Batches in the making for each worker; more only costs memory.
_AHEAD = 2
_MOST_WORKERS = 12


class Batches:
    """Batches by step.

    Args:
        builder: of examples. seed: of every choice.
        workers: processes that work ahead; 0: none. A GPU waits for one process most of the time.
    """

    def __init__(self, builder: ExampleBuilder, seed: int, *, workers: int = 0) -> None:
        self._builder, self._seed = builder, seed
        self._ahead = workers * _AHEAD
        self._pool: ProcessPoolExecutor | None = None
        self._waiting: dict[int, Future[Batch]] = {}
        if workers:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, context, _start, (builder, seed))

    def take(self, step: int, shapes: Shapes) -> Batch:
        """The batch of a step, of one of the shapes; steps are asked for in order."""
        if self._pool is None:
            return make_batch(self._builder, shapes, self._seed, step)
        for wanted in range(step, step + self._ahead):
            if wanted not in self._waiting:
                self._waiting[wanted] = self._pool.submit(_make, shapes, wanted)
        return self._waiting.pop(step).result()

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def workers_for(device_type: str) -> int:
    """How many processes pay: on a CPU they would take what the training needs."""
    if device_type == "cpu":
        return 0
    return max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - 2))


def make_batch(builder: ExampleBuilder, shapes: Shapes, seed: int, step: int) -> Batch:
    """The batch of a step."""
    rng = random.Random(f"{seed}/{step}")
    kinds, shares = zip(*shapes, strict=True)
    return builder.batch(rng.choices(kinds, shares)[0], rng)


_worker: list[tuple[ExampleBuilder, int]] = []


def _start(builder: ExampleBuilder, seed: int) -> None:
    _worker.append((builder, seed))


def _make(shapes: Shapes, step: int) -> Batch:
    (builder, seed) = _worker[0]
    return make_batch(builder, shapes, seed, step)
