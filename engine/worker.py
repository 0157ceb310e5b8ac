"""Owns the device and the loaded model; runs the live jobs on its own thread, round after round.

    submit ──▶ Schedule ──admit──▶ _Run: engine.work(request) ──┐ one turn each: to the passes it
                  ▲                  ▲                          │ wants, or to its result ──▶ future
      cancel, supersede, deadline    └── readings ── a shared pass ◀┘

A round gives a turn to every job that has its readings, and to one of those that want none (one
piece of a prompt is encoded in it), and then runs the passes that are wanted as one. Everything
that ends a job early takes effect between two turns. A background job has its turns while no other
job is open, or while one waits for an encoded prefix, which it may hold. The model is loaded on a
thread of its own: whoever waits for it can still be cancelled.

A deadline is the work's own matter once there is a canvas: it ends with what it has. Before that,
in the queue and while a prompt is encoded, a clock on a third thread answers in time, whatever
turn of whichever job is running.
"""

import logging
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from infilld.engine.errors import (
    Busy,
    Cancelled,
    InfilldError,
    Loading,
    ModelError,
    NotEnoughMemory,
)
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.loading import (
    free_memory,
    load_infiller,
    pick_device,
    starter_folder,
    use_device,
)
from infilld.engine.passes import CanvasPass, Work
from infilld.engine.placement import NO_LIMITS, Limits
from infilld.engine.prefetch import Answers
from infilld.engine.reading import Reading
from infilld.engine.request import InfillRequest, InfillResult, Reason
from infilld.engine.scheduler import (
    MAX_LIVE,
    MAX_QUEUED,
    Job,
    OnCanvas,
    Schedule,
    Struck,
    Superseded,
    fitting,
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

# Positions of a shared pass. On a CPU a canvas of 40 positions took 20.7 ms alone, 17.0 each where
# four shared a pass, and 17.4 where eight did (starter, two busy cores): beyond these everybody
# only waits longer. A GPU is not full so soon; its bound is not measured yet.
MAX_CPU_ROUND_TOKENS = 256
MAX_ROUND_TOKENS = 2048
_TIMED_JOBS = 512
# A model this small, or one on a CPU, is in nobody's way.
_LARGE_BYTES = 1 << 30
_IDLE_UNLOAD_S = 15 * 60.0

State = Literal["loading", "ready", "unloaded", "failed"]
Event = Literal["shown", "inserted", "partly", "dismissed", "retained"]
IdleUnload = float | Literal["auto"]


@dataclass(eq=False)
class _Run:
    """A live job and its work.

    Attributes:
        begun_at: `time.monotonic()` reading. served: number of its last turn or pass.
        wanted: passes whose readings it waits for; empty: it wants none.
        readings: of those passes, once they were run. has_canvas: some were run.
    """

    job: Job
    work: Work[InfillResult]
    begun_at: float
    served: int = 0
    has_begun: bool = False
    has_canvas: bool = False
    wanted: Sequence[CanvasPass] = ()
    readings: Sequence[Reading] | None = None

    @property
    def positions(self) -> int:
        """Positions of the passes it waits for."""
        return sum(each.canvas.numel() for each in self.wanted)

    def go_on(self) -> None:
        """Run the work to the next passes it wants.

        Raises:
            StopIteration: it has ended, with its result.
        """
        readings, self.readings, self.wanted = self.readings or (), None, ()
        was_begun, self.has_begun = self.has_begun, True
        self.wanted = self.work.send(readings) if was_begun else next(self.work)


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
        self.folder = starter_folder() if folder is None else folder
        self.model_name = "starter" if folder is None else self.folder.name
        self.state: State = "loading"
        self.failure: InfilldError | None = None
        self._device_wish, self._idle_wish = device, idle_unload_minutes
        self._limits = limits
        self._engine: Infiller | None = None
        self._about: dict[str, object] = {}
        self._schedule, self._answers = Schedule(max_live), Answers()
        self._runs: list[_Run] = []
        self._turns = self._round_tokens = 0
        self._idle_s = self._idle_since = 0.0
        self._wake = threading.Condition()
        self._closing = False
        self._loaded = threading.Event()
        self._loader: threading.Thread | None = None
        self._thread = threading.Thread(target=self._work, name="infilld-worker", daemon=True)
        self._clock = threading.Thread(target=self._keep_time, name="infilld-clock", daemon=True)
        self._reasons: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._job_ms: deque[float] = deque(maxlen=_TIMED_JOBS)
        self._pass_ms: deque[float] = deque(maxlen=_TIMED_JOBS)

    def start(self) -> None:
        """Begin to load; returns at once."""
        with self._wake:
            self._load_soon()
        self._thread.start()
        self._clock.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the model is loaded.

        Raises:
            InfilldError: why it could not be loaded; Loading: not within the time.
        """
        if not self._loaded.wait(timeout_s):
            raise Loading(f"{self.model_name} is still loading after {timeout_s:g} s")
        if self.failure is not None:
            raise self.failure.with_traceback(None)

    def submit(self, request: InfillRequest, on_canvas: OnCanvas | None = None) -> Job:
        """Queue a request; an open one of the same document is superseded.

        A request in the background supersedes no other. An unloaded model is loaded again.

        Raises:
            Loading: the model is not there yet; ModelError: it never will be.
            Busy: the queue is full.
        """
        if self.failure is not None:
            # Without its traceback: that would grow, and hold every request, at each raise.
            raise self.failure.with_traceback(None)
        if self.state == "loading":
            raise Loading(f"{self.model_name} is still loading")
        job = Job(request, on_canvas, self._withdraw)
        with self._wake:
            if self._closing:
                raise Busy("the daemon is stopping")
            superseded = self._schedule.add(job)
            if not request.background:
                self._answers.begin(job.id, request.document)
            self._wake.notify_all()
        for old in superseded:
            self._answer(old, _superseded(old))
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
            self._events[event] += 1
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
                superseded = self._schedule.add(Job(request, None, self._withdraw))
            except Busy:
                return
            self._totals["prefetches"] += 1
            self._wake.notify_all()
        for old in superseded:
            self._answer(old, _superseded(old))

    def describe(self) -> dict[str, object]:
        """What is loaded, for people and for `/v1/models`."""
        told = {"model": self.model_name, "folder": str(self.folder), "state": self.state}
        about = self._about
        return told | about | ({} if self._engine is not None or not about else {"memory_bytes": 0})

    def stats(self) -> dict[str, object]:
        """Counts since the start and times of the last jobs, in ms.

        `passes` counts what requests asked for, `rounds` the passes that were run for one or
        several of them; `answered_at_once` are those that needed none. Times are of jobs that
        somebody waited for.
        """
        with self._wake:
            queued, running = len(self._schedule.waiting), len(self._schedule.live)
            times, totals = sorted(self._job_ms), Counter(self._totals)
            pass_ms = statistics.median(self._pass_ms) if self._pass_ms else None
            reasons, events = dict(self._reasons), dict(self._events)
        centiles = statistics.quantiles(times, n=20) if len(times) > 1 else times * 19
        counted = (
            "passes",
            "prompt_tokens",
            "cached_tokens",
            "background_jobs",
            "prefetches",
            "answered_at_once",
            "loads",
            "rounds",
        )
        rounds = totals["rounds"]
        return {
            "queued": queued,
            "running": running,
            "jobs": sum(reasons.values()),
            "reasons": reasons,
            "feedback": events,
            **{name: totals[name] for name in counted},
            "jobs_per_round": totals["shared"] / rounds if rounds else None,
            "pass_p50_ms": pass_ms,
            "p50_ms": centiles[9] if times else None,
            "p95_ms": centiles[18] if times else None,
        }

    def close(self) -> None:
        """Stop after the running turn; every open job ends with Cancelled."""
        with self._wake:
            self._closing = True
            open_jobs = [*self._schedule.waiting, *self._schedule.live]
            loader = self._loader
            self._wake.notify_all()
        for job in open_jobs:
            job.cancel()
        for thread in (self._thread, self._clock, loader):
            if thread is not None and thread.is_alive():
                thread.join()

    def _withdraw(self, job: Job) -> None:
        """End a job that has not begun; one that runs ends at its next check."""
        with self._wake:
            if not self._schedule.withdraw(job):
                return
        self._answer(job, Cancelled("the client went away"))

    # The model comes and goes.

    def _load_soon(self) -> None:
        """Begin to load, unless that has begun; with the lock held."""
        if self._loader is None:
            self._loader = threading.Thread(target=self._load, name="infilld-load", daemon=True)
            self._loader.start()

    def _load(self) -> None:
        error: InfilldError | None = None
        engine: Infiller | None = None
        try:
            engine = load_infiller(self.folder, self._device_wish, self._limits)
        except InfilldError as found:
            error = found
        except Exception as found:
            log.exception("loading %s failed", self.folder)
            error = ModelError(f"{self.folder}: {type(found).__name__}: {found}")
        if engine is not None:
            self._about = _about(engine)
            is_cpu = engine.model.device.type == "cpu"
            self._round_tokens = MAX_CPU_ROUND_TOKENS if is_cpu else MAX_ROUND_TOKENS
            self._idle_s = _idle_s(engine, self._idle_wish)
        jobs: Sequence[Job] = ()
        with self._wake:
            self._loader = None
            self._idle_since = time.monotonic()
            if engine is not None:
                self._engine, self.state = engine, "ready"
                self._totals["loads"] += 1
            elif self.state == "unloaded":
                # It was loaded once: what is in the way, memory say, may be gone next time.
                jobs = self._schedule.clear()
            else:
                self.failure, self.state = error, "failed"
            self._wake.notify_all()
        for job in jobs:
            self._answer(job, error or ModelError("not loaded"))
        self._loaded.set()

    def _unload(self) -> None:
        """Drop the model; with the lock held, and no job open."""
        log.info("%s is unloaded after %g s without a request", self.model_name, self._idle_s)
        self._engine, self.state = None, "unloaded"
        free_memory()

    # The thread.

    def _work(self) -> None:
        try:
            while self._wait():
                self._round()
        except BaseException as error:
            # Nobody may wait for a thread that is gone.
            log.exception("the worker's thread died")
            self._fail(ModelError(f"the engine broke: {type(error).__name__}: {error}"))

    def _fail(self, error: InfilldError) -> None:
        with self._wake:
            self.failure, self.state = error, "failed"
            open_jobs = self._schedule.clear()
        for job in open_jobs:
            self._answer(job, error)

    def _wait(self) -> bool:
        """Wait for work; False: there will be none."""
        while True:
            self._sweep()
            with self._wake:
                if self.failure is not None:
                    return False
                if self._closing and not self._schedule.live:
                    return False
                if self._engine is not None:
                    begun = self._schedule.admit()
                    self._runs += [self._begun(self._engine, job) for job in begun]
                    if self._schedule.turn():
                        return True
                elif self._schedule.waiting:
                    self._load_soon()
                wait_s = None
                if self._engine is not None and self._idle_s and not self._runs:
                    wait_s = self._idle_since + self._idle_s - time.monotonic()
                    if wait_s <= 0:
                        self._unload()
                        continue
                self._wake.wait(wait_s)

    def _begun(self, engine: Infiller, job: Job) -> _Run:
        hooks = Hooks(on_canvas=job.on_canvas, check=job.check, deadline_at=job.deadline_at)
        return _Run(job, engine.work(job.request, hooks), time.monotonic(), served=self._turns)

    def _sweep(self) -> None:
        """End what is not wanted any more."""
        for run in tuple(self._runs):
            try:
                run.job.check()
            except (Cancelled, Superseded, Struck) as unwanted:
                self._end(run, unwanted)

    def _round(self) -> None:
        """A turn for those that can go on, then a pass for those that want one."""
        if self._engine is not None:
            use_device(self._engine.model.device)
        for run in self._next_turns():
            self._sweep()
            if run in self._runs:
                self._step(run)
        jobs = self._on_turn()
        wanting = sorted((run for run in self._runs if run.job in jobs), key=_by_service)
        wanted = [(run, run.positions) for run in wanting if run.wanted and run.readings is None]
        self._share(fitting(wanted, self._round_tokens))

    def _on_turn(self) -> Sequence[Job]:
        with self._wake:
            if self._engine is not None and self._engine.awaits_prefix:
                # A suspended job may hold what another waits for: it goes on, and gives it back.
                return self._schedule.live
            return self._schedule.turn()

    def _next_turns(self) -> list[_Run]:
        """Who goes on: all that have their readings, the most urgent first, and one other."""
        jobs = self._on_turn()
        runs = [run for run in self._runs if run.job in jobs]
        passed = [run for run in runs if run.readings is not None]
        others = sorted((run for run in runs if not run.wanted), key=_by_service)
        return [*sorted(passed, key=_by_deadline), *others[:1]]

    def _step(self, run: _Run) -> None:
        """One turn; whatever goes wrong is the job's answer, never the thread's end."""
        run.served = self._turns = self._turns + 1
        try:
            run.go_on()
        except StopIteration as end:
            self._end(run, end.value)
        except Exception as error:
            self._end(run, error)

    def _share(self, runs: Sequence[_Run]) -> None:
        """Run the passes of several jobs as one; where that fails, each alone, once."""
        if not runs or self._engine is None:
            return
        with self._wake:
            self._totals["rounds"] += 1
            self._totals["shared"] += len(runs)
        model = self._engine.model
        for run in runs:
            run.served = self._turns = self._turns + 1
        began = time.monotonic()
        try:
            all_readings = iter(model.run([p for run in runs for p in run.wanted]))
            for run in runs:
                run.readings = [next(all_readings) for _ in run.wanted]
                run.has_canvas = True
            if model.device.type == "cpu":
                # A GPU was only told to begin.
                self._pass_ms.append(1e3 * (time.monotonic() - began))
            return
        except Exception as error:
            if len(runs) > 1:
                log.warning("a shared pass failed (%s); its jobs go on alone", error)
        free_memory()
        for run in runs:
            try:
                run.readings = model.run(run.wanted)
                run.has_canvas = True
            except Exception as error:
                self._end(run, error)

    def _end(self, run: _Run, outcome: InfillResult | BaseException) -> None:
        """Close a job's work and answer it."""
        run.work.close()
        with self._wake:
            self._runs.remove(run)
            self._schedule.remove(run.job)
            self._idle_since = time.monotonic()
        self._answer(run.job, _settled(run, outcome))

    # The clock.

    def _keep_time(self) -> None:
        """Answer jobs whose deadline strikes while they have nothing to show."""
        while True:
            with self._wake:
                if self.failure is not None or self._closing:
                    return
                now = time.monotonic()
                late = self._schedule.expired(now)
                begun = {
                    run.job: run.job.deadline_at + self._grace_s
                    for run in self._runs
                    if run.job.deadline_at is not None
                    and not (run.has_canvas or run.job.is_answered)
                }
                for job in [job for job, at in begun.items() if at <= now]:
                    del begun[job]
                    job.strike()
                    late.append(job)
                waiting = [job.deadline_at for job in self._schedule.waiting]
                moments = [at for at in (*waiting, *begun.values()) if at is not None]
                if not late:
                    self._wake.wait(min(moments) - now if moments else None)
            for job in late:
                why = "The deadline struck before the first pass."
                self._answer(job, _nothing(job, "deadline", why))

    @property
    def _grace_s(self) -> float:
        """How late an answer may be that is about to come: half a pass."""
        return 0.0 if self._engine is None else self._engine.pace.pass_s / 2

    # The answers.

    def _answer(self, job: Job, outcome: InfillResult | BaseException) -> None:
        """Resolve a job, unless it was answered already."""
        with self._wake:
            if job.is_answered:
                return
            job.is_answered = True
        if isinstance(outcome, InfillResult):
            with self._wake:
                if not job.request.background and outcome.reason != "superseded":
                    self._answers.keep(job.request, outcome)
            self._count(job, outcome.reason, outcome)
            job.future.set_result(outcome)
            return
        self._count(job, outcome.code if isinstance(outcome, InfilldError) else InfilldError.code)
        job.future.set_exception(outcome)

    def _count(self, job: Job, reason: str, result: InfillResult | None = None) -> None:
        with self._wake:
            self._reasons[reason] += 1
            self._totals["background_jobs"] += job.request.background
            if result is None or result.reason == "superseded":
                return
            for name in ("passes", "prompt_tokens", "cached_tokens"):
                self._totals[name] += getattr(result.usage, name)
            if not job.request.background:
                self._job_ms.append(result.timings.total_ms)
                is_at_once = bool(result.alternatives) and result.usage.passes == 0
                self._totals["answered_at_once"] += is_at_once


def _by_service(run: _Run) -> int:
    return run.served


def _by_deadline(run: _Run) -> float:
    at = run.job.deadline_at
    return float("inf") if at is None else at


def _settled(run: _Run, outcome: InfillResult | BaseException) -> InfillResult | BaseException:
    """The answer of a job that has run."""
    job = run.job
    if isinstance(outcome, InfillResult):
        timings = replace(
            outcome.timings,
            queue_ms=1e3 * (run.begun_at - job.arrived_at),
            total_ms=1e3 * (time.monotonic() - job.arrived_at),
        )
        return replace(outcome, id=job.id, timings=timings)
    if isinstance(outcome, Superseded):
        return _superseded(job)
    if isinstance(outcome, Struck):
        return outcome
    if isinstance(outcome, torch.OutOfMemoryError):
        return NotEnoughMemory(str(outcome))
    if not isinstance(outcome, InfilldError):
        log.error("job %s failed", job.id, exc_info=outcome)
    return outcome


def _nothing(job: Job, reason: Reason, why: str) -> InfillResult:
    return InfillResult(id=job.id, seed=job.request.seed or 0, reason=reason, why=why)


def _superseded(job: Job) -> InfillResult:
    return _nothing(job, "superseded", "A newer request for the same document took over.")


def _about(engine: Infiller) -> dict[str, object]:
    model = engine.model
    return {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.parameter_count,
        "memory_bytes": model.nbytes,
        "canvas_tokens": model.config.canvas_tokens,
        "prompt_tokens": engine.prompt_tokens,
    }


def _idle_s(engine: Infiller, wish: IdleUnload) -> float:
    """Seconds after which an idle model is dropped; 0: never."""
    if wish != "auto":
        return 60.0 * wish
    is_large = engine.model.device.type != "cpu" and engine.model.nbytes >= _LARGE_BYTES
    return _IDLE_UNLOAD_S if is_large else 0.0
