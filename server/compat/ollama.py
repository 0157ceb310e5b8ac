"""Ollama's `POST /api/generate` and `POST /api/chat`.

`/api/generate` fills the gap before `suffix`, or the one that marks in the prompt tell of; a `raw`
prompt without them is gone on with, and any other is a question, as Ollama's template would make it
one. Both stream lines of JSON unless told otherwise.
"""

import dataclasses
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict

from infilld.engine.conversation import ChatRequest, ChatResult, ChatUpdate, Message
from infilld.engine.errors import InfilldError, UnknownOption
from infilld.engine.request import Grammar, InfillRequest, InfillResult, Span, Timings, Usage
from infilld.server.compat import asking, conversing, grammars
from infilld.server.compat.asking import Asked
from infilld.server.compat.conversing import Growing, Turn
from infilld.server.compat.fields import Body, Flag, Number, Stop, Whole, seed_of, stops
from infilld.server.compat.markers import divided
from infilld.server.http import problems
from infilld.server.http.answering import Stream, answer
from infilld.server.jobs import AnyJob, AnyRequest, Jobs
from infilld.server.routes.facts import iso_time
from infilld.server.wire import Text

log = logging.getLogger(__name__)

LINES = "application/x-ndjson"
_NO_TIME = re.compile(r"[-+]?0*(\.0*)?(ns|us|µs|ms|s|m|h)?")
Json = dict[str, Any]


class Options(Body):
    """Those of Ollama's options that mean something here; `num_predict` 0 is no limit."""

    num_predict: Whole | None = None
    stop: Stop | None = None
    seed: Whole | None = None
    temperature: Number | None = None


class _Common(Body):
    model: Text | None = None
    stream: Flag | None = None
    format: Any = None
    options: Options | None = None
    keep_alive: Text | Number | None = None
    think: Flag | Text | None = None


class GenerateBody(_Common):
    """Body of `POST /api/generate`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "starter",
                    "prompt": "def add(a, b):\n    return ",
                    "suffix": "\n\nprint(add(1, 2))\n",
                    "options": {"num_predict": 32},
                    "stream": False,
                }
            ]
        }
    )

    prompt: Text | None = None
    suffix: Text | None = None
    system: Text | None = None
    raw: Flag | None = None
    images: list[Any] | None = None


class ChatBody(_Common):
    """Body of `POST /api/chat`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "starter",
                    "messages": [{"role": "user", "content": "def add(a, b):\n    return"}],
                    "options": {"num_predict": 32},
                    "stream": False,
                }
            ]
        }
    )

    messages: list[Turn] | None = None
    tools: list[Any] | None = None


def router(jobs: Jobs) -> APIRouter:
    """The routes over one engine."""
    routes = APIRouter()

    @routes.post("/api/generate")
    async def generate(body: GenerateBody, request: Request) -> Response:
        """Fill a gap or answer a prompt; an empty one loads the model, or unloads it."""
        call = _Call(jobs, body, request, _as_response)
        if not body.prompt and not body.suffix:
            return await call.without_text()
        gap = _gap(body)
        return await (
            call.ask(await _conversation(body, _question(body))) if gap is None else call.fill(gap)
        )

    @routes.post("/api/chat")
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation; an empty one loads the model, or unloads it."""
        call = _Call(jobs, body, request, _as_message)
        if not body.messages:
            return await call.without_text()
        conversing.refuse_tools(body.tools, None)
        return await call.ask(await _conversation(body, conversing.to_messages(body.messages)))

    return routes


def _gap(body: GenerateBody) -> Asked | None:
    """The gap to fill, without its grammar; None: it is a question."""
    prompt, options = body.prompt or "", body.options or Options()
    # Ollama's own client always sends a suffix; where it is empty there is none.
    if not body.suffix and not body.raw and divided(prompt) is None:
        return None
    gap = asking.gap_of(prompt, body.suffix)
    return Asked(
        prefix=gap.prefix,
        suffix=gap.suffix,
        context=gap.context,
        path=gap.path,
        max_tokens=conversing.limit(options.num_predict) or None,
        stop=stops(options.stop),
        seed=seed_of(options.seed),
    )


def _question(body: GenerateBody) -> tuple[Message, ...]:
    conversing.refuse_images(body.images)
    told = (Message("system", body.system),) if body.system else ()
    return (*told, Message("user", body.prompt or ""))


async def _conversation(body: _Common, messages: tuple[Message, ...]) -> ChatRequest:
    options = body.options or Options()
    return ChatRequest(
        messages=messages,
        max_tokens=conversing.limit(options.num_predict) or None,
        stop=stops(options.stop),
        grammar=await _grammar(body.format),
        greedy=options.temperature == 0,
        think=conversing.wants_thoughts({"think": body.think}),
        seed=seed_of(options.seed),
    )


async def _grammar(wish: object) -> Grammar | None:
    """What `format` asks for: "json", or a schema."""
    if wish is None or wish in ("", {}):
        return None
    if isinstance(wish, str) and wish != "json":
        raise UnknownOption(f"format is {wish[:40]!r}", remedy='Send "json" or a JSON schema.')
    kind = {"type": "json_object"} if wish == "json" else None
    return await grammars.wanted({"response_format": kind} if kind else {"json_schema": wish})


class _Call:
    """One request and what becomes of it.

    Args:
        shape: puts a text and thoughts where the route has them.
    """

    def __init__(
        self, jobs: Jobs, body: _Common, request: Request, shape: Callable[[str, str], Json]
    ) -> None:
        self._jobs, self._body, self._request, self._shape = jobs, body, request, shape
        self._model = body.model or jobs.model

    async def without_text(self) -> Response:
        """Load the model, or unload it."""
        if self._unloads:
            self._jobs.worker.unload()
            return self._only_done("unload")
        gap = InfillRequest(text="", spans=(Span(0, 0),), warm=True)
        await answer(self._jobs, gap, self._request)
        return self._only_done("load")

    async def fill(self, asked: Asked) -> Response:
        """Fill a gap."""
        asked = dataclasses.replace(asked, grammar=await _grammar(self._body.format))
        wanted = asking.wanted_of(self._jobs, asked)

        def told(result: InfillResult) -> Iterator[Json]:
            answered = asking.shaped(asked, wanted, result)
            choice = answered.choices[0]
            finish = "length" if result.reason == "deadline" else choice.finish
            costs = _costs(result.usage, result.timings, choice.tokens)
            if choice.text:
                yield self._line(choice.text, "", {"done": False})
            costs |= {"infilld": answered.extension}
            yield self._line("", "", {"done": True, "done_reason": finish, **costs})

        return await self._serve(wanted, told, lambda update: iter(()))

    async def ask(self, wanted: ChatRequest) -> Response:
        """Answer a conversation."""
        text, thoughts = Growing(), Growing()

        def told_now(update: ChatUpdate) -> Iterator[Json]:
            piece, thought = text.grow(update.text), thoughts.grow(update.thoughts)
            if piece or thought:
                yield self._line(piece, thought, {"done": False})

        def told(result: ChatResult) -> Iterator[Json]:
            found = conversing.answers_of(result)[0]
            piece, thought = text.grow(found.text), thoughts.grow(found.thoughts)
            if piece or thought:
                yield self._line(piece, thought, {"done": False})
            costs = _costs(result.usage, result.timings, result.usage.text_tokens)
            costs |= {"infilld": conversing.extension(result)}
            finish = conversing.FINISH[found.finish]
            yield self._line("", "", {"done": True, "done_reason": finish, **costs})

        return await self._serve(wanted, told, told_now)

    @property
    def _unloads(self) -> bool:
        """Whether the model's memory is to be given back behind this request."""
        wish = self._body.keep_alive
        if isinstance(wish, str):
            return wish != "" and _NO_TIME.fullmatch(wish) is not None
        return wish == 0

    async def _serve(
        self,
        wanted: AnyRequest,
        told: Callable[[Any], Iterator[Json]],
        told_now: Callable[[Any], Iterator[Json]],
    ) -> Response:
        """Write what is told of updates and of the result, as lines or as one object."""
        if self._body.stream is not False:
            job = self._jobs.submit(wanted, route=self._request.url.path, with_updates=True)
            return Stream(self._jobs, job, self._lines(job, told, told_now), LINES)
        result = await answer(self._jobs, wanted, self._request)
        *pieces, last = told(result)
        self._unload_if_asked()
        shown = (piece for piece in pieces[:1])
        return JSONResponse(last | next(shown, {}) | {"done": True})

    async def _lines(
        self,
        job: AnyJob,
        told: Callable[[Any], Iterator[Json]],
        told_now: Callable[[Any], Iterator[Json]],
    ) -> AsyncIterator[bytes]:
        try:
            async for update in job.updates():
                for line in told_now(update):
                    yield _encoded(line)
            for line in told(await job.result()):
                yield _encoded(line)
            self._unload_if_asked()
        except InfilldError as error:
            yield _encoded(problems.as_ollama(problems.body_of(error)))
        except Exception:
            log.exception("job %s failed", job.id)
            yield _encoded(problems.as_ollama(problems.INTERNAL))

    def _unload_if_asked(self) -> None:
        if self._unloads:
            self._jobs.worker.unload()

    def _only_done(self, why: str) -> Response:
        return JSONResponse(self._line("", "", {"done": True, "done_reason": why}))

    def _line(self, text: str, thoughts: str, more: Json) -> Json:
        head = {"model": self._model, "created_at": iso_time(time.time())}
        return {**head, **self._shape(text, thoughts), **more}


def _as_response(text: str, thoughts: str) -> Json:
    return {"response": text} | ({"thinking": thoughts} if thoughts else {})


def _as_message(text: str, thoughts: str) -> Json:
    said = {"role": "assistant", "content": text}
    return {"message": said | ({"thinking": thoughts} if thoughts else {})}


def _costs(used: Usage, spent: Timings, tokens: int) -> Json:
    """Tokens, and times in ns; a model that had to be loaded was loaded while the job waited."""
    return {
        "total_duration": _ns(spent.total_ms),
        "load_duration": _ns(spent.queue_ms),
        "prompt_eval_count": used.prompt_tokens,
        "prompt_eval_duration": _ns(spent.encode_ms),
        "eval_count": tokens,
        "eval_duration": _ns(spent.denoise_ms),
    }


def _ns(ms: float) -> int:
    return round(ms * 1_000_000)


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode("ascii") + b"\n"
