"""The local model, for while the remote engine does not answer."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace

from infilld.engine.errors import Cancelled
from infilld.engine.scheduler import AnyJob, AnyResult, OnCanvas
from infilld.server.jobs import Job, Worker

log = logging.getLogger(__name__)

# How often a model that is being loaded is looked at.
_LOOK_S = 0.05


class Standby:
    """A local worker that is made when it is needed first; used on one event loop.

    Args:
        make: makes it; takes a while, since it imports torch.

    Attributes:
        worker: the local one, once it is made.
        is_used: a job was given to it since the last `rest`.
    """

    def __init__(self, make: Callable[[], Worker]) -> None:
        self.worker: Worker | None = None
        self.is_used = False
        self._make, self._making = make, asyncio.Lock()

    async def answer(
        self, job: AnyJob, on_canvas: OnCanvas | None, tell_id: Callable[[str], None]
    ) -> AnyResult:
        """The local model's answer to a job; waits until it is loaded.

        Args:
            job: whose deadline goes on. on_canvas: gets its updates, on the local worker's thread.
            tell_id: gets the id under which it is known there.

        Raises:
            InfilldError: as the local worker's `submit` and its jobs do. TimeoutError: the
            deadline struck before it was loaded.
        """
        self.is_used = True
        async with asyncio.timeout(_left_s(job)):
            worker = await self._loaded()
        left_s = _left_s(job)
        request = job.request
        if left_s is not None:
            request = replace(request, deadline_ms=max(1.0, 1e3 * left_s))
        local = worker.submit(request, on_canvas)
        tell_id(local.id)
        return await _result_of(local)

    def rest(self) -> None:
        """Give the memory back; the next job loads the model again."""
        if self.worker is not None and self.is_used and self.worker.state == "ready":
            self.is_used = False
            self.worker.unload()

    async def _loaded(self) -> Worker:
        async with self._making:
            if self.worker is None:
                log.info("the local model answers meanwhile; loading it")
                self.worker = await asyncio.to_thread(self._make)
                self.worker.start()
        while self.worker.state == "loading":
            await asyncio.sleep(_LOOK_S)
        return self.worker


async def _result_of(local: Job) -> AnyResult:
    waiting = asyncio.wrap_future(local.future)
    # Nobody may be left to look at an error.
    waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        # Its future is the local worker's to resolve.
        result: AnyResult = await asyncio.shield(waiting)
    except CancelledError:
        raise Cancelled("the local model was closed") from None
    except asyncio.CancelledError:
        local.cancel()
        raise
    return result


def _left_s(job: AnyJob) -> float | None:
    return None if job.deadline_at is None else max(0.0, job.deadline_at - time.monotonic())
