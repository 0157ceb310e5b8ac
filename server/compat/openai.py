"""OpenAI's `POST /v1/completions`, with `suffix` or with a model family's markers in `prompt`.

Tabby has its own request on this path, told apart by `segments`; see `tabby.py`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Request
from fastapi.openapi.models import Example
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from infilld.server.compat import fields, tabby
from infilld.server.compat.asking import Answered, Asked, Shaped, ask
from infilld.server.compat.completing import Completing
from infilld.server.compat.streaming import streamed
from infilld.server.http import sse
from infilld.server.http.problems import OPENAI, TABBY
from infilld.server.jobs import Jobs
from infilld.server.wire import Text

MAX_PROMPTS = 32


_WITH_SUFFIX: dict[str, Any] = {
    "model": "any",
    "prompt": "def add(a, b):\n    return ",
    "suffix": "\n\n\nprint(add(1, 2))\n",
    "max_tokens": 32,
    "stop": ["\n\n"],
}
_WITH_MARKERS: dict[str, Any] = {
    "model": "any",
    "prompt": "<|fim_prefix|>def add(a, b):\n    return <|fim_suffix|>\n<|fim_middle|>",
}


def _prompts(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return [value or ""]
    if isinstance(value, list) and any(isinstance(each, (int, list)) for each in value):
        raise ValueError("token ids are not read here: send the prompt as text")
    if not isinstance(value, list):
        raise ValueError("expected a text, or a list of texts")
    return value


Prompts = Annotated[
    list[Text],
    BeforeValidator(_prompts, json_schema_input_type=str | list[str] | None),
    Field(min_length=1, max_length=MAX_PROMPTS),
]


class StreamOptions(fields.Body):
    """What a stream tells beside the text."""

    include_usage: fields.Flag | None = None


class CompletionRequest(Completing):
    """Body of `POST /v1/completions`.

    `prompt` is the text before the gap and `suffix` the text behind it; without a suffix, a prompt
    with the fill-in-the-middle markers of Qwen, StarCoder, Code Llama, DeepSeek, GLM or Codestral
    has both. Several prompts are answered in order. `max_tokens` above what a canvas holds is as
    much as it holds; 0 only warms up. Any `model` is taken. `temperature`, `top_p`, `best_of` and
    other keys of samplers are taken and ignored: a canvas is not sampled token by token.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [_WITH_SUFFIX, _WITH_MARKERS]})

    prompt: Prompts = Field(default_factory=lambda: [""])
    best_of: fields.Whole | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[fields.Whole, Field(ge=0)] | None = None
    echo: fields.Flag | None = None
    frequency_penalty: fields.Number | None = None

    async def asked(self) -> list[Asked]:
        """What is asked, prompt by prompt.

        Raises:
            BadGrammar, UnknownOption: see `grammars.wanted` and `gap`.
        """
        grammar = await self.grammar_wanted()
        return [self.gap(prompt, self.seed, grammar) for prompt in self.prompt]


class LogProbs(BaseModel):
    """Tokens of a text, their causal log-probabilities (nats), and where each begins in `text`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None = None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text; no suggestion is an empty one."""

    index: int
    text: str
    logprobs: LogProbs | None = None
    finish_reason: Literal["stop", "length"] | None


class PromptDetails(BaseModel):
    """Prompt tokens that were there already."""

    cached_tokens: int


class CompletionUsage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Why(BaseModel):
    """What infilld says of an answer: its id, and why it has no text.

    `reason` is "ok" or a code, `why` one sentence. `id` is what `POST /v1/feedback` takes.
    """

    id: str
    reason: str
    why: str


class Completion(BaseModel):
    """Reply of `POST /v1/completions`; `infilld` tells of the first prompt."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage
    infilld: Why


def kind_of(body: Any) -> str:
    """Whose request a body is: `problems.TABBY` or `problems.OPENAI`."""
    keys = ("segments", "debug_options")
    is_tabby = isinstance(body, dict) and any(body.get(key) is not None for key in keys)
    return TABBY if is_tabby or isinstance(body, tabby.TabbyRequest) else OPENAI


AnyRequest = Annotated[
    Annotated[CompletionRequest, Tag(OPENAI)] | Annotated[tabby.TabbyRequest, Tag(TABBY)],
    Discriminator(kind_of),
]


_EXAMPLES: dict[str, Example] = {
    "suffix": {"value": _WITH_SUFFIX},
    "markers": {"value": _WITH_MARKERS},
    "tabby": {"value": tabby.EXAMPLE},
}


def router(jobs: Jobs) -> APIRouter:
    """The route over one engine, with Tabby's beside it."""
    routes = APIRouter()
    tabbies = tabby.Tabby(jobs)

    @routes.post("/v1/completions", response_model=Completion | tabby.TabbyReply)
    async def completions(
        asked: Annotated[AnyRequest, Body(openapi_examples=_EXAMPLES)], request: Request
    ) -> Response:
        """Fill the gap between `prompt` and `suffix`, or Tabby's `segments`.

        `stream: true` answers with `data:` events, closed by `data: [DONE]`. A text is sent when
        it is final: what is on a canvas may still change.
        """
        if isinstance(asked, tabby.TabbyRequest):
            return JSONResponse(await tabbies.complete(asked, request))
        wanted = await asked.asked()
        writer = _Writer(asked, jobs.model, int(time.time()))
        if asked.stream:
            return streamed(jobs, wanted, request, write=writer.chunks, end=writer.end)
        answers = [await ask(jobs, each, request) for each in wanted]
        return JSONResponse(writer.reply(answers))

    tabbies.add_routes(routes)
    return routes


@dataclass
class _Writer:
    """Writes answers in OpenAI's words."""

    asked: CompletionRequest
    model: str
    created: int
    reply_id: str = ""

    def reply(self, answers: Sequence[Answered]) -> dict[str, Any]:
        """The reply to all prompts."""
        choices = [
            self._choice(number, rank, choice)
            for number, answer in enumerate(answers)
            for rank, choice in enumerate(answer.choices)
        ]
        told = {"usage": usage_of(answers), "infilld": answers[0].extension}
        return self._head(answers[0]) | {"choices": choices} | told

    def chunks(self, number: int, answer: Answered) -> Iterator[bytes]:
        """Frames of one prompt's answer: each text, and then why it ends."""
        for rank, choice in enumerate(answer.choices):
            whole = self._choice(number, rank, choice)
            finish = whole["finish_reason"]
            if whole["text"]:
                yield self._frame(answer, [whole | {"finish_reason": None}])
            nothing = {"text": "", "logprobs": None, "finish_reason": finish}
            yield self._frame(answer, [whole | nothing], infilld=answer.extension)

    def end(self, answers: list[Answered]) -> Iterator[bytes]:
        """What closes the stream."""
        if self._tells_usage:
            yield sse.unnamed(self._head(answers[0]) | {"choices": [], "usage": usage_of(answers)})
        yield sse.DONE

    @property
    def _tells_usage(self) -> bool:
        options = self.asked.stream_options
        return options is not None and bool(options.include_usage)

    def _frame(self, answer: Answered, choices: list[dict[str, Any]], **more: Any) -> bytes:
        nothing_yet = {"usage": None} if self._tells_usage else {}
        return sse.unnamed(self._head(answer) | {"choices": choices} | nothing_yet | more)

    def _head(self, first: Answered) -> dict[str, Any]:
        # All prompts have one reply, which is called after the first.
        self.reply_id = self.reply_id or f"cmpl-{first.result.id}"
        return {
            "id": self.reply_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def _choice(self, number: int, rank: int, choice: Shaped) -> dict[str, Any]:
        asked = self.asked
        echoed = asked.prompt[number] if asked.echo else ""
        logprobs = None
        if asked.logprobs is not None:
            logprobs = logprobs_of(choice, start=len(echoed))
        return {
            "index": number * (asked.n or 1) + rank,
            "text": echoed + choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.finish,
        }


def logprobs_of(choice: Shaped, *, start: int) -> dict[str, Any] | None:
    """Log-probabilities of a text that begins at `start`; None where it is not whole tokens."""
    if choice.scored is None:
        return None
    offsets, at = [], start
    for token in choice.scored:
        offsets.append(at)
        at += len(token.text)
    return {
        "tokens": [token.text for token in choice.scored],
        "token_logprobs": [token.log_probability for token in choice.scored],
        "top_logprobs": None,
        "text_offset": offsets,
    }


def usage_of(answers: Sequence[Answered]) -> dict[str, Any]:
    """Tokens read and written, in OpenAI's words."""
    read = sum(answer.result.usage.prompt_tokens for answer in answers)
    written = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {
            "cached_tokens": sum(answer.result.usage.cached_tokens for answer in answers)
        },
    }
