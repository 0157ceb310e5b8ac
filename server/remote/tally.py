"""What a remote engine's worker remembers: counts, times, and which answers feedback may name."""

import statistics
from collections import Counter, OrderedDict, deque

from infilld.engine.conversation import ChatResult
from infilld.engine.errors import InfilldError, UnknownId, UnknownOption
from infilld.engine.scheduler import AnyJob, AnyResult
from infilld.server.jobs import Event

_ANSWERS = 256
_TIMED_JOBS = 512


class Tally:
    """No threads of its own: the worker holds its lock around every call."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._job_ms: deque[float] = deque(maxlen=_TIMED_JOBS)
        self._answers: OrderedDict[str, int] = OrderedDict()
        self._local_ids: dict[str, str] = {}

    def count(self, name: str) -> None:
        """One more of what `stats` tells under a name of its own."""
        self._totals[name] += 1

    def known_as(self, job_id: str, local_id: str) -> None:
        """The local model answers a job, under another id."""
        self._local_ids[job_id] = local_id

    def ended(self, job: AnyJob, outcome: AnyResult | BaseException) -> None:
        """A job has its answer."""
        self._totals["background_jobs"] += job.request.background
        if isinstance(outcome, BaseException):
            code = outcome.code if isinstance(outcome, InfilldError) else InfilldError.code
            self._reasons[code] += 1
            self._local_ids.pop(job.id, None)
            return
        self._reasons[outcome.reason] += 1
        if outcome.reason == "superseded":
            self._local_ids.pop(job.id, None)
            return
        self._totals["prompt_tokens"] += outcome.usage.prompt_tokens
        self._totals["cached_tokens"] += outcome.usage.cached_tokens
        if not job.request.background:
            self._job_ms.append(outcome.timings.total_ms)
        if isinstance(outcome, ChatResult):
            self._answers[job.id] = len(outcome.answers)
        else:
            self._answers[job.id] = len(outcome.alternatives)
        while len(self._answers) > _ANSWERS:
            old, _ = self._answers.popitem(last=False)
            self._local_ids.pop(old, None)

    def told(self, job_id: str, event: Event, choice: int) -> str | None:
        """Count what became of an answer.

        Returns:
            The id under which the local model gave it; None: the remote engine did.

        Raises:
            UnknownId: not one of the last answers. UnknownOption: it had no such choice.
        """
        count = self._answers.get(job_id)
        if count is None:
            raise UnknownId(f"no answer {job_id!r} among the last {_ANSWERS}")
        if not 0 <= choice < max(1, count):
            raise UnknownOption(f"choice is {choice}, the answer had {count}")
        self._events[event] += 1
        return self._local_ids.get(job_id)

    def stats(self) -> dict[str, object]:
        """Counts since the start and times of the last answers, in ms."""
        times, totals = sorted(self._job_ms), self._totals
        # Nobody waited longer than the longest of them.
        several = len(times) > 1
        centiles = statistics.quantiles(times, n=20, method="inclusive") if several else times * 19
        counted = ("prompt_tokens", "cached_tokens", "background_jobs", "retries")
        return {
            "jobs": sum(self._reasons.values()),
            "reasons": dict(self._reasons),
            "feedback": dict(self._events),
            **{name: totals[name] for name in counted},
            "answered": {name: totals[name] for name in ("remote", "local")},
            "p50_ms": centiles[9] if times else None,
            "p95_ms": centiles[18] if times else None,
        }
