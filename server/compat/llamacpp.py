"""llama.cpp's own routes: `POST /infill` and `/completion`, `GET /props` and `/slots`.

`/infill` serves llama.vim and llama.vscode. What they send about samplers, slots and caches is
ignored: the engine denoises, and finds its caches by itself.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict

from infilld.engine.errors import Unsupported
from infilld.engine.request import Context, Grammar
from infilld.server.compat import asking, conversing, grammars, llamacpp_reply
from infilld.server.compat.asking import Answered, Asked
from infilld.server.compat.fields import Body, Flag, Number, Stop, Whole, seed_of, stops
from infilld.server.compat.streaming import streamed
from infilld.server.http import sse
from infilld.server.http.answering import answer
from infilld.server.jobs import Jobs
from infilld.server.routes.facts import Facts, facts
from infilld.server.wire import MAX_TOKENS, Text

MAX_COMPLETIONS = 4
# What is given to the prompt where a client names the time of the prediction alone.
PROMPT_MS = 500.0
Json = dict[str, Any]


class Extra(Body):
    """A piece of another file."""

    filename: Text | None = None
    text: Text | None = None


class Options(Body):
    """What both routes take; what asks for a grammar has several names and is in `rest`."""

    model_config = ConfigDict(extra="allow")

    n_predict: Whole | None = None
    n_indent: Whole | None = None
    n_cmpl: Whole | None = None
    stop: Stop | None = None
    seed: Whole | None = None
    stream: Flag | None = None
    t_max_prompt_ms: Number | None = None
    t_max_predict_ms: Number | None = None
    response_fields: list[Any] | None = None

    @property
    def rest(self) -> Mapping[str, Any]:
        """Every other key."""
        return self.model_extra or {}


class InfillBody(Options):
    """Body of `POST /infill`; `prompt` is the end of the prefix."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "input_prefix": "def add(a, b):\n",
                    "input_suffix": "\n\nprint(add(1, 2))\n",
                    "input_extra": [
                        {"filename": "b.py", "text": "def sub(a, b):\n    return a - b"}
                    ],
                    "prompt": "    return ",
                    "n_predict": 32,
                }
            ]
        }
    )

    input_prefix: Text | None = None
    input_suffix: Text | None = None
    input_extra: list[Extra] | None = None
    prompt: Text | None = None


class CompletionBody(Options):
    """Body of `POST /completion`; `prompt` may hold the marks of a gap."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "def add(a, b):\n    return", "n_predict": 8}]}
    )

    prompt: Text | list[Any]


def router(jobs: Jobs) -> APIRouter:
    """The routes over one engine."""
    routes = APIRouter()

    @routes.post("/infill")
    async def infill(body: InfillBody, request: Request) -> Response:
        """Fill the gap between prefix and suffix; `n_predict: 0` only prepares for it."""
        asked = dataclasses.replace(
            _asked(body, await grammars.wanted(body.rest)),
            prefix=(body.input_prefix or "") + (body.prompt or ""),
            suffix=body.input_suffix or "",
            context=_context(body.input_extra or ()),
        )
        return await _serve(jobs, body, asked, request)

    @routes.post("/completion")
    @routes.post("/completions", include_in_schema=False)
    async def completion(body: CompletionBody, request: Request) -> Response:
        """Go on with a text, or fill the gap that its marks tell of."""
        gap = asking.gap_of(_only_text(body.prompt), None)
        asked = dataclasses.replace(
            _asked(body, await grammars.wanted(body.rest)),
            prefix=gap.prefix,
            suffix=gap.suffix,
            context=gap.context,
            path=gap.path,
        )
        return await _serve(jobs, body, asked, request)

    @routes.get("/props")
    async def props() -> Json:
        """What llama.cpp tells of a server; paths of this machine are left out."""
        known = facts(jobs.worker.describe())
        return {
            "default_generation_settings": {"n_ctx": known.context_tokens, "params": {}},
            "total_slots": known.max_live,
            "model_alias": known.name,
            "model_path": known.name,
            "modalities": {"vision": False, "audio": False},
            "build_info": f"infilld {version('infilld')}",
            "is_sleeping": known.state == "unloaded",
        }

    @routes.get("/slots")
    async def slots() -> list[Json]:
        """One for each job that may run beside others; no text."""
        known, busy = facts(jobs.worker.describe()), len(jobs)
        return [
            {"id": slot, "n_ctx": known.context_tokens, "is_processing": slot < busy}
            for slot in range(known.max_live)
        ]

    return routes


def _asked(body: Options, grammar: Grammar | None) -> Asked:
    """What both routes ask, without its text."""
    most = conversing.limit(body.n_predict)
    return Asked(
        prefix="",
        n=max(1, min(body.n_cmpl or 1, MAX_COMPLETIONS)),
        max_tokens=most,
        stop=stops(body.stop),
        n_indent=max(0, min(body.n_indent or 0, MAX_TOKENS)),
        seed=seed_of(body.seed),
        deadline_ms=_deadline(body),
        grammar=grammar,
    )


def _deadline(body: Options) -> float | None:
    """Time from arrival, ms: what may be spent on the prompt, and on the prediction.

    llama.cpp counts the second from the first token on; one clock that has run since the request
    came is what whoever waits for the answer can see.
    """
    if body.n_predict == 0:
        # Preparing is worth its time, and nobody waits for it.
        return None
    prompt_ms = PROMPT_MS if body.t_max_prompt_ms is None else body.t_max_prompt_ms
    return conversing.deadline(body.t_max_predict_ms, prompt_ms)


def _context(pieces: Sequence[Extra]) -> tuple[Context, ...]:
    return tuple(
        Context(each.filename or "context", each.text, "recent") for each in pieces if each.text
    )


def _only_text(prompt: str | Sequence[object]) -> str:
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and isinstance(prompt[0], str):
        return prompt[0]
    raise Unsupported(
        "the prompt is a list of tokens or of several prompts", remedy="Send one text."
    )


async def _serve(jobs: Jobs, body: Options, asked: Asked, request: Request) -> Response:
    writer = _Writer(jobs, body, asked)
    if body.stream:
        return streamed(
            jobs,
            [asked],
            request,
            write=lambda _, answered: writer.frames(answered),
            end=lambda _: (),
        )
    wanted = asking.wanted_of(jobs, asked)
    # Nobody waits for what only prepares.
    wanted = dataclasses.replace(wanted, background=wanted.warm)
    replies = writer.replies(asking.shaped(asked, wanted, await answer(jobs, wanted, request)))
    return JSONResponse(replies if asked.n > 1 else replies[0])


class _Writer:
    """Writes the answers to one request."""

    def __init__(self, jobs: Jobs, body: Options, asked: Asked) -> None:
        self._jobs, self._body, self._asked = jobs, body, asked

    def replies(self, answered: Answered) -> list[Json]:
        """One for each text."""
        return [
            llamacpp_reply.chosen(reply, self._body.response_fields)
            for reply in self._full(answered)
        ]

    def frames(self, answered: Answered) -> Iterator[bytes]:
        """Each text, and behind it all that is told of it."""
        for reply in self._full(answered):
            if reply["content"]:
                piece = {key: reply[key] for key in ("index", "content", "tokens")}
                yield sse.unnamed(piece | {"stop": False})
            last = reply | {"content": ""}
            yield sse.unnamed(llamacpp_reply.chosen(last, self._body.response_fields))

    def _full(self, answered: Answered) -> list[Json]:
        known = facts(self._jobs.worker.describe())
        settings = self._settings(known, answered.result.seed)
        return [
            llamacpp_reply.full(
                self._asked,
                answered,
                choice,
                index=index,
                model=known.name,
                settings=settings,
            )
            for index, choice in enumerate(answered.choices)
        ]

    def _settings(self, known: Facts, seed: int) -> Json:
        asked, body = self._asked, self._body
        return {
            "n_ctx": known.context_tokens,
            "n_predict": -1 if asked.max_tokens is None else asked.max_tokens,
            "n_indent": asked.n_indent,
            "n_cmpl": asked.n,
            "seed": seed,
            "stop": list(asked.stop),
            "stream": bool(body.stream),
            "t_max_predict_ms": body.t_max_predict_ms or 0,
        }
