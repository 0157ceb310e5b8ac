"""Jobs of the engine seen from the event loop.

The engine answers on its own thread; here its canvases and its result become things to await, and
the jobs that are live are known, so that a stopping daemon can cancel them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from typing import Literal, Protocol

from infilld.engine.errors import Cancelled, InfilldError
from infilld.engine.request import CanvasUpdate, InfillRequest, InfillResult

OnCanvas = Callable[[CanvasUpdate], None]
Event = Literal["shown", "inserted", "partly", "dismissed", "retained"]


class Job(Protocol):
    """What `Worker.submit` returns."""

    @property
    def id(self) -> str:
        """Names the job in the reply and its events."""

    @property
    def future(self) -> Future[InfillResult]:
        """Resolves on the engine's thread."""

    def cancel(self) -> None:
        """End within one pass; the future then raises `Cancelled`. Harmless twice."""


class Worker(Protocol):
    """What the server needs of the engine's worker."""

    @property
    def state(self) -> str:
        """`loading`, `ready`, `unloaded` (the next job waits until it is loaded) or `failed`."""

    @property
    def failure(self) -> InfilldError | None:
        """Why loading failed."""

    def start(self) -> None:
        """Begin to load on a thread of its own; returns at once."""

    def submit(self, request: InfillRequest, on_canvas: OnCanvas | None = None) -> Job:
        """Queue a job; `on_canvas` is called on the engine's thread.

        Raises:
            Loading, Busy: not now.
        """

    def feedback(
        self, job_id: str, event: Event, *, choice: int = 0, chars: int | None = None
    ) -> None:
        """Note what became of an answer.

        Raises:
            UnknownId, UnknownOption: there is no such answer, or no such choice.
        """

    def describe(self) -> dict[str, object]:
        """Model, device and sizes."""

    def stats(self) -> dict[str, object]:
        """Counters since the start."""

    def close(self) -> None:
        """End the thread and free the device."""


class LiveJob:
    """A submitted job; made and used on one event loop."""

    def __init__(self, worker: Worker, request: InfillRequest, *, with_canvases: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[CanvasUpdate | None] = asyncio.Queue()
        self._job = worker.submit(request, self._deliver if with_canvases else None)
        self._job.future.add_done_callback(lambda _: self._deliver(None))
        self.id = self._job.id

    def _deliver(self, update: CanvasUpdate | None) -> None:
        # The engine's thread may speak once more after the loop has closed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, update)

    async def canvases(self) -> AsyncIterator[CanvasUpdate]:
        """Yield every canvas until the result is there."""
        while (update := await self._inbox.get()) is not None:
            yield update

    async def result(self) -> InfillResult:
        """Wait for the result.

        Raises:
            InfilldError: the job failed or was cancelled.
        """
        if not self._job.future.done():
            async for _ in self.canvases():
                pass
        try:
            return self._job.future.result()
        except CancelledError:
            raise Cancelled("the job was cancelled") from None

    def cancel(self) -> None:
        """End the job within one pass; harmless when it is done."""
        self._job.cancel()


class Jobs:
    """The jobs whose clients still wait."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.model = str(worker.describe()["model"])
        self._live: set[LiveJob] = set()

    def __len__(self) -> int:
        return len(self._live)

    @contextmanager
    def run(self, request: InfillRequest, *, with_canvases: bool) -> Iterator[LiveJob]:
        """Submit a job; leaving the block, however that happens, cancels what is left of it.

        Raises:
            Loading, Busy: not now.
        """
        job = self.submit(request, with_canvases=with_canvases)
        try:
            yield job
        finally:
            self.finish(job)

    def submit(self, request: InfillRequest, *, with_canvases: bool) -> LiveJob:
        """Submit a job that the caller will `finish`."""
        job = LiveJob(self.worker, request, with_canvases=with_canvases)
        self._live.add(job)
        return job

    def finish(self, job: LiveJob) -> None:
        """Cancel what is left of a job and forget it."""
        self._live.discard(job)
        job.cancel()

    def cancel_all(self) -> None:
        """Cancel every live job; their clients get an error."""
        for job in self._live:
            job.cancel()
