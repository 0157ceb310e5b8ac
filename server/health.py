"""What the daemon says about itself: `/health`, `/v1/models`, `/stats`, `/metrics`."""

import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Literal, cast

from fastapi import APIRouter
from fastapi.responses import JSONResponse, PlainTextResponse

from infilld.server import wire
from infilld.server.discovery import API
from infilld.server.jobs import Jobs

EXPOSITION = "text/plain; version=0.0.4"


def router(jobs: Jobs) -> APIRouter:
    """The reporting routes over one engine."""
    routes = APIRouter()
    started_s = time.monotonic()

    @routes.get("/health", responses={503: {"model": wire.Health}}, response_model=wire.Health)
    async def health() -> JSONResponse:
        """200 when requests are served, 503 while the model is loading or could not be loaded.

        A model that was unloaded while nobody asked counts as ready: the next request waits until
        it is loaded again. `/v1/models` and `/stats` say `unloaded`.
        """
        state = cast(Literal["loading", "ready", "unloaded", "failed"], jobs.worker.state)
        if state == "unloaded":
            state = "ready"
        said = wire.Health(api=API, version=version("infilld"), state=state)
        return JSONResponse(said.model_dump(), status_code=200 if state == "ready" else 503)

    @routes.get("/v1/models")
    async def models() -> dict[str, object]:
        """The loaded model, in the shape OpenAI clients expect."""
        told = jobs.worker.describe()
        entry = {"id": told["model"], "object": "model", "owned_by": "local", **told}
        return {"object": "list", "data": [entry]}

    def told() -> dict[str, object]:
        failure = jobs.worker.failure
        return {
            "state": jobs.worker.state,
            "failure": None if failure is None else str(failure),
            "uptime_s": round(time.monotonic() - started_s, 3),
            "live_jobs": len(jobs),
            **jobs.worker.stats(),
        }

    @routes.get("/stats")
    async def stats() -> dict[str, object]:
        """Counters since the start; no source text."""
        return told()

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """The numbers of `/stats` for Prometheus."""
        return PlainTextResponse(exposition(told()), media_type=EXPOSITION)

    return routes


def exposition(stats: Mapping[str, object]) -> str:
    """Numbers in Prometheus' text format; a mapping becomes one line a key, with a label."""
    lines: list[str] = []
    for name, value in stats.items():
        if isinstance(value, Mapping):
            lines += [f'infilld_{name}{{name="{key}"}} {count}' for key, count in value.items()]
        elif isinstance(value, (int, float)):
            lines.append(f"infilld_{name} {value}")
    return "\n".join(lines) + "\n"
