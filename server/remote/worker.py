"""The worker over a remote engine: a queue, a thread with an event loop, a model to fall back on.

    submit ──▶ Schedule ──admit──▶ a task: Infilling or Talking ──HTTP──▶ the service
                  ▲                  │                  cancel: its connection is closed at once
      cancel, supersede, deadline    └── down ──▶ the local worker (`fail_over`), or an error

The rules of the queue are those of the local worker; `Health` says whether the service is asked at
all. A request that fails on the way is asked once more, then given to the local worker or answered
with why.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from infilld.engine.conversation import ChatRequest, ChatResult
from infilld.engine.errors import (
    Busy,
    Cancelled,
    InfilldError,
    Loading,
    Unavailable,
    UnknownId,
    UnknownOption,
    Unsupported,
)
from infilld.engine.request import InfillResult, Reason
from infilld.engine.scheduler import (
    AnyJob,
    AnyRequest,
    AnyResult,
    Job,
    OnCanvas,
    Schedule,
    Struck,
    Superseded,
)
from infilld.server.jobs import Event, Worker
from infilld.server.remote.asking import MAX_LIVE, Remote
from infilld.server.remote.describing import described
from infilld.server.remote.health import Health, Pace
from infilld.server.remote.routing import Route
from infilld.server.remote.service import Service
from infilld.server.remote.standby import Standby
from infilld.server.remote.tally import Tally
from infilld.server.settings import Settings

log = logging.getLogger(__name__)

_CLOSE_S = 5.0

State = Literal["loading", "ready", "failed"]


def make_worker(settings: Settings, make_local: Callable[[Settings], Worker]) -> Worker:
    """The worker for `engine = "openai:URL"`.

    Args:
        settings: with an `engine_url`. make_local: makes the worker that answers while the remote
            engine does not; called when it is needed, and only with `fail_over`.
    """
    return RemoteWorker(settings, lambda: make_local(settings))


class RemoteWorker:
    """A remote engine as a `server.jobs.Worker`.

    Args:
        settings: where it is, and how it is asked. make_local: makes the worker to fall back on.
        pace: of looking whether it answers.
    """

    def __init__(
        self, settings: Settings, make_local: Callable[[], Worker], pace: Pace | None = None
    ) -> None:
        url = settings.engine_url
        assert url is not None, "a remote engine has an address"
        self._url, self._settings = url, settings
        self._make_local, self._pace = make_local, pace or Pace()
        self._lock = threading.Lock()
        self._schedule = Schedule(MAX_LIVE)
        self._tasks: dict[AnyJob, asyncio.Task[AnyResult | BaseException]] = {}
        self._tally = Tally()
        self._thread = threading.Thread(target=self._run, name="infilld-remote", daemon=True)
        self._began = threading.Event()
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event
        self._health: Health | None = None
        self._standby: Standby
        self._route: Route
        self._broken: InfilldError | None = None

    # What the server sees, from its own threads.

    @property
    def state(self) -> State:
        """`loading` until it was looked at, then whether requests are answered."""
        if self._broken is not None:
            return "failed"
        if self._health is None or self._health.is_up is None:
            return "loading"
        return "ready" if self.failure is None else "failed"

    @property
    def failure(self) -> InfilldError | None:
        """Why nobody answers; with `fail_over` the local model's own trouble."""
        if self._broken is not None:
            return self._broken
        if self._health is None or self._health.is_up is not False:
            return None
        if self._settings.fail_over:
            local = self._standby.worker
            return None if local is None else local.failure
        return self._health.problem

    def start(self) -> None:
        """Begin to look for the service on a thread of its own; returns at once."""
        log.info("source text is sent to the remote engine at %s, and nowhere else", self._url)
        where = urlsplit(self._url)
        is_here = where.hostname in ("localhost", "127.0.0.1", "::1")
        if where.scheme == "http" and not is_here:
            log.warning("what goes to %s is not encrypted; https would be", self._url)
        self._thread.start()

    def submit(self, request: AnyRequest, on_canvas: OnCanvas | None = None) -> AnyJob:
        """Queue a request; an open one of the same document is superseded.

        Raises:
            Loading: the service was not looked at yet. Unavailable: it does not answer, and
            nobody else is to. Busy: the queue is full.
        """
        if self.state == "loading":
            raise Loading(f"the remote engine at {self._url} has not answered yet")
        health = self._health
        if self._broken is not None or health is None or self._closing:
            raise self._broken or Busy("the daemon is stopping")
        self._soon(health.hurry)
        failure = self.failure
        if failure is not None:
            raise failure.with_traceback(None)
        job: AnyJob = Job(request, on_canvas, self._withdraw)
        with self._lock:
            if self._closing:
                raise Busy("the daemon is stopping")
            superseded = self._schedule.add(job)
            self._soon(lambda: self._came(job))
        for old in superseded:
            self._answer(old, _nothing(old, "superseded"))
        return job

    def feedback(
        self, job_id: str, event: Event, *, choice: int = 0, chars: int | None = None
    ) -> None:
        """Count what became of an answer; one of the local model is told to it.

        Raises:
            UnknownId: not one of the last answers. UnknownOption: it had no such choice.
        """
        with self._lock:
            local_id = self._tally.told(job_id, event, choice)
        if local_id is not None and self._standby.worker is not None:
            try:
                self._standby.worker.feedback(local_id, event, choice=choice, chars=chars)
            except (UnknownId, UnknownOption):
                # It remembers fewer answers, and has nothing to prepare for this one.
                log.debug("the local model forgot an answer that was told of")

    def switch(self, folder: Path | None) -> None:
        """There is no choosing a model of another machine.

        Raises:
            Unsupported: always.
        """
        raise Unsupported(
            "the model is served by the remote engine",
            remedy="Set `engine_model` to the name of another model there, and restart.",
        )

    def unload(self) -> None:
        """Give back what the local model holds, if it was needed; the remote one is not ours."""
        self._soon(lambda: self._standby.rest())

    def describe(self) -> dict[str, object]:
        """Who answers, and where."""
        health = self._health
        local = None if health is None else self._standby.worker
        return described(self._settings, self.state, health, local)

    def stats(self) -> dict[str, object]:
        """Counts since the start and times of the last answers, in ms.

        `answered` counts answers by who gave them, `fail_overs` how often the service was found
        down, `retries` requests that were asked again.
        """
        health = self._health
        with self._lock:
            return {
                "queued": len(self._schedule.waiting),
                "running": len(self._schedule.live),
                **self._tally.stats(),
                "fail_overs": 0 if health is None else health.failed,
                "recoveries": 0 if health is None else health.recovered,
            }

    def close(self) -> None:
        """End every open job with Cancelled, close the connections and the local worker."""
        with self._lock:
            self._closing = True
            open_jobs = [*self._schedule.waiting, *self._schedule.live]
        for job in open_jobs:
            job.cancel()
        if not self._thread.is_alive():
            return
        self._began.wait()
        self._soon(lambda: self._end.set())
        self._thread.join()

    def _withdraw(self, job: AnyJob) -> None:
        """End a job that has not begun; one that runs is interrupted."""
        with self._lock:
            is_waiting = self._schedule.withdraw(job)
        if is_waiting:
            self._answer(job, Cancelled("the client went away"))
        else:
            self._soon(self._sweep)

    def _soon(self, do: Callable[[], None]) -> None:
        """Have something done on the event loop, unless that has ended."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(do)

    # On the event loop.

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as error:
            log.exception("the remote engine's thread ended")
            self._broken = Unavailable(f"{type(error).__name__}: {error}", remedy="infilld logs")
        finally:
            self._began.set()

    async def _main(self) -> None:
        self._end = asyncio.Event()
        service = Service(self._url, self._settings.engine_key_file)
        self._standby = Standby(self._make_local)
        health = Health(service, self._url, self._settings.engine_model, self._pace)
        remote = Remote(service, health, self._url)
        standby = self._standby if self._settings.fail_over else None
        self._route = Route(remote, health, standby, self._count)
        self._loop = asyncio.get_running_loop()
        self._health = health
        self._began.set()
        watching = asyncio.ensure_future(health.watch())
        resting = asyncio.ensure_future(self._rest_local())
        try:
            await self._end.wait()
        finally:
            tasks = [watching, resting, *self._tasks.values()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_CLOSE_S)
            await service.close()
            if self._standby.worker is not None:
                await asyncio.to_thread(self._standby.worker.close)

    async def _rest_local(self) -> None:
        """Let the local model go some time after the service has come back."""
        while True:
            await asyncio.sleep(self._pace.well_s)
            health = self._health
            if health is None or not health.is_up:
                continue
            if time.monotonic() - health.up_since >= self._pace.well_s:
                self._standby.rest()

    def _came(self, job: AnyJob) -> None:
        """A job was queued: others may have to go, it may begin, and its time runs."""
        self._sweep()
        self._admit()
        if job.deadline_at is not None and self._loop is not None:
            self._loop.call_later(max(0.0, job.deadline_at - time.monotonic()), self._expire)

    def _sweep(self) -> None:
        """Interrupt what is not wanted any more."""
        for job, task in tuple(self._tasks.items()):
            try:
                job.check()
            except (Cancelled, Superseded, Struck):
                task.cancel()

    def _admit(self) -> None:
        with self._lock:
            begun = [] if self._closing else self._schedule.admit()
        for job in begun:
            task = self._tasks[job] = asyncio.ensure_future(self._outcome(job))
            # A task that is cancelled before its first step does nothing at all.
            task.add_done_callback(partial(self._ended, job))

    def _expire(self) -> None:
        with self._lock:
            late = self._schedule.expired(time.monotonic())
        for job in late:
            self._answer(job, _nothing(job, "deadline"))

    def _ended(self, job: AnyJob, task: "asyncio.Task[AnyResult | BaseException]") -> None:
        """A job's task is over: answer, and let others begin."""
        outcome = _interrupted(job) if task.cancelled() else task.result()
        self._tasks.pop(job, None)
        with self._lock:
            self._schedule.remove(job)
        self._answer(job, outcome)
        self._admit()

    async def _outcome(self, job: AnyJob) -> AnyResult | BaseException:
        """What a job ends with; whatever goes wrong is its answer."""
        begun_at = time.monotonic()
        try:
            job.check()
            outcome = await self._route.answer(job, lambda local_id: self._known_as(job, local_id))
            timings = replace(
                outcome.timings,
                queue_ms=1e3 * (begun_at - job.arrived_at),
                total_ms=1e3 * (time.monotonic() - job.arrived_at),
            )
            return replace(outcome, id=job.id, timings=timings)
        except (asyncio.CancelledError, Superseded):
            return _interrupted(job)
        except TimeoutError:
            return _nothing(job, "deadline")
        except InfilldError as error:
            return error
        except Exception as error:
            log.error("job %s failed", job.id, exc_info=error)
            return error

    # The answers.

    def _known_as(self, job: AnyJob, local_id: str) -> None:
        with self._lock:
            self._tally.known_as(job.id, local_id)

    def _count(self, name: str) -> None:
        with self._lock:
            self._tally.count(name)

    def _answer(self, job: AnyJob, outcome: AnyResult | BaseException) -> None:
        """Resolve a job, unless it was answered already."""
        with self._lock:
            if job.is_answered:
                return
            job.is_answered = True
            self._tally.ended(job, outcome)
        if isinstance(outcome, BaseException):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)


def _interrupted(job: AnyJob) -> AnyResult | Cancelled:
    """What a job that was interrupted ends with."""
    try:
        job.check()
    except Superseded:
        return _nothing(job, "superseded")
    except (Cancelled, Struck):
        return Cancelled("the client went away")
    return Cancelled("the daemon is stopping")


_WHY: dict[Reason, str] = {
    "superseded": "A newer request for the same document took over.",
    "deadline": "The deadline struck before anybody had answered.",
}


def _nothing(job: AnyJob, reason: Reason) -> AnyResult:
    kind = ChatResult if isinstance(job.request, ChatRequest) else InfillResult
    return kind(id=job.id, seed=job.request.seed or 0, reason=reason, why=_WHY[reason])
