"""The native routes: `POST /v1/infill`, plain and streamed, and `POST /v1/feedback`."""

import logging
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from infilld.engine.errors import InfilldError
from infilld.engine.request import CanvasUpdate, InfillResult
from infilld.server import wire
from infilld.server.http import problems, sse
from infilld.server.http.answering import Stream, answer
from infilld.server.jobs import Jobs, LiveJob
from infilld.server.routes.records import to_engine, to_event, to_reply

log = logging.getLogger(__name__)


def router(jobs: Jobs) -> APIRouter:
    """The native routes over one engine."""
    routes = APIRouter()

    @routes.post("/v1/infill", response_model=wire.InfillReply)
    async def infill(asked: wire.InfillRequest, request: Request) -> Response:
        """Fill gaps or rewrite spans; `stream: true` answers with events."""
        wanted = to_engine(asked)
        if asked.stream:
            job = jobs.submit(wanted, route=request.url.path, with_updates=True)
            return Stream(jobs, job, _events(jobs, job))
        result = await answer(jobs, wanted, request)
        return JSONResponse(to_reply(result, jobs.model).model_dump())

    @routes.post("/v1/feedback", status_code=204, responses={404: {"model": wire.ErrorReply}})
    async def feedback(told: wire.Feedback) -> None:
        """Say what became of a suggestion; one that was inserted is followed up."""
        jobs.worker.feedback(told.id, told.event, choice=told.choice, chars=told.chars)
        jobs.observer.told(told.id, told.event, told.choice, told.chars)

    return routes


async def _events(jobs: Jobs, job: LiveJob[CanvasUpdate, InfillResult]) -> AsyncIterator[bytes]:
    try:
        async for update in job.updates():
            event = to_event(job.id, update)
            yield sse.frame("canvas", event.model_dump(by_alias=True, exclude_defaults=True))
        yield sse.frame("done", to_reply(await job.result(), jobs.model).model_dump())
    except InfilldError as error:
        yield sse.frame("error", problems.body_of(error))
    except Exception:
        log.exception("job %s failed", job.id)
        yield sse.frame("error", problems.INTERNAL)
