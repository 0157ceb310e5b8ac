"""One request to the remote engine: its body, what it can do without, what its refusals mean."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from infilld.engine.errors import (
    BadGrammar,
    Busy,
    ContextTooLong,
    InfilldError,
    RequestError,
    Unsupported,
)
from infilld.engine.request import Grammar
from infilld.server.remote.faults import Refused
from infilld.server.remote.health import Health
from infilld.server.remote.judging import CHARS_PER_TOKEN
from infilld.server.remote.service import Replied, Service

MAX_LIVE = 8
# A request without a deadline is given up where nothing comes for so long.
SILENCE_S = 120.0
# Longer prompts say little more about a gap, and cost every first request.
_MOST_PROMPT_CHARS = 32_768
_LEAST_PROMPT_CHARS = 2_048

OnText = Callable[[Replied], None]


class Remote:
    """The service with the model that is asked; used on one event loop.

    Args:
        service: answers. health: knows its model.

    Attributes:
        url: of it, for people.
    """

    def __init__(self, service: Service, health: Health, url: str) -> None:
        self.url = url
        self._service, self._health = service, health
        self._places = asyncio.Semaphore(MAX_LIVE)
        self._most_chars = _MOST_PROMPT_CHARS

    def answer_tokens(self, wanted: int) -> int:
        """So many tokens of an answer, or as many as a small context has room for."""
        context = self._context_tokens
        return min(wanted, context // 2) if context else wanted

    def prompt_chars(self, answer_tokens: int) -> int:
        """Characters of a prompt that leaves room for an answer of so many tokens."""
        context, most = self._context_tokens, self._most_chars
        return min(most, (context - answer_tokens) * CHARS_PER_TOKEN) if context else most

    @property
    def _context_tokens(self) -> int:
        """What a prompt and its answer may take together; 0: it is not known."""
        return 0 if self._health.model is None else self._health.model.context_tokens

    def shorten(self) -> bool:
        """Ask with half the prompt from now on; False: it is short already."""
        if self._most_chars <= _LEAST_PROMPT_CHARS:
            return False
        self._most_chars //= 2
        return True

    async def ask(
        self,
        messages: list[dict[str, str]],
        *,
        alternatives: int,
        max_tokens: int | None,
        think: bool,
        seed: int | None,
        is_greedy: bool,
        grammar: Grammar | None = None,
        stop: tuple[str, ...] = (),
        with_scores: bool = False,
        has_deadline: bool = False,
        on_text: OnText | None = None,
    ) -> Replied:
        """Ask once; waits while others are being answered.

        With a deadline the caller gives up; else this does after a long silence.

        Raises:
            Refused: as it is. Unreachable, KeyRefused: nobody answered.
        """
        assert self._health.model is not None, "what is up has a model"
        body: dict[str, Any] = {
            "model": self._health.model.name,
            "messages": messages,
            "chat_template_kwargs": {"enable_thinking": think},
        }
        if alternatives > 1:
            body["n"] = alternatives
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if is_greedy:
            body["temperature"] = 0
        if seed is not None:
            body["seed"] = seed
        if stop:
            body["stop"] = list(stop)
        if with_scores:
            body["logprobs"] = True
        if grammar is not None:
            body |= _shape(grammar)
        async with self._places:
            return await self._service.chat(body, on_text, _patience_s(has_deadline))

    async def forward(
        self,
        body: dict[str, Any],
        on_canvas: Callable[[dict[str, Any]], None],
        *,
        has_deadline: bool,
    ) -> dict[str, Any]:
        """Hand an infill on to another infilld; see `ask` and `Service.infill`."""
        async with self._places:
            return await self._service.infill(body, on_canvas, _patience_s(has_deadline))

    @property
    def is_infilld(self) -> bool:
        """Whether it takes an infill as it is."""
        return self._health.model is not None and self._health.model.is_infilld

    def error_of(self, refused: Refused, grammar: Grammar | None) -> InfilldError:
        """What a refusal means for whoever asked."""
        where = f"the remote engine at {self.url}"
        if refused.status == 429:
            return Busy(f"{where} has too many requests")
        if refused.is_too_long or refused.status == 413:
            return ContextTooLong(f"the prompt is too long for {where}; {refused.said}")
        if refused.status == 404:
            return Unsupported(
                f"{where} does not have this model or this route; {refused.said}",
                remedy="Set `engine_model`, and serve chat completions there.",
            )
        if grammar is not None:
            return BadGrammar(
                f"{where} cannot hold to this grammar; {refused.said}",
                remedy="Leave the grammar out, or use a model that can: vLLM serves none for "
                "DiffusionGemma.",
            )
        return RequestError(f"{where} refuses the request ({refused.status}); {refused.said}")


def _patience_s(has_deadline: bool) -> float | None:
    return None if has_deadline else SILENCE_S


def _shape(grammar: Grammar) -> dict[str, Any]:
    """A grammar in the keys of OpenAI, and of vLLM where those have none.

    Raises:
        BadGrammar: a schema that is not JSON.
    """
    if grammar.kind == "json":
        return {"response_format": {"type": "json_object"}}
    if grammar.kind == "json_schema":
        try:
            schema = json.loads(grammar.text)
        except ValueError as error:
            raise BadGrammar(f"the schema is not JSON: {error}") from None
        named = {"name": "answer", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": named}}
    key = "regex" if grammar.kind == "regex" else "grammar"
    return {"structured_outputs": {key: grammar.text}}
