"""What a worker counts: answers by reason, tokens and passes, and the times of the last jobs."""

import math
import statistics
from collections import Counter, deque
from collections.abc import Sequence

from infilld.engine.request import InfillResult
from infilld.engine.scheduler import AnyRequest, AnyResult

_TIMED_JOBS = 512
_REPORTED = (
    "passes",
    "prompt_tokens",
    "cached_tokens",
    "background_jobs",
    "prefetches",
    "answered_at_once",
    "loads",
    "rounds",
)


class Counts:
    """Counts since the start; the worker holds its lock around every call.

    Attributes:
        reasons: of answers. events: what became of them. totals: everything else, by name.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self._job_ms: deque[float] = deque(maxlen=_TIMED_JOBS)
        self._pass_ms: deque[float] = deque(maxlen=_TIMED_JOBS)

    def ended(self, request: AnyRequest, reason: str, result: AnyResult | None) -> None:
        """A job has ended: with a result, or, None, with the error whose code is the reason."""
        self.reasons[reason] += 1
        self.totals["background_jobs"] += request.background
        if result is None or result.reason == "superseded":
            return
        for name in ("passes", "prompt_tokens", "cached_tokens"):
            self.totals[name] += getattr(result.usage, name)
        if not request.background:
            self._job_ms.append(result.timings.total_ms)
            texts = result.alternatives if isinstance(result, InfillResult) else result.answers
            is_at_once = bool(texts) and result.usage.passes == 0
            self.totals["answered_at_once"] += is_at_once

    def shared(self, jobs: int) -> None:
        """A pass is run for so many jobs."""
        self.totals["rounds"] += 1
        self.totals["shared"] += jobs

    def passed(self, ms: float) -> None:
        """A pass took so long."""
        self._pass_ms.append(ms)

    def report(self) -> dict[str, object]:
        """The part of `Worker.stats` that is counted."""
        times = sorted(self._job_ms)
        rounds = self.totals["rounds"]
        return {
            "jobs": sum(self.reasons.values()),
            "reasons": dict(self.reasons),
            "feedback": dict(self.events),
            **{name: self.totals[name] for name in _REPORTED},
            "jobs_per_round": self.totals["shared"] / rounds if rounds else None,
            "pass_p50_ms": statistics.median(self._pass_ms) if self._pass_ms else None,
            "p50_ms": _nearest_rank(times, 0.50),
            "p95_ms": _nearest_rank(times, 0.95),
        }


def _nearest_rank(ordered: Sequence[float], share: float) -> float | None:
    """The smallest of these that so many are not above: a time that some job really took."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
