"""`GET /openapi.json`: what the routes say of themselves, and what holds for all of them.

The framework describes bodies and replies. Added here are the guard's refusals, the one shape of
errors, the bearer token, and that `stream: true` answers with events; taken out is the framework's
own error shape, which no route answers with.
"""

import ast
import inspect
from itertools import pairwise
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from infilld.server import wire
from infilld.server.http import sse
from infilld.server.http.guard import OPEN_PATHS
from infilld.server.http.problems import OLLAMA_PATHS

ERROR = "ErrorReply"
_ABOUT_ERRORS = {
    "400": "The request means nothing, or the loaded model cannot serve it.",
    "401": "The bearer token is absent or not this daemon's.",
    "403": "The Host or the Origin header is foreign.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many requests wait; try again.",
    "431": "The headers are too large.",
    "503": "The model is being loaded, or the daemon is stopping; try again.",
}
_WITH_BODY = ("408", "413", "415", "429")
_EVENTS = (
    "With `stream: true`: `event: canvas` after every pass, with the whole text of each span and "
    "how many of its leading code points are settled; then one `event: done`, whose data is the "
    "reply, or `event: error`. Closing the connection cancels within one pass."
)
_EXAMPLE_EVENTS = (
    'event: canvas\ndata: {"id": "3f1c", "seq": 0, "canvas": 0, "pass": 1, '
    '"spans": [{"text": "a * b", "settled": 2}]}\n\n'
    'event: done\ndata: {"id": "3f1c", "model": "starter", "choices": []}\n\n'
)


def install(app: FastAPI) -> None:
    """Make the application describe itself so."""

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]  # how FastAPI wants it extended


def _described(app: FastAPI) -> dict[str, Any]:
    told = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = told.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    error = wire.ErrorReply.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= error.pop("$defs", {}) | {ERROR: error}
    told["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in told["paths"].items():
        for operation in operations.values():
            _complete(path, operation)
    _tell_of_events(told, schemas)
    _explain(schemas["InfillRequest"]["properties"], wire.InfillRequest)
    return told


def _explain(properties: dict[str, Any], model: type) -> None:
    """Describe keys by the docstrings below them.

    Pydantic could, at the price of reading the source whenever the module is imported, which
    whoever waits for a language server to start would pay.
    """
    (body,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(body, ast.ClassDef)
    for field, below in pairwise(body.body):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                properties[name]["description"] = inspect.cleandoc(text)


def _error_of(path: str) -> dict[str, Any]:
    if path.startswith(OLLAMA_PATHS):
        return {
            "type": "object",
            "properties": {"error": {"type": "string"}},
            "required": ["error"],
        }
    return {"$ref": f"#/components/schemas/{ERROR}"}


def _complete(path: str, operation: dict[str, Any]) -> None:
    """Add what can come of any request by this operation."""
    answers = operation["responses"]
    answers.pop("422", None)
    for content in operation.get("requestBody", {}).get("content", {}).values():
        # Of two dialects the framework says that a body is one of them and not the other. It may
        # be both: none minds the other's keys.
        if "oneOf" in content["schema"]:
            content["schema"]["anyOf"] = content["schema"].pop("oneOf")
    operation["security"] = [] if path in OPEN_PATHS else [{"token": []}]
    for status, text in _ABOUT_ERRORS.items():
        if status == "401" and path in OPEN_PATHS:
            continue
        if status in _WITH_BODY and "requestBody" not in operation:
            continue
        content = {"application/json": {"schema": _error_of(path)}}
        answers.setdefault(status, {"description": text, "content": content})


def _tell_of_events(told: dict[str, Any], schemas: dict[str, Any]) -> None:
    event = wire.CanvasEvent.model_json_schema(
        ref_template="#/components/schemas/{model}", mode="serialization"
    )
    schemas |= event.pop("$defs", {}) | {"CanvasEvent": event}
    answer = told["paths"]["/v1/infill"]["post"]["responses"]["200"]
    answer["description"] = f"The answer. {_EVENTS}"
    answer["content"][sse.MEDIA_TYPE] = {"schema": {"type": "string"}, "example": _EXAMPLE_EVENTS}
