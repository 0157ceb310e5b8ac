"""What the daemon says about itself: `/health`, `/v1/models`, `/stats`."""

import time
from importlib.metadata import version
from typing import Literal, cast

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from infilld.server import wire
from infilld.server.discovery import API
from infilld.server.jobs import Jobs


def router(jobs: Jobs) -> APIRouter:
    """The reporting routes over one engine."""
    routes = APIRouter()
    started_s = time.monotonic()

    @routes.get("/health", responses={503: {"model": wire.Health}}, response_model=wire.Health)
    async def health() -> JSONResponse:
        """200 when requests are served, 503 while the model is loading or could not be loaded."""
        state = cast(Literal["loading", "ready", "failed"], jobs.worker.state)
        said = wire.Health(api=API, version=version("infilld"), state=state)
        return JSONResponse(said.model_dump(), status_code=200 if state == "ready" else 503)

    @routes.get("/v1/models")
    async def models() -> dict[str, object]:
        """The loaded model, in the shape OpenAI clients expect."""
        told = jobs.worker.describe()
        entry = {"id": told["model"], "object": "model", "owned_by": "local", **told}
        return {"object": "list", "data": [entry]}

    @routes.get("/stats")
    async def stats() -> dict[str, object]:
        """Counters since the start; no source text."""
        failure = jobs.worker.failure
        return {
            "state": jobs.worker.state,
            "failure": None if failure is None else str(failure),
            "uptime_s": round(time.monotonic() - started_s, 3),
            "live_jobs": len(jobs),
            **jobs.worker.stats(),
        }

    return routes
