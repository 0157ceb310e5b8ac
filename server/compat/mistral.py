"""Mistral's `POST /v1/fim/completions`, which is Mercury's too.

They differ in where the text stands: `choices[].message.content` and `choices[].delta.content`
with Mistral, `choices[].text` with Mercury. Replies have both.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from infilld.server.compat import fields
from infilld.server.compat.asking import Answered, Asked, ask
from infilld.server.compat.completing import Completing
from infilld.server.compat.openai import Why
from infilld.server.compat.streaming import streamed
from infilld.server.http import sse
from infilld.server.jobs import Jobs
from infilld.server.wire import Text


class FimRequest(Completing):
    """Body of `POST /v1/fim/completions`.

    `temperature`, `top_p` and `presence_penalty` are taken and ignored: a canvas is not sampled
    token by token.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "any",
                    "prompt": "def add(a, b):\n    return ",
                    "suffix": "\n\n\nprint(add(1, 2))\n",
                    "max_tokens": 32,
                }
            ]
        }
    )

    prompt: Text
    random_seed: fields.Whole | None = None
    metadata: dict[str, Any] | None = None

    async def asked(self) -> Asked:
        """What is asked.

        Raises:
            BadGrammar, UnknownOption: see `grammars.wanted` and `gap`.
        """
        seed = self.seed if self.random_seed is None else self.random_seed
        return self.gap(self.prompt, seed, await self.grammar_wanted())


class AssistantMessage(BaseModel):
    """A text as a turn of a conversation."""

    role: Literal["assistant"] = "assistant"
    content: str
    tool_calls: None = None


class FimChoice(BaseModel):
    """One text, twice; no suggestion is an empty one."""

    index: int
    message: AssistantMessage
    text: str
    finish_reason: Literal["stop", "length"]


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class FimReply(BaseModel):
    """Reply of `POST /v1/fim/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[FimChoice]
    usage: Usage
    infilld: Why


def router(jobs: Jobs) -> APIRouter:
    """The route over one engine."""
    routes = APIRouter()

    @routes.post("/v1/fim/completions", response_model=FimReply)
    async def fim(asked: FimRequest, request: Request) -> Response:
        """Fill the gap between `prompt` and `suffix`.

        `stream: true` answers with `data:` events, closed by `data: [DONE]`. A text is sent when
        it is final: what is on a canvas may still change.
        """
        wanted = await asked.asked()
        writer = Writer(jobs.model, int(time.time()))
        if asked.stream:
            return streamed(jobs, [wanted], request, write=writer.chunks, end=writer.end)
        return JSONResponse(writer.reply(await ask(jobs, wanted, request)))

    return routes


@dataclass(frozen=True)
class Writer:
    """Writes an answer as a turn of a conversation."""

    model: str
    created: int

    def reply(self, answer: Answered, texts: Sequence[str] | None = None) -> dict[str, Any]:
        """The reply; `texts` stand in place of the answer's own."""
        choices = []
        for index, choice in enumerate(answer.choices):
            text = choice.text if texts is None else texts[index]
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "tool_calls": None},
                    "text": text,
                    "finish_reason": choice.finish,
                }
            )
        told = {"usage": usage_of(answer), "infilld": answer.extension}
        return self._head(answer, "chat.completion") | {"choices": choices} | told

    def chunks(self, number: int, answer: Answered) -> Iterator[bytes]:
        """Frames of an answer: each text, and then why it ends."""
        head = self._head(answer, "chat.completion.chunk")
        last = len(answer.choices) - 1
        for index, choice in enumerate(answer.choices):
            if choice.text:
                yield sse.unnamed(head | {"choices": [_delta(index, choice.text, None)]})
            end = head | {"choices": [_delta(index, "", choice.finish)]}
            if index == last:
                end |= {"usage": usage_of(answer), "infilld": answer.extension}
            yield sse.unnamed(end)

    def end(self, answers: list[Answered]) -> Iterator[bytes]:
        """What closes the stream."""
        yield sse.DONE

    def _head(self, answer: Answered, kind: str) -> dict[str, Any]:
        return {
            "id": f"cmpl-{answer.result.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


def _delta(index: int, text: str, finish: str | None) -> dict[str, Any]:
    delta = {"role": "assistant", "content": text}
    return {"index": index, "delta": delta, "text": text, "finish_reason": finish}


def usage_of(answer: Answered) -> dict[str, int]:
    """Tokens read and written."""
    read, written = answer.result.usage.prompt_tokens, answer.tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
