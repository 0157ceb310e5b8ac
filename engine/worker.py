"""Owns the device and the loaded model; runs the live jobs on its own thread, round after round.

    submit ──▶ Schedule ──admit──▶ Run: engine.work(request) ──┐ one turn each: to the passes it
                  ▲                  ▲                         │ wants, or to its result ──▶ future
      cancel, supersede, deadline    └── readings ── a shared pass ◀┘

Turns and passes are `rounds.py`; the model comes and goes in `resident.py`; `clock.py` answers in
time what has nothing to show. A background job has its turns while no other job is open, or while
one waits for an encoded prefix, which it may hold.
"""

import logging
import threading
from pathlib import Path
from typing import Literal, overload

from infilld.engine.clock import Clock
from infilld.engine.conversation import ChatRequest, ChatResult
from infilld.engine.counts import Counts
from infilld.engine.errors import (
    Busy,
    Cancelled,
    InfilldError,
    Loading,
    ModelError,
)
from infilld.engine.loading import load_infiller, pick_device, starter_folder
from infilld.engine.outcomes import nothing, settled, superseded
from infilld.engine.placement import NO_LIMITS, Limits
from infilld.engine.prefetch import Answers
from infilld.engine.request import InfillRequest, InfillResult
from infilld.engine.resident import IdleUnload, Resident, State
from infilld.engine.rounds import Rounds, Run
from infilld.engine.scheduler import (
    MAX_LIVE,
    MAX_QUEUED,
    AnyJob,
    AnyRequest,
    AnyResult,
    Job,
    OnCanvas,
    Schedule,
)

__all__ = [
    "MAX_QUEUED",
    "Event",
    "IdleUnload",
    "Job",
    "OnCanvas",
    "Worker",
    "load_infiller",
    "pick_device",
    "starter_folder",
]

log = logging.getLogger(__name__)

Event = Literal["shown", "inserted", "partly", "dismissed", "retained"]


class Worker:
    """One model on one device, behind a schedule.

    Args:
        folder: checkpoint; None: the embedded starter model.
        device: "cpu", "cuda", "cuda:N", or "auto": CUDA where there is one.
        idle_unload_minutes: so long without a job, and the model is dropped; the next job loads
            it again, and waits. 0: never. "auto": 15 for 1 GiB or more on a GPU, else never.
        max_live: jobs that share the device; 1 is for comparison.
        limits: what may be used of a GPU.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        device: str = "auto",
        idle_unload_minutes: IdleUnload = "auto",
        max_live: int = MAX_LIVE,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self._wake = threading.Condition()
        self._schedule, self._answers, self._counts = Schedule(max_live), Answers(), Counts()
        self._resident = Resident(
            folder, device, limits, idle_unload_minutes, self._wake, self._lose
        )
        self._rounds = Rounds(self._schedule, self._wake, self._counts, self._ended)
        self._closing = self._is_broken = False
        self._thread = threading.Thread(target=self._work, name="infilld-worker", daemon=True)
        self._clock = Clock(self._schedule, self._rounds, self._wake, self._grace_s, self._strike)

    @property
    def state(self) -> State:
        """`unloaded`: the next job waits until the model is loaded again."""
        return self._resident.state

    @property
    def failure(self) -> InfilldError | None:
        """Why the model could not be loaded."""
        return self._resident.failure

    @property
    def model_name(self) -> str:
        """Name of the checkpoint."""
        return self._resident.name

    def start(self) -> None:
        """Begin to load; returns at once."""
        with self._wake:
            self._resident.load_soon()
        self._thread.start()
        self._clock.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the model is loaded.

        Raises:
            InfilldError: why it could not be loaded; Loading: not within the time.
        """
        if not self._resident.loaded.wait(timeout_s):
            raise Loading(f"{self.model_name} is still loading after {timeout_s:g} s")
        self._refuse_failed()

    @overload
    def submit(
        self, request: InfillRequest, on_canvas: OnCanvas | None = None
    ) -> Job[InfillResult]: ...

    @overload
    def submit(
        self, request: ChatRequest, on_canvas: OnCanvas | None = None
    ) -> Job[ChatResult]: ...

    @overload
    def submit(self, request: AnyRequest, on_canvas: OnCanvas | None = None) -> AnyJob: ...

    def submit(self, request: AnyRequest, on_canvas: OnCanvas | None = None) -> AnyJob:
        """Queue a request; an open one of the same document is superseded.

        A request in the background supersedes no other. An unloaded model is loaded again; who
        asks during a switch waits for the next model.

        Raises:
            Loading: the model is not there yet; ModelError: it never will be.
            Busy: the queue is full.
        """
        job: AnyJob = Job(request, on_canvas, self._withdraw)
        with self._wake:
            self._refuse_failed()
            if self.state == "loading":
                raise Loading(f"{self.model_name} is still loading")
            if self._closing:
                raise Busy("the daemon is stopping")
            older = self._schedule.add(job)
            if not request.background:
                self._answers.begin(job.id, request.document)
            self._wake.notify_all()
        for old in older:
            self._answer(old, superseded(old))
        return job

    def feedback(
        self, job_id: str, event: Event, *, choice: int = 0, chars: int | None = None
    ) -> None:
        """Count what became of a suggestion; one that was inserted is followed up.

        Args:
            job_id: of the answer. event: what happened to it. choice: of which of its texts.
            chars: how many code points were inserted; None: all.

        Raises:
            UnknownId: not one of the last answers. UnknownOption: it had no such choice.
        """
        with self._wake:
            self._answers.know(job_id, choice)
            self._counts.events[event] += 1
        if event == "inserted":
            self.accepted(job_id, choice, chars)

    def accepted(self, job_id: str, choice: int, chars: int | None) -> None:
        """Prepare, in the background, for what is asked after a suggestion was inserted.

        Nothing happens where the answer is unknown, older than a minute, or not the newest of its
        document. Args as for `feedback`.
        """
        with self._wake:
            request = self._answers.follow_up(job_id, choice, chars)
            if request is None or self._closing:
                return
            try:
                prefetch: AnyJob = Job(request, None, self._withdraw)
                older = self._schedule.add(prefetch)
            except Busy:
                return
            self._counts.totals["prefetches"] += 1
            self._wake.notify_all()
        for old in older:
            self._answer(old, superseded(old))

    def switch(self, folder: Path | None) -> None:
        """Load another checkpoint (None: the starter) in place of this one; returns at once.

        Open jobs end first; queued and new ones wait for the new model, which is loaded when the
        old one is gone. Where it cannot be loaded the old one is loaded again, and `describe` has
        the reason as `switch_failure`. The checkpoint that is loaded is read anew.

        Raises:
            Busy: it is switching already, or stopping. ModelError: the engine broke.
        """
        with self._wake:
            if self._is_broken:
                self._refuse_failed()
            if self._closing:
                raise Busy("the daemon is stopping")
            self._resident.switch(folder)
            self._wake.notify_all()

    def unload(self) -> None:
        """Give the model's memory back once no job is open; the next job loads it again."""
        with self._wake:
            self._resident.unload_soon()
            self._wake.notify_all()

    def describe(self) -> dict[str, object]:
        """What is loaded, for people and for `/v1/models`.

        During a switch `state` is `switching` and `switching_to` names the next model.
        """
        return self._resident.describe() | {"max_live": self._schedule.max_live}

    def stats(self) -> dict[str, object]:
        """Counts since the start and times of the last jobs, in ms.

        `passes` counts what requests asked for, `rounds` the passes that were run for one or
        several of them; `answered_at_once` are those that needed none. Times are of jobs that
        somebody waited for.
        """
        with self._wake:
            queued, running = len(self._schedule.waiting), len(self._schedule.live)
            self._counts.totals["loads"] = self._resident.loads
            now = {
                "queued": queued,
                "running": running,
                "switching": self._resident.is_switching,
            }
            return now | self._counts.report()

    def close(self) -> None:
        """Stop after the running turn; every open job ends with Cancelled."""
        with self._wake:
            self._closing = True
            open_jobs = [*self._schedule.waiting, *self._schedule.live]
            loader = self._resident.loader
            self._clock.stop()
        for job in open_jobs:
            job.cancel()
        for thread in (self._thread, self._clock, loader):
            if thread is not None and thread.is_alive():
                thread.join()

    def _refuse_failed(self) -> None:
        if self.failure is not None and self.state == "failed":
            # Without its traceback: that would grow, and hold every request, at each raise.
            raise self.failure.with_traceback(None)

    def _withdraw(self, job: AnyJob) -> None:
        """End a job that has not begun; one that runs ends at its next check."""
        with self._wake:
            if not self._schedule.withdraw(job):
                return
        self._answer(job, Cancelled("the client went away"))

    # The thread.

    def _work(self) -> None:
        try:
            while self._wait():
                if self._resident.engine is not None:
                    self._rounds.round(self._resident.engine)
        except BaseException as error:
            # Nobody may wait for a thread that is gone.
            log.exception("the worker's thread died")
            self._fail(ModelError(f"the engine broke: {type(error).__name__}: {error}"))

    def _fail(self, error: InfilldError) -> None:
        with self._wake:
            self._is_broken = True
            self._resident.failure, self._resident.state = error, "failed"
            self._clock.stop()
        self._lose(error)

    def _lose(self, error: InfilldError) -> None:
        """Answer all who wait for a model that does not come."""
        with self._wake:
            open_jobs = self._schedule.clear()
        for job in open_jobs:
            self._answer(job, error)

    def _wait(self) -> bool:
        """Wait for work; False: there will be none."""
        while True:
            self._rounds.sweep()
            with self._wake:
                if self._closing and not self._schedule.live:
                    return False
                self._schedule.is_held = self._resident.is_switching
                engine = self._resident.engine
                if engine is not None:
                    for job in self._schedule.admit():
                        self._rounds.begin(engine, job)
                    if self._schedule.turn():
                        return True
                elif self._schedule.waiting and not self._resident.is_switching:
                    self._resident.load_soon()
                # It may be about to go.
                del engine
                left_s = None
                if not self._rounds.runs:
                    left_s = self._resident.rest(is_open=bool(self._schedule.waiting))
                self._wake.wait(left_s)

    def _ended(self, run: Run, outcome: AnyResult | BaseException) -> None:
        with self._wake:
            self._resident.used()
        self._answer(run.job, settled(run, outcome))

    # The answers.

    def _grace_s(self) -> float:
        """How late an answer may be that is about to come: half a pass."""
        engine = self._resident.engine
        return 0.0 if engine is None else engine.pace.pass_s / 2

    def _strike(self, job: AnyJob) -> None:
        self._answer(job, nothing(job, "deadline", "The deadline struck before the first pass."))

    def _answer(self, job: AnyJob, outcome: AnyResult | BaseException) -> None:
        """Resolve a job, unless it was answered already."""
        with self._wake:
            if job.is_answered:
                return
            job.is_answered = True
            if isinstance(outcome, AnyResult):
                if not job.request.background and outcome.reason != "superseded":
                    self._answers.keep(job.request, outcome)
                self._counts.ended(job.request, outcome.reason, outcome)
            else:
                told = outcome if isinstance(outcome, InfilldError) else InfilldError
                self._counts.ended(job.request, told.code, None)
        if isinstance(outcome, AnyResult):
            job.future.set_result(outcome)
        else:
            job.future.set_exception(outcome)
