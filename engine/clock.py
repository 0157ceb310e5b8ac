"""Answers jobs whose deadline strikes while they have nothing to show.

A deadline is the work's own matter once there is a canvas: it ends with what it has. Before that,
in the queue and while a prompt is encoded, this thread answers in time, whatever turn of whichever
job is running.
"""

import threading
import time
from collections.abc import Callable

from infilld.engine.rounds import Rounds
from infilld.engine.scheduler import AnyJob, Schedule


class Clock(threading.Thread):
    """The thread that keeps time.

    Args:
        schedule, rounds: the open jobs. lock: held around every use of them.
        grace_s: how late an answer may be that is about to come.
        answer: gives a job the answer that its deadline struck.
    """

    def __init__(
        self,
        schedule: Schedule,
        rounds: Rounds,
        lock: threading.Condition,
        grace_s: Callable[[], float],
        answer: Callable[[AnyJob], None],
    ) -> None:
        super().__init__(name="infilld-clock", daemon=True)
        self._schedule, self._rounds, self._lock = schedule, rounds, lock
        self._grace_s, self._answer = grace_s, answer
        self._is_stopped = False

    def stop(self) -> None:
        """End the thread; with the lock held."""
        self._is_stopped = True
        self._lock.notify_all()

    def run(self) -> None:
        """Keep time until stopped."""
        while True:
            with self._lock:
                if self._is_stopped:
                    return
                late, next_at = self._struck(time.monotonic())
                if not late:
                    self._lock.wait(None if next_at is None else next_at - time.monotonic())
            for job in late:
                self._answer(job)

    def _struck(self, now: float) -> tuple[list[AnyJob], float | None]:
        """The jobs whose deadline has struck, and when the next one does."""
        late = self._schedule.expired(now)
        begun = {
            run.job: run.job.deadline_at + self._grace_s()
            for run in self._rounds.runs
            if run.job.deadline_at is not None and not (run.has_canvas or run.job.is_answered)
        }
        for job in [job for job, at in begun.items() if at <= now]:
            del begun[job]
            job.strike()
            late.append(job)
        waiting = [job.deadline_at for job in self._schedule.waiting]
        moments = [at for at in (*waiting, *begun.values()) if at is not None]
        return late, min(moments, default=None)
