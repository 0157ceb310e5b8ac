"""How long things take here, so that a deadline is kept and not only noticed."""

import time
from collections.abc import Callable
from typing import TypeVar

from infilld.engine.passes import Work

T = TypeVar("T")

# How much the last measurement counts.
_NEWEST = 0.3
_EASED = 0.5
# Another job may have its turn in between.
_MARGIN = 1.25
# What was measured so long ago may no longer hold.
_STALE_S = 5.0


class Pace:
    """Times, in seconds, as they are to be expected at worst; 0 before the first.

    Attributes:
        piece_s: to encode a piece of a prompt. pass_s: for a pass over a canvas, with whatever
            shared it. closing_s: from the last pass to the answer.
        measured_at: `time.monotonic()` reading of the last measurement.
    """

    def __init__(self) -> None:
        self.piece_s = self.pass_s = self.closing_s = 0.0
        self.measured_at = time.monotonic()

    def needed_s(self, *, passes: int) -> float:
        """Seconds until an answer, with so many passes before it."""
        return _MARGIN * (passes * self.pass_s + self.closing_s)

    def ease(self) -> None:
        """Expect less: a request was given up for what was expected, and nothing measured it.

        While others are being measured, what is expected is kept.
        """
        if time.monotonic() - self.measured_at < _STALE_S:
            return
        self.piece_s, self.pass_s, self.closing_s = (
            _EASED * each for each in (self.piece_s, self.pass_s, self.closing_s)
        )

    def timed(self, check: Callable[[], None]) -> Callable[[], None]:
        """A check before each piece that also measures the piece before it."""
        last: float | None = None

        def checked() -> None:
            nonlocal last
            now = time.monotonic()
            if last is not None:
                self.piece_s = _expected(self.piece_s, now - last)
                self.measured_at = now
            last = now
            check()

        return checked

    def passes(self, work: Work[T]) -> Work[T]:
        """Work on a canvas, measured."""
        closing = time.monotonic()
        before: float | None = None
        try:
            wanted = next(work)
            while True:
                began = time.monotonic()
                readings = yield wanted
                taken = time.monotonic() - began
                if wanted:
                    # A GPU is only told to begin: what a pass takes shows from one to the next.
                    whole = taken if before is None else max(taken, began - before)
                    self.pass_s = _expected(self.pass_s, whole)
                before = began if wanted else None
                if wanted:
                    closing = time.monotonic()
                wanted = work.send(readings)
        except StopIteration as end:
            result: T = end.value
            self.measured_at = time.monotonic()
            self.closing_s = _expected(self.closing_s, self.measured_at - closing)
            return result


def _expected(old: float, new: float) -> float:
    """Up at once, down slowly: what was slow a moment ago may be slow again."""
    return max(new, (1 - _NEWEST) * old + _NEWEST * new)
