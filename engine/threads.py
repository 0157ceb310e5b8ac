"""How many threads a pass gets: torch's, or one where the others only make it wait.

A product that is split among cores is done when the slowest is. Beside another busy process that
is a core which has other work too, and a pass of a hundred products waits a hundred times; a small
pass is not worth waking anybody. Both show in the same way: little of the other cores' time is used
while the pass lasts. This needs threads that soon sleep while they wait (OMP_WAIT_POLICY=passive);
where they spin, nothing is noticed and nothing changed.

Two cores, a starter's pass over 32 tokens beside a busy process: p50 14 ms and p99 16 ms; 23 and
50 ms with both threads always.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

# Processor time for each second that a pass takes, below which other threads do not pay.
PAYING = 1.3
# Passes running that must not pay, and for how long they then run alone before another trial.
TRIALS = 2
ALONE_S = 2.0


@dataclass
class _Tried:
    """Of passes of one size: those in a row that did not pay, and until when they run alone."""

    failed: int = 0
    alone_until: float = 0.0


class Threads:
    """Decides before each computation, by those of about the same size before it."""

    def __init__(self) -> None:
        self._most = torch.get_num_threads()
        self._tried: dict[int, _Tried] = {}

    def run(self, size: int, compute: Callable[[], T]) -> T:
        """What `compute` returns.

        Args:
            size: what makes computations alike, for example tokens; 17 and 31 are about the same.
            compute: leaves the number of threads as it is.
        """
        if self._most == 1:
            return compute()
        tried = self._tried.setdefault(size.bit_length(), _Tried())
        wall, processor = time.perf_counter(), time.process_time()
        if wall < tried.alone_until:
            torch.set_num_threads(1)
            try:
                return compute()
            finally:
                torch.set_num_threads(self._most)
        result = compute()
        now, processor = time.perf_counter(), time.process_time() - processor
        tried.failed = tried.failed + 1 if processor < PAYING * (now - wall) else 0
        if tried.failed >= TRIALS:
            # One more trial then decides.
            tried.failed, tried.alone_until = TRIALS - 1, now + ALONE_S
        return result
