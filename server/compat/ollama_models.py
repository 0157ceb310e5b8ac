"""What Ollama's clients ask before they ask for text: `/api/tags`, `/api/show` and `/api/ps`.

There is one model, under whatever name a client knows it.
"""

import time
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Response
from pydantic import ConfigDict

from infilld.server.compat.fields import Body
from infilld.server.jobs import Jobs
from infilld.server.routes.facts import FAMILY, Facts, facts, iso_time
from infilld.server.wire import Text

# Clients compare it with the release that brought what they need; this is the interface served.
OLLAMA_API = "0.12.0"
# A model that stays until the daemon needs its memory.
_NEVER = "9999-12-31T23:59:59Z"
Json = dict[str, Any]


class ShowBody(Body):
    """Body of `POST /api/show`; `name` is what `model` was called before."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "starter"}]})

    model: Text | None = None
    name: Text | None = None


def router(jobs: Jobs) -> APIRouter:
    """The routes over one engine."""
    routes = APIRouter()
    started = iso_time(time.time())

    def known() -> Facts:
        return facts(jobs.worker.describe())

    @routes.get("/api/version")
    async def version_of() -> Json:
        """The release of Ollama whose interface is served, and infilld's own."""
        return {"version": OLLAMA_API, "infilld": version("infilld")}

    @routes.get("/api/tags")
    async def tags() -> Json:
        """The configured model."""
        return {"models": [_entry(known()) | {"modified_at": started}]}

    @routes.get("/api/ps")
    async def running() -> Json:
        """The model while it is in memory."""
        found = known()
        is_held = jobs.worker.state == "ready"
        entry = _entry(found) | {
            "expires_at": _NEVER,
            "size_vram": found.memory_bytes if found.device.startswith("cuda") else 0,
            "context_length": found.context_tokens,
        }
        return {"models": [entry] if is_held else []}

    @routes.post("/api/show")
    async def show(_: ShowBody) -> Json:
        """The configured model, whatever name is asked for."""
        found = known()
        return {
            "modelfile": f"FROM {found.name}",
            "parameters": "",
            # It has no template of its own here: prompts are laid out by the engine.
            "template": "{{ .Prompt }}{{ .Suffix }}",
            "details": _details(found),
            "model_info": {
                "general.architecture": FAMILY,
                "general.basename": found.name,
                "general.parameter_count": found.parameters,
                f"{FAMILY}.context_length": found.context_tokens,
            },
            "capabilities": ["completion", "insert", *(["thinking"] if found.can_think else [])],
            "modified_at": started,
        }

    @routes.head("/", include_in_schema=False)
    async def probe() -> Response:
        """Somebody looks whether a server is there."""
        return Response()

    return routes


def _entry(found: Facts) -> Json:
    return {
        "name": found.name,
        "model": found.name,
        "size": found.memory_bytes,
        "digest": found.digest,
        "details": _details(found),
    }


def _details(found: Facts) -> Json:
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": FAMILY,
        "families": [FAMILY],
        "parameter_size": found.size,
        "quantization_level": found.dtype,
    }
