"""OpenAI's `POST /v1/chat/completions`.

An answer is written canvas after canvas, and what stands on a finished canvas is final: each chunk
brings what has become final since the last. `"diffusing": true` (Mercury's) shows the canvas
itself: the content of each chunk then replaces that of the one before.
"""

import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict

from infilld.engine.conversation import ChatAnswer, ChatRequest, ChatResult, ChatUpdate
from infilld.engine.errors import InfilldError
from infilld.server.compat import conversing, grammars
from infilld.server.compat.conversing import Growing, Turn
from infilld.server.compat.fields import Body, Flag, Number, Stop, Whole, seed_of, stops
from infilld.server.http import problems, sse
from infilld.server.http.answering import Stream, answer
from infilld.server.jobs import Jobs, LiveJob
from infilld.server.wire import Text

log = logging.getLogger(__name__)

Json = dict[str, Any]


class StreamOptions(Body):
    """What a stream tells beside the text."""

    include_usage: Flag | None = None


class ChatBody(Body):
    """Body of the request.

    What asks for a grammar or for thoughts has many names, and is read from `rest`.
    """

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "model": "starter",
                    "messages": [{"role": "user", "content": "def add(a, b):\n    return"}],
                    "max_tokens": 32,
                    "stream": False,
                }
            ]
        },
    )

    messages: list[Turn]
    model: Text | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    n_predict: Whole | None = None
    n: Whole | None = None
    stop: Stop | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    seed: Whole | None = None
    temperature: Number | None = None
    t_max_predict_ms: Number | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    diffusing: Flag | None = None

    @property
    def rest(self) -> Mapping[str, Any]:
        """Every other key."""
        return self.model_extra or {}

    @property
    def max_answer_tokens(self) -> int | None:
        """The most tokens of an answer; None: no limit, 0: none are wanted."""
        return conversing.limit(self.max_completion_tokens, self.max_tokens, self.n_predict)


def router(jobs: Jobs) -> APIRouter:
    """The route over one engine."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    @routes.post("/chat/completions", include_in_schema=False)
    async def chat(asked: ChatBody, request: Request) -> Response:
        """Answer a conversation; `stream: true` answers with events."""
        wanted = await to_engine(asked)
        if asked.max_answer_tokens == 0:
            return _without_text(asked, jobs.model)
        if asked.stream:
            job = jobs.submit(wanted, route=request.url.path, with_updates=True)
            return Stream(jobs, job, _Chunks(asked, job.id, jobs.model).frames(job))
        result = await answer(jobs, wanted, request)
        return JSONResponse(_reply(result, jobs.model))

    return routes


async def to_engine(asked: ChatBody) -> ChatRequest:
    """The engine's record of a request.

    Raises:
        RequestError: messages, a limit or a grammar that no model could serve; tools.
    """
    conversing.refuse_tools(asked.tools or asked.functions, asked.tool_choice)
    return ChatRequest(
        messages=conversing.to_messages(asked.messages),
        alternatives=1 if asked.n is None else asked.n,
        max_tokens=asked.max_answer_tokens or None,
        stop=stops(asked.stop),
        grammar=await grammars.wanted(asked.rest),
        greedy=asked.temperature == 0,
        think=conversing.wants_thoughts(asked.rest),
        deadline_ms=conversing.deadline(asked.t_max_predict_ms),
        seed=seed_of(asked.seed),
    )


def _without_text(asked: ChatBody, model: str) -> Response:
    """The answer of no token, as clients ask for it that only prepare."""
    result = ChatResult(id=secrets.token_hex(8), seed=0, answers=(ChatAnswer("", "", "length"),))
    if not asked.stream:
        return JSONResponse(_reply(result, model))
    chunks = _Chunks(asked, result.id, model)
    body = b"".join((chunks.first(), *chunks.last(result)))
    return Response(body, media_type=sse.MEDIA_TYPE, headers=dict(sse.HEADERS))


def _reply(result: ChatResult, model: str) -> Json:
    return {
        **_head(result.id, model, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": each.text} | _thoughts(each.thoughts),
                "logprobs": None,
                "finish_reason": conversing.FINISH[each.finish],
            }
            for index, each in enumerate(conversing.answers_of(result))
        ],
        "usage": usage(result),
        "infilld": conversing.extension(result),
    }


def _head(job_id: str, model: str, kind: str) -> Json:
    return {
        "id": f"chatcmpl-{job_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(result: ChatResult) -> Json:
    """What a request cost, as OpenAI counts it: the tokens of every answer, thoughts too."""
    used = result.usage
    # An engine elsewhere may count all answers together.
    written = sum(answer.tokens for answer in result.answers) or used.text_tokens
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": used.prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }


def _thoughts(text: str) -> Json:
    # Both names are in use; clients read the one they know.
    return {"reasoning_content": text, "reasoning": text} if text else {}


class _Chunks:
    """The events of one streamed answer."""

    def __init__(self, asked: ChatBody, result_id: str, model: str) -> None:
        self._is_replaced = bool(asked.diffusing)
        self._head = _head(result_id, model, "chat.completion.chunk")
        self._with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self._text, self._thoughts = Growing(), Growing()

    async def frames(self, job: LiveJob[ChatUpdate, ChatResult]) -> AsyncIterator[bytes]:
        """Everything that is sent of a job."""
        try:
            yield self.first()
            async for update in job.updates():
                if delta := self._delta(update.text, update.thoughts, update.draft):
                    yield self._chunk(0, delta)
            for frame in self.last(await job.result()):
                yield frame
        except InfilldError as error:
            yield sse.unnamed(problems.with_remedy(problems.body_of(error)))
        except Exception:
            log.exception("job %s failed", job.id)
            yield sse.unnamed(problems.with_remedy(problems.INTERNAL))

    def first(self) -> bytes:
        """The event that begins an answer."""
        return self._chunk(0, {"role": "assistant", "content": ""})

    def last(self, result: ChatResult) -> list[bytes]:
        """What is not sent yet of a result, and the end."""
        frames = []
        for index, each in enumerate(conversing.answers_of(result)):
            if index:
                delta: Json = {"role": "assistant", "content": each.text}
                delta |= _thoughts(each.thoughts)
            else:
                delta = self._delta(each.text, each.thoughts, "")
            if delta:
                frames.append(self._chunk(index, delta))
            told = conversing.extension(result)
            finish = conversing.FINISH[each.finish]
            frames.append(self._chunk(index, {}, finish, infilld=told))
        if self._with_usage:
            frames.append(sse.unnamed(self._head | {"choices": [], "usage": usage(result)}))
        return [*frames, sse.DONE]

    def _delta(self, text: str, thoughts: str, draft: str) -> Json:
        delta = _thoughts(self._thoughts.grow(thoughts))
        if self._is_replaced:
            return delta | {"content": text + draft}
        piece = self._text.grow(text)
        return delta | ({"content": piece} if piece else {})

    def _chunk(self, index: int, delta: Json, finish: str | None = None, **more: object) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        nothing_yet = {"usage": None} if self._with_usage else {}
        return sse.unnamed(self._head | {"choices": [choice]} | nothing_yet | more)
