"""What the daemon says about itself: `/health`, `/v1/models`."""

import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Literal, cast

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from infilld.engine.errors import UnknownId
from infilld.server import wire
from infilld.server.discovery import API
from infilld.server.jobs import Jobs
from infilld.server.routes.facts import FAMILY, facts

_NOT_READY: Mapping[str, wire.LoadingError] = {
    state: wire.LoadingError(code=503, message=message, type="unavailable_error")
    for state, message in (
        ("loading", "Loading model"),
        ("failed", "The model could not be loaded; infilld logs says why"),
    )
}


def router(jobs: Jobs) -> APIRouter:
    """The reporting routes over one engine."""
    routes = APIRouter()
    started = int(time.time())

    @routes.get("/health", responses={503: {"model": wire.Health}}, response_model=wire.Health)
    async def health() -> JSONResponse:
        """200 when requests are served, 503 while the model is loading or could not be loaded.

        A model that was unloaded while nobody asked counts as ready: the next request waits until
        it is loaded again. `/v1/models` and `/stats` say `unloaded`.
        """
        state = cast(Literal["loading", "ready", "unloaded", "failed"], jobs.worker.state)
        if state == "unloaded":
            state = "ready"
        is_ready = state == "ready"
        said = wire.Health(
            api=API,
            version=version("infilld"),
            state=state,
            status="ok" if is_ready else None,
            error=None if is_ready else _NOT_READY[state],
        )
        content = said.model_dump(exclude_none=True)
        return JSONResponse(content, status_code=200 if is_ready else 503)

    @routes.get("/v1/models")
    async def models() -> dict[str, object]:
        """The configured model, in the shapes that clients of OpenAI and of llama.cpp expect."""
        entry = _entry(jobs, started)
        named = {"name": entry["id"], "model": entry["id"], "type": "model"}
        listed = {**named, "capabilities": ["completion"], "details": {"family": FAMILY}}
        return {"object": "list", "data": [entry], "models": [listed]}

    @routes.get("/v1/models/{model:path}", responses={404: {"model": wire.ErrorReply}})
    async def one(model: str) -> dict[str, object]:
        """The configured model, asked for by its name."""
        entry = _entry(jobs, started)
        if model != entry["id"]:
            raise UnknownId(
                f"the configured model is {entry['id']}",
                remedy="Ask for this one; other routes take any name.",
            )
        return entry

    return routes


def _entry(jobs: Jobs, started: int) -> dict[str, object]:
    """The configured model, in the words of OpenAI, of llama.cpp and of Mistral."""
    told = jobs.worker.describe()
    known = facts(told)
    return {
        **told,
        "id": known.name,
        "object": "model",
        "created": started,
        "owned_by": "infilld",
        "type": "base",
        "capabilities": {"completion_fim": True, "completion_chat": True},
        "meta": {
            "n_ctx_train": known.context_tokens,
            "n_params": known.parameters,
            "size": known.memory_bytes,
        },
    }
