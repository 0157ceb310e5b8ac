"""Jobs of the engine seen from the event loop.

The engine answers on its own thread; here its updates and its result become things to await, and
the jobs that are live are known, so that a stopping daemon can cancel them. Whoever keeps records
is told of every job that ends.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, overload

from infilld.engine.conversation import ChatRequest, ChatResult, ChatUpdate
from infilld.engine.errors import Cancelled, InfilldError, Unavailable
from infilld.engine.request import CanvasUpdate, InfillRequest, InfillResult
from infilld.server.confidential import without_secrets
from infilld.server.process import logs

AnyRequest = InfillRequest | ChatRequest
AnyResult = InfillResult | ChatResult
AnyUpdate = CanvasUpdate | ChatUpdate
Event = Literal["shown", "inserted", "partly", "dismissed", "retained"]

log = logging.getLogger(__name__)

MOST_UNREAD = 16
"""Updates of a job that wait for its reader; each has the whole text, so older ones may go."""

U = TypeVar("U", CanvasUpdate, ChatUpdate)
R = TypeVar("R", InfillResult, ChatResult)


class Job(Protocol):
    """What `Worker.submit` returns."""

    @property
    def id(self) -> str:
        """Names the job in the reply and its events."""

    @property
    def future(self) -> Future[Any]:
        """Resolves on the engine's thread, with the result that belongs to the request."""

    def cancel(self) -> None:
        """End within one pass; the future then raises `Cancelled`. Harmless twice."""


class Worker(Protocol):
    """What the server needs of the engine's worker; a remote engine is one, too."""

    @property
    def state(self) -> str:
        """`loading`, `ready`, `unloaded` (the next job waits until it is loaded) or `failed`."""

    @property
    def failure(self) -> InfilldError | None:
        """Why loading failed."""

    def start(self) -> None:
        """Begin to load on a thread of its own; returns at once."""

    def submit(self, request: AnyRequest, on_canvas: Callable[[Any], None] | None = None) -> Job:
        """Queue a job; `on_canvas` is called on the engine's thread with its updates.

        Raises:
            Loading, Busy: not now. Unsupported: this model cannot.
        """

    def feedback(
        self, job_id: str, event: Event, *, choice: int = 0, chars: int | None = None
    ) -> None:
        """Note what became of an answer.

        Raises:
            UnknownId, UnknownOption: there is no such answer, or no such choice.
        """

    def switch(self, folder: Path | None) -> None:
        """Load another checkpoint (None: the starter) in place of this one; returns at once.

        Open jobs end first, queued ones wait for the new model. Where it cannot be loaded the old
        one is loaded again and `describe` says why.

        Raises:
            Unsupported: this engine has no models to choose from. Busy: it is switching already.
        """

    def unload(self) -> None:
        """Give the model's memory back once no job is open; the next job loads it again."""

    def describe(self) -> dict[str, object]:
        """Model, device and sizes."""

    def stats(self) -> dict[str, object]:
        """Counters since the start."""

    def close(self) -> None:
        """End the thread and free the device."""


class Observer(Protocol):
    """Keeps records of jobs; called on the event loop, must return at once and never raise."""

    def answered(
        self, job_id: str, route: str, request: AnyRequest, outcome: AnyResult | BaseException
    ) -> None:
        """A job that came by a route has ended."""

    def told(self, job_id: str, event: Event, choice: int, chars: int | None) -> None:
        """A client said what became of an answer."""


class NoObserver:
    """Keeps nothing."""

    def answered(
        self, job_id: str, route: str, request: AnyRequest, outcome: AnyResult | BaseException
    ) -> None:
        """As `Observer`."""

    def told(self, job_id: str, event: Event, choice: int, chars: int | None) -> None:
        """As `Observer`."""


class LiveJob(Generic[U, R]):
    """A submitted job; made and used on one event loop."""

    def __init__(self, worker: Worker, request: AnyRequest, *, with_updates: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._unread: deque[U] = deque()
        self._news = asyncio.Event()
        self._is_over = False
        self._job = worker.submit(request, self._deliver if with_updates else None)
        self._job.future.add_done_callback(lambda _: self._deliver(None))
        self.id = self._job.id

    def _deliver(self, update: U | None) -> None:
        # The engine's thread may speak once more after the loop has closed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, update)

    def _take(self, update: U | None) -> None:
        if update is None:
            self._is_over = True
        else:
            self._unread.append(update)
        if len(self._unread) > MOST_UNREAD:
            self._unread[1] = _after(self._unread[0], self._unread[1])
            self._unread.popleft()
        self._news.set()

    async def updates(self) -> AsyncIterator[U]:
        """Yield updates until the result is there; who reads slowly misses older ones."""
        while True:
            while self._unread:
                yield self._unread.popleft()
            if self._is_over:
                return
            self._news.clear()
            await self._news.wait()

    async def result(self) -> R:
        """Wait for the result.

        Raises:
            InfilldError: the job failed or was cancelled.
        """
        if not self._job.future.done():
            async for _ in self.updates():
                pass
        try:
            answer: R = self._job.future.result()
        except CancelledError:
            raise Cancelled("the job was cancelled") from None
        return answer

    def on_end(self, tell: Callable[[AnyResult | BaseException], None]) -> None:
        """Have the outcome told on the event loop, whoever waits for it or not."""

        def ended(future: Future[Any]) -> None:
            error = Cancelled("cancelled") if future.cancelled() else future.exception()
            outcome = future.result() if error is None else error
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(tell, outcome)

        self._job.future.add_done_callback(ended)

    def cancel(self) -> None:
        """End the job within one pass; harmless when it is done."""
        self._job.cancel()


AnyJob = LiveJob[CanvasUpdate, InfillResult] | LiveJob[ChatUpdate, ChatResult]


class Jobs:
    """The jobs whose clients still wait.

    Args:
        worker: runs them. observer: is told how they end.
        log_prompts: what is asked and answered is written to the log, source text and all.
    """

    def __init__(
        self, worker: Worker, observer: Observer | None = None, *, log_prompts: bool = False
    ) -> None:
        self.worker = worker
        self._log_prompts = log_prompts
        self.observer: Observer = observer or NoObserver()
        self._live: set[AnyJob] = set()
        self._is_ending = False

    def __len__(self) -> int:
        return len(self._live)

    @property
    def model(self) -> str:
        """Name of the model that is loaded."""
        return str(self.worker.describe()["model"])

    @overload
    def submit(
        self, request: InfillRequest, *, route: str, with_updates: bool
    ) -> LiveJob[CanvasUpdate, InfillResult]: ...

    @overload
    def submit(
        self, request: ChatRequest, *, route: str, with_updates: bool
    ) -> LiveJob[ChatUpdate, ChatResult]: ...

    def submit(self, request: AnyRequest, *, route: str, with_updates: bool) -> Any:
        """Submit a job that the caller will `finish`; context that looks secret stays behind.

        Args:
            request: what is asked. route: by which it came, for the records.
            with_updates: whether somebody reads `updates`.

        Raises:
            Unavailable: not now, or never again. Unsupported: this model cannot.
        """
        observer = self.observer
        logs.route.set(route)
        if isinstance(request, InfillRequest):
            request = without_secrets(request)
        try:
            if self._is_ending:
                raise Unavailable("the daemon is stopping")
            job: LiveJob[Any, Any] = LiveJob(self.worker, request, with_updates=with_updates)
        except InfilldError as refusal:
            observer.answered("", route, request, refusal)
            raise
        logs.job_id.set(job.id)
        job.on_end(lambda outcome: observer.answered(job.id, route, request, outcome))
        if self._log_prompts:
            log.info("%s %s asks %s", job.id, route, _written(request))
            job.on_end(lambda outcome: log.info("%s gets %s", job.id, _written(outcome)))
        self._live.add(job)
        return job

    @contextmanager
    def run(self, request: Any, *, route: str) -> Iterator[Any]:
        """Submit a job without updates; leaving the block cancels what is left of it.

        Raises:
            As `submit`.
        """
        job = self.submit(request, route=route, with_updates=False)
        try:
            yield job
        finally:
            self.finish(job)

    def finish(self, job: AnyJob) -> None:
        """Cancel what is left of a job and forget it."""
        self._live.discard(job)
        job.cancel()

    def cancel_all(self) -> None:
        """Cancel every live job, whose clients get an error, and take no other."""
        self._is_ending = True
        for job in self._live:
            job.cancel()


def _after(dropped: Any, update: Any) -> Any:
    """The update behind one that nobody read: it tells too that settled text was taken back."""
    return replace(update, revised=True) if getattr(dropped, "revised", False) else update


def _written(record: AnyRequest | AnyResult | BaseException) -> str:
    if isinstance(record, BaseException):
        return repr(record)
    return json.dumps(asdict(record), ensure_ascii=False, default=str)
