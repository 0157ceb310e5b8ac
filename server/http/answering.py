"""From a route to a job and back: whatever happens to the connection, no job outlives it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, overload

from fastapi import Request
from fastapi.responses import StreamingResponse

from infilld.engine.conversation import ChatRequest, ChatResult
from infilld.engine.errors import Cancelled
from infilld.engine.request import InfillRequest, InfillResult
from infilld.server.http import sse
from infilld.server.jobs import AnyJob, AnyRequest, AnyResult, Jobs


@overload
async def answer(jobs: Jobs, wanted: InfillRequest, request: Request) -> InfillResult: ...


@overload
async def answer(jobs: Jobs, wanted: ChatRequest, request: Request) -> ChatResult: ...


async def answer(jobs: Jobs, wanted: AnyRequest, request: Request) -> AnyResult:
    """Wait for a job, or for its client to go away, which ends it.

    Raises:
        InfilldError: it could not be submitted, it failed, or nobody waits any more.
    """
    with jobs.run(wanted, route=request.url.path) as job:
        result = asyncio.ensure_future(job.result())
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise Cancelled("the client went away")
            found: AnyResult = result.result()
            return found
        finally:
            result.cancel()
            gone.cancel()


class Stream(StreamingResponse):
    """What is streamed of one job.

    Args:
        jobs, job: it is finished with the response, however that ends.
        chunks: of the body. media_type: of it.
    """

    def __init__(
        self,
        jobs: Jobs,
        job: AnyJob,
        chunks: AsyncIterator[bytes],
        media_type: str = sse.MEDIA_TYPE,
    ) -> None:
        super().__init__(chunks, media_type=media_type, headers=dict(sse.HEADERS))
        self._jobs, self._job = jobs, job

    async def __call__(self, *connection: Any) -> None:
        """Send it."""
        try:
            await super().__call__(*connection)
        finally:
            self._jobs.finish(self._job)


async def _until_gone(request: Request) -> None:
    # The body has been read; the next message says that the connection closed.
    while (await request.receive())["type"] != "http.disconnect":
        pass
