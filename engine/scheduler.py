"""What runs next: jobs that wait, jobs that are live, and who shares the next pass.

    add ──▶ waiting ──admit──▶ live ──remove──▶ answered
              │ ▲                │ turn: interactive jobs, else background ones
              │ └ newest of its document: older ones are superseded, waiting or live
              └ expired: the deadline struck in the queue

No tensors, no threads: the worker holds its lock around every call.
"""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from infilld.engine.conversation import ChatRequest, ChatResult
from infilld.engine.errors import Busy, Cancelled
from infilld.engine.request import InfillRequest, InfillResult

AnyRequest = InfillRequest | ChatRequest
AnyResult = InfillResult | ChatResult

T = TypeVar("T")
R = TypeVar("R", InfillResult, ChatResult)

# Whoever has a daemon to themselves rarely has two; a team's editors may all ask at once. A request
# that waits holds its text alone.
MAX_QUEUED = 256
MAX_LIVE = 4
# Each holds an encoded prompt while it is suspended.
MAX_LIVE_BACKGROUND = 1

OnCanvas = Callable[[Any], None]
"""Called with the updates that belong to the request."""


class Superseded(Exception):
    """A newer job of the same document took over."""


class Struck(Exception):
    """The deadline struck before there was anything to show, and the job was answered so."""


@dataclass(eq=False)
class Job(Generic[R]):
    """A request on its way. `future` ends with a result, or raises an InfilldError.

    Attributes:
        id: names the job and its result.
        request: what was asked. on_canvas: called on the worker's thread after every pass.
        future: the answer. arrived_at: `time.monotonic()` reading, seconds.
        is_answered: `future` is spoken for; whoever sets this, with the worker's lock, resolves it.
    """

    request: AnyRequest
    on_canvas: OnCanvas | None
    _withdraw: Callable[["Job[R]"], None]
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    future: "Future[R]" = field(default_factory=Future)
    arrived_at: float = field(default_factory=time.monotonic)
    is_answered: bool = False
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _superseded: threading.Event = field(default_factory=threading.Event)
    _struck: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give the job up: takes effect within one pass, then `future` raises Cancelled."""
        self._cancelled.set()
        self._withdraw(self)

    def supersede(self) -> None:
        """End the job with the reason `superseded`."""
        self._superseded.set()

    def strike(self) -> None:
        """End the job, which was answered with the reason `deadline`."""
        self._struck.set()

    def check(self) -> None:
        """Raise if the job is no longer wanted."""
        if self._cancelled.is_set():
            raise Cancelled("the client went away")
        if self._superseded.is_set():
            raise Superseded
        if self._struck.is_set():
            raise Struck

    @property
    def deadline_at(self) -> float | None:
        """`time.monotonic()` reading at which the deadline strikes."""
        ms = self.request.deadline_ms
        return None if ms is None else self.arrived_at + ms / 1e3


AnyJob = Job[Any]


class Schedule:
    """The open jobs, each either waiting or live; oldest first.

    Args:
        max_live: interactive jobs that run side by side.
        max_queued: jobs that may wait, of the background and others each.

    Attributes:
        is_held: no job begins, and nobody makes way for those that wait.
    """

    def __init__(self, max_live: int = MAX_LIVE, max_queued: int = MAX_QUEUED) -> None:
        self.max_live = max_live
        self._most = ((False, max_live), (True, MAX_LIVE_BACKGROUND))
        self._max_queued = max_queued
        self.is_held = False
        self._waiting: list[AnyJob] = []
        self._live: list[AnyJob] = []

    @property
    def waiting(self) -> Sequence[AnyJob]:
        """Jobs that have not begun."""
        return tuple(self._waiting)

    @property
    def live(self) -> Sequence[AnyJob]:
        """Jobs that have begun, suspended ones too."""
        return tuple(self._live)

    def add(self, job: AnyJob) -> list[AnyJob]:
        """Queue a job; returns the waiting ones it supersedes, which are open no more.

        Live ones are told, and end at their next check. A background job supersedes only
        background ones.

        Raises:
            Busy: too many wait; nothing has changed.
        """
        request = job.request
        older = (
            []
            if request.document is None
            else [
                other
                for other in (*self._waiting, *self._live)
                if other.request.document == request.document
                and (other.request.background or not request.background)
            ]
        )
        alike = [
            other
            for other in self._waiting
            if other.request.background == request.background and other not in older
        ]
        if len(alike) >= self._max_queued:
            raise Busy(f"{len(alike)} requests are waiting")
        superseded = [other for other in older if other in self._waiting]
        for other in older:
            other.supersede()
        self._waiting = [other for other in self._waiting if other not in superseded]
        self._waiting.append(job)
        return superseded

    def admit(self) -> list[AnyJob]:
        """Let waiting jobs begin, as many as may; returns them.

        A background job begins when no interactive one is open.
        """
        begun: list[AnyJob] = []
        for is_background, most in () if self.is_held else self._most:
            if is_background and self.is_interactive:
                break
            live = sum(job.request.background == is_background for job in self._live)
            ready = [job for job in self._waiting if job.request.background == is_background]
            begun += ready[: max(0, most - live)]
        self._waiting = [job for job in self._waiting if job not in begun]
        self._live += begun
        return begun

    def turn(self) -> list[AnyJob]:
        """The live jobs that may go on now: interactive ones, or else those of the background."""
        return [job for job in self._live if job.request.background != self.is_interactive]

    @property
    def is_interactive(self) -> bool:
        """Whether anybody waits for an answer that may come now."""
        waiting = () if self.is_held else self._waiting
        return any(not job.request.background for job in (*waiting, *self._live))

    def expired(self, now: float) -> list[AnyJob]:
        """Take out the waiting jobs whose deadline has struck."""
        late = [
            job for job in self._waiting if job.deadline_at is not None and job.deadline_at <= now
        ]
        self._waiting = [job for job in self._waiting if job not in late]
        return late

    def withdraw(self, job: AnyJob) -> bool:
        """Take out a waiting job; False: it has begun, or is not open."""
        if job not in self._waiting:
            return False
        self._waiting.remove(job)
        return True

    def remove(self, job: AnyJob) -> None:
        """Take out a live job that has ended."""
        self._live.remove(job)

    def clear(self) -> list[AnyJob]:
        """Take out every job."""
        jobs = [*self._waiting, *self._live]
        self._waiting, self._live = [], []
        return jobs

    def check(self) -> None:
        """Refuse a state that breaks a promise."""
        jobs = [*self._waiting, *self._live]
        assert len(set(map(id, jobs))) == len(jobs), "a job is open once"
        for is_background, most in self._most:
            waiting = [job for job in self._waiting if job.request.background == is_background]
            live = [job for job in self._live if job.request.background == is_background]
            assert len(waiting) <= self._max_queued, "the queue is bounded"
            assert len(live) <= most, "the live jobs are bounded"
            named = [job.request.document for job in waiting if job.request.document is not None]
            assert len(set(named)) == len(named), "one waiting job a document"


def fitting(wanted: Sequence[tuple[T, int]], limit: int) -> list[T]:
    """Those of the first come that share one pass of at most `limit` positions.

    Args:
        wanted: who waits for passes over how many positions, the longest waiting first.
        limit: positions; the first is taken even if it needs more, so that nobody starves.
    """
    taken: list[T] = []
    free = limit
    for each, positions in wanted:
        if not taken or positions <= free:
            taken.append(each)
            free -= positions
    return taken
