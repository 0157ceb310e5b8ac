"""The live jobs' turns, and the passes they share.

A round gives a turn to every job that has its readings, and to one of those that want none (one
piece of a prompt is encoded in it), and then runs the passes that are wanted as one. Everything
that ends a job early takes effect between two turns.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infilld.engine.conversation import ChatRequest
from infilld.engine.counts import Counts
from infilld.engine.errors import Cancelled
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.loading import free_memory, use_device
from infilld.engine.passes import CanvasPass, Work
from infilld.engine.reading import Reading
from infilld.engine.scheduler import AnyJob, AnyResult, Schedule, Struck, Superseded, fitting

log = logging.getLogger(__name__)

# Positions of a shared pass. On a CPU a canvas of 40 positions took 20.7 ms alone, 17.0 each where
# four shared a pass, and 17.4 where eight did (starter, two busy cores): beyond these everybody
# only waits longer. A GPU is not full so soon; its bound is not measured yet.
MAX_CPU_ROUND_TOKENS = 256
MAX_ROUND_TOKENS = 2048


@dataclass(eq=False)
class Run:
    """A live job and its work.

    Attributes:
        begun_at: `time.monotonic()` reading. served: number of its last turn or pass.
        wanted: passes whose readings it waits for; empty: it wants none.
        readings: of those passes, once they were run. has_canvas: some were run.
    """

    job: AnyJob
    work: Work[Any]
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


class Rounds:
    """The work of the live jobs, on the worker's thread alone.

    Args:
        schedule: says who has a turn. lock: held around every use of it and of the counts.
        counts: of passes. ended: told how a run ended, after it was taken out.

    Attributes:
        runs: of the live jobs, in the order they began; others read it with the lock held.
    """

    def __init__(
        self,
        schedule: Schedule,
        lock: threading.Condition,
        counts: Counts,
        ended: Callable[[Run, AnyResult | BaseException], None],
    ) -> None:
        self.runs: list[Run] = []
        self._schedule, self._lock, self._counts, self._ended = schedule, lock, counts, ended
        self._turns = 0

    def begin(self, engine: Infiller, job: AnyJob) -> None:
        """A job is live now; with the lock held."""
        hooks = Hooks(on_canvas=job.on_canvas, check=job.check, deadline_at=job.deadline_at)
        asked = job.request
        work: Work[Any] = (
            engine.conversing(asked, hooks)
            if isinstance(asked, ChatRequest)
            else engine.work(asked, hooks)
        )
        self.runs.append(Run(job, work, time.monotonic(), served=self._turns))

    def sweep(self) -> None:
        """End what is not wanted any more."""
        for run in tuple(self.runs):
            try:
                run.job.check()
            except (Cancelled, Superseded, Struck) as unwanted:
                self._end(run, unwanted)

    def round(self, engine: Infiller) -> None:
        """A turn for those that can go on, then a pass for those that want one."""
        use_device(engine.model.device)
        for run in self._next_turns(engine):
            self.sweep()
            if run in self.runs:
                self._step(run)
        jobs = self._on_turn(engine)
        wanting = sorted((run for run in self.runs if run.job in jobs), key=_by_service)
        wanted = [(run, run.positions) for run in wanting if run.wanted and run.readings is None]
        self._share(engine, fitting(wanted, _round_tokens(engine)))

    def _on_turn(self, engine: Infiller) -> Sequence[AnyJob]:
        with self._lock:
            if engine.awaits_prefix:
                # A suspended job may hold what another waits for: it goes on, and gives it back.
                return self._schedule.live
            return self._schedule.turn()

    def _next_turns(self, engine: Infiller) -> list[Run]:
        """Who goes on: all that have their readings, the most urgent first, and one other."""
        jobs = self._on_turn(engine)
        runs = [run for run in self.runs if run.job in jobs]
        passed = [run for run in runs if run.readings is not None]
        others = sorted((run for run in runs if not run.wanted), key=_by_service)
        return [*sorted(passed, key=_by_deadline), *others[:1]]

    def _step(self, run: Run) -> None:
        """One turn; whatever goes wrong is the job's answer, never the thread's end."""
        run.served = self._turns = self._turns + 1
        try:
            run.go_on()
        except StopIteration as end:
            self._end(run, end.value)
        except Exception as error:
            self._end(run, error)

    def _share(self, engine: Infiller, runs: Sequence[Run]) -> None:
        """Run the passes of several jobs as one; where that fails, each alone, once."""
        if not runs:
            return
        with self._lock:
            self._counts.shared(len(runs))
        model = engine.model
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
                with self._lock:
                    self._counts.passed(1e3 * (time.monotonic() - began))
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

    def _end(self, run: Run, outcome: AnyResult | BaseException) -> None:
        """Close a job's work and answer it."""
        run.work.close()
        with self._lock:
            self.runs.remove(run)
            self._schedule.remove(run.job)
        self._ended(run, outcome)


def _round_tokens(engine: Infiller) -> int:
    is_cpu = engine.model.device.type == "cpu"
    return MAX_CPU_ROUND_TOKENS if is_cpu else MAX_ROUND_TOKENS


def _by_service(run: Run) -> int:
    return run.served


def _by_deadline(run: Run) -> float:
    at = run.job.deadline_at
    return float("inf") if at is None else at
