"""The native routes: `POST /v1/infill`, plain and streamed, and `POST /v1/feedback`."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from infilld.engine.errors import Cancelled, InfilldError
from infilld.engine.request import InfillRequest, InfillResult
from infilld.server import problems, sse, wire
from infilld.server.jobs import Jobs, LiveJob
from infilld.server.records import to_engine, to_event, to_reply

log = logging.getLogger(__name__)


def router(jobs: Jobs) -> APIRouter:
    """The native routes over one engine."""
    routes = APIRouter()

    @routes.post("/v1/infill", response_model=wire.InfillReply)
    async def infill(asked: wire.InfillRequest, request: Request) -> Response:
        """Fill gaps or rewrite spans; `stream: true` answers with events."""
        wanted = to_engine(asked)
        if asked.stream:
            job = jobs.submit(wanted, with_canvases=True)
            return _Stream(jobs, job)
        result = await _run(jobs, wanted, request)
        return JSONResponse(to_reply(result, jobs.model).model_dump())

    @routes.post("/v1/feedback", status_code=204, responses={404: {"model": wire.ErrorReply}})
    async def feedback(told: wire.Feedback) -> None:
        """Say what became of a suggestion; one that was inserted is followed up."""
        jobs.worker.feedback(told.id, told.event, choice=told.choice, chars=told.chars)

    return routes


class _Stream(StreamingResponse):
    """The events of one job; however the response ends, the job does not outlive it."""

    def __init__(self, jobs: Jobs, job: LiveJob) -> None:
        super().__init__(_events(jobs, job), media_type=sse.MEDIA_TYPE, headers=dict(sse.HEADERS))
        self._jobs, self._job = jobs, job

    async def __call__(self, *connection: Any) -> None:
        try:
            await super().__call__(*connection)
        finally:
            self._jobs.finish(self._job)


async def _events(jobs: Jobs, job: LiveJob) -> AsyncIterator[bytes]:
    try:
        async for update in job.canvases():
            event = to_event(job.id, update)
            yield sse.frame("canvas", event.model_dump(by_alias=True, exclude_defaults=True))
        yield sse.frame("done", to_reply(await job.result(), jobs.model).model_dump())
    except InfilldError as error:
        yield sse.frame("error", problems.body_of(error))
    except Exception:
        log.exception("job %s failed", job.id)
        yield sse.frame("error", problems.INTERNAL)


async def _run(jobs: Jobs, wanted: InfillRequest, request: Request) -> InfillResult:
    """Wait for a job, or for its client to go away, which ends it."""
    with jobs.run(wanted, with_canvases=False) as job:
        answer = asyncio.ensure_future(job.result())
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Cancelled("the client went away")
            return answer.result()
        finally:
            answer.cancel()
            gone.cancel()


async def _until_gone(request: Request) -> None:
    # The body has been read; the next message says that the connection closed.
    while (await request.receive())["type"] != "http.disconnect":
        pass
