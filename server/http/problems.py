"""Every error as an HTTP status and a body that every client can read.

`{error: {code, message, remedy, type, param}}`: `code` and `remedy` are ours, `type` and `param`
what OpenAI's and llama.cpp's clients look at. These show nothing but `message`, so on all routes
that are not our own it says what to do as well. Below `/api/` it is `{error: "message. remedy"}`,
as Ollama's clients expect. No message quotes more than a few words of what a client sent.
"""

import logging
import re
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
TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}
"""What `type` says of a status, in OpenAI's and llama.cpp's words; else by its hundreds."""
OLLAMA_PATHS = "/api/"
# Their clients read `remedy`.
_OURS = frozenset({"/v1/infill", "/v1/feedback", "/v1/model", "/v1/recent", "/stats", "/health"})
_QUOTED_CHARS = 80
_MESSAGE_CHARS = 1000
# Not the apostrophe of a word.
_LONG_QUOTE = re.compile(r"""(?<!\w)(['"`])((?:(?!\1).){80})(?:(?!\1).)+\1""", re.DOTALL)


def body(
    code: str, message: str, remedy: str = "", *, status: int = 400, param: str | None = None
) -> dict[str, object]:
    """The error object of every answer that is not a 2xx.

    Args:
        code: stable word. message: what was found. remedy: one sentence on what to do.
        status: of the answer, which `type` follows. param: the key that is wrong, where it is one.
    """
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if status < 500:
        message = _LONG_QUOTE.sub(r"\1\2…\1", message)
        if len(message) > _MESSAGE_CHARS:
            message = f"{message[:_MESSAGE_CHARS]}…"
    told = {"code": code, "message": message, "remedy": remedy, "type": kind, "param": param}
    return {"error": told}


def short(text: str) -> str:
    """A quotation of what a client sent, cut where it is long."""
    return text if len(text) <= _QUOTED_CHARS else f"{text[:_QUOTED_CHARS]}…"


def as_ollama(content: Mapping[str, object]) -> dict[str, object]:
    """An error object as Ollama's clients read it: one text."""
    return {"error": _sentences(_error_of(content))}


def with_remedy(content: Mapping[str, object]) -> dict[str, object]:
    """An error object whose message says what to do, for clients that show nothing else."""
    error = _error_of(content)
    return {"error": {**error, "message": _sentences(error)}}


def _error_of(content: Mapping[str, object]) -> Mapping[str, object]:
    error = content["error"]
    assert isinstance(error, Mapping)
    return error


def _sentences(error: Mapping[str, object]) -> str:
    message, remedy = str(error["message"]), error["remedy"]
    if not remedy:
        return message
    return f"{message}{'' if message.endswith(('.', '!', '?')) else '.'} {remedy}"


# The log has the traceback.
INTERNAL = body("internal", "an unexpected error", "Look into: infilld logs", status=500)

_CODES = {400: "malformed_json", 404: "not_found", 405: "method_not_allowed"}
_REMEDIES = {
    400: "Send one JSON object in UTF-8, not nested more than a few hundred deep.",
    404: "GET /openapi.json lists the routes.",
    405: "GET /openapi.json lists the routes and their methods.",
}
# Where a path takes bodies of two dialects, an error says which one it is before it names the key.
OPENAI, TABBY = "(openai)", "(tabby)"
# Where a key takes several types, an error names the one it was tried as behind the key.
_TYPES = frozenset({"str", "int", "float", "bool"})
_NO_KEYS = frozenset({"body", OPENAI, TABBY})
_IN_RANGE = "Give a number in this range; GET /openapi.json has the bounds."


def body_of(error: InfilldError) -> dict[str, object]:
    """The error object of one of our errors."""
    return body(error.code, str(error), error.remedy, status=STATUS[type(error)])


def response(status: int, content: Mapping[str, object], *, path: str = "") -> JSONResponse:
    """The answer, in the dialect of a path; one that may succeed later says when to try again."""
    if path.startswith(OLLAMA_PATHS):
        content = as_ollama(content)
    elif path and path not in _OURS:
        content = with_remedy(content)
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
    return response(status, body_of(error), path=request.url.path)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return response(400, explain(error.errors()), path=request.url.path)


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status, path = error.status_code, request.url.path
    content = body(
        _CODES.get(status, "http"),
        f"{request.method} {short(path)}: {error.detail}",
        _REMEDIES.get(status, ""),
        status=status,
    )
    answer = response(status, content, path=path)
    answer.headers.update(error.headers or {})
    return answer


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return response(500, INTERNAL, path=request.url.path)


def _keys(place: Sequence[str | int], *, is_ours: bool) -> list[str]:
    """The keys that lead to a place; those of a client may be called anything."""
    parts = [str(part) for part in place if part not in _NO_KEYS]
    return [p for p in parts if not (is_ours and (p in _TYPES or p.endswith("]")))]


def explain(found: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The first thing that is wrong with a body, in our shape."""
    first = found[0]
    kind = first["type"]
    # A key may be anything, also a whole document.
    key = short(".".join(_keys(first["loc"], is_ours=kind != "extra_forbidden")))
    param = key or None
    if kind == "extra_forbidden":
        remedy = "Leave it out; GET /openapi.json lists the keys."
        return body("unknown_key", f"unknown key {key}", remedy, param=param)
    if kind == "json_invalid":
        detail = f"malformed JSON at character {key}: {first['ctx']['error']}"
        return body("malformed_json", detail, "Send one JSON object.")
    if kind == "value_error" and "lone surrogate" in first["msg"]:
        detail = str(first["ctx"]["error"])
        return body("bad_text", f"{detail} of {key}", errors.BadText.remedy, param=param)
    if kind in ("greater_than_equal", "less_than_equal"):
        # The code the engine gives to numbers out of range.
        return body(errors.UnknownOption.code, f"{key}: {first['msg']}", _IN_RANGE, param=param)
    if not key:
        found_out = "is missing" if kind == "missing" else "is no JSON object"
        return body("bad_request", f"the body {found_out}", "Send one JSON object.")
    remedy = "GET /openapi.json has the types."
    found_out = short(first["msg"].removeprefix("Value error, "))
    return body("bad_request", f"{key}: {found_out}", remedy, param=param)
