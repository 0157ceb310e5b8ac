"""Every error as an HTTP status and `{error: {code, message, remedy}}`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from infilld.engine import errors
from infilld.engine.errors import InfilldError

log = logging.getLogger(__name__)

# Every class is listed, none by inheritance: who adds an error decides its status.
STATUS: Mapping[type[InfilldError], int] = {
    errors.InfilldError: 500,
    errors.RequestError: 400,
    errors.SpanOutOfRange: 400,
    errors.SpansOverlap: 400,
    errors.GapTooLong: 400,
    errors.ContextTooLong: 400,
    errors.BadText: 400,
    errors.BadGrammar: 400,
    errors.UnknownOption: 400,
    errors.Unsupported: 400,
    errors.ModelError: 500,
    errors.CheckpointMissing: 500,
    errors.CheckpointMismatch: 500,
    errors.UnsupportedDevice: 500,
    errors.NotEnoughMemory: 500,
    errors.Unavailable: 503,
    errors.Loading: 503,
    errors.Busy: 429,
    errors.UnknownId: 404,
    # Nobody reads it when the client went away; otherwise the daemon is stopping.
    errors.Cancelled: 503,
}
RETRY_AFTER_S = 1


def body(code: str, message: str, remedy: str = "") -> dict[str, object]:
    """The error object of every answer that is not a 2xx."""
    return {"error": {"code": code, "message": message, "remedy": remedy}}


# The log has the traceback; the message may quote source text and stays inside.
INTERNAL = body("internal", "an unexpected error", "Look into: infilld logs")

_IN_RANGE = "Give a number in this range; GET /openapi.json has the bounds."


def body_of(error: InfilldError) -> dict[str, object]:
    """The error object of one of our errors."""
    return body(error.code, str(error), error.remedy)


def response(status: int, content: Mapping[str, object]) -> JSONResponse:
    """The answer; one that may succeed later says when to try again."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else None
    return JSONResponse(content, status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    """Make every error of the application answer in our shape."""
    app.add_exception_handler(InfilldError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)


async def _ours(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, InfilldError)
    status = STATUS[type(error)]
    if status == 500:
        log.error("%s: %s", error.code, error)
    return response(status, body_of(error))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response(400, explain(error.errors()))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    codes = {400: "malformed_json", 404: "not_found", 405: "method_not_allowed"}
    path = f"{request.method} {request.url.path}"
    content = body(codes.get(error.status_code, "http"), f"{path}: {error.detail}")
    answer = response(error.status_code, content)
    answer.headers.update(error.headers or {})
    return answer


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return response(500, INTERNAL)


def explain(found: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The first thing that is wrong with a body, in our shape."""
    first = found[0]
    kind = first["type"]
    key = ".".join(str(part) for part in first["loc"] if part != "body")
    if kind == "extra_forbidden":
        remedy = "Leave it out; GET /openapi.json lists the keys."
        return body("unknown_key", f"unknown key {key}", remedy)
    if kind == "json_invalid":
        detail = f"malformed JSON at character {key}: {first['ctx']['error']}"
        return body("malformed_json", detail, "Send one JSON object.")
    if kind == "value_error" and "lone surrogate" in first["msg"]:
        detail = str(first["ctx"]["error"])
        return body("bad_text", f"{detail} of {key}", errors.BadText.remedy)
    if kind in ("greater_than_equal", "less_than_equal"):
        # The code the engine gives to numbers out of range.
        return body(errors.UnknownOption.code, f"{key}: {first['msg']}", _IN_RANGE)
    return body(
        "bad_request", f"{key or 'body'}: {first['msg']}", "GET /openapi.json has the types."
    )
