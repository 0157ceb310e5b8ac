"""The next turn of a conversation, from the remote engine."""

import asyncio
import secrets
import time
from dataclasses import replace

from infilld.engine.conversation import (
    ChatAnswer,
    ChatRequest,
    ChatResult,
    ChatUpdate,
    Finish,
)
from infilld.engine.request import Timings, Usage
from infilld.engine.scheduler import OnCanvas
from infilld.server.remote.asking import Remote
from infilld.server.remote.faults import Refused
from infilld.server.remote.service import Replied, Written

_MARGIN_S = 0.02


class Talking:
    """One turn on its way.

    Args:
        remote: is asked. request: what is asked. job_id: of the result.
        deadline_at: `time.monotonic()` reading; None: there is none.
        on_update: gets the text as it is written; None: nobody watches.

    Attributes:
        has_spoken: somebody was shown a text, which another attempt would contradict.
    """

    def __init__(
        self,
        remote: Remote,
        request: ChatRequest,
        job_id: str,
        deadline_at: float | None,
        on_update: OnCanvas | None,
    ) -> None:
        self.has_spoken = False
        self._remote, self._request, self._id = remote, request, job_id
        self._until = None if deadline_at is None else deadline_at - _MARGIN_S
        self._on_update = on_update
        self._updates = self._chars = 0
        self._so_far = Replied()

    async def answer(self) -> ChatResult:
        """The result; where the deadline strikes, with what is written by then.

        Raises:
            RequestError: it cannot be served. Unreachable, KeyRefused: nobody answered.
        """
        began = time.monotonic()
        left_s = None if self._until is None else max(0.0, self._until - began)
        is_late = False
        try:
            async with asyncio.timeout(left_s):
                replied = await self._replied()
        except TimeoutError:
            replied, is_late = self._so_far, True
        except Refused as refused:
            raise self._remote.error_of(refused, self._request.grammar) from None
        spent_ms = 1e3 * (time.monotonic() - began)
        answers = tuple(_answer(replied.answers[number]) for number in sorted(replied.answers))
        if is_late:
            answers = tuple(each for each in answers if each.text or each.thoughts)
        result = ChatResult(
            id=self._id,
            seed=secrets.randbits(63) if self._request.seed is None else self._request.seed,
            answers=answers,
            usage=Usage(
                prompt_tokens=replied.prompt_tokens,
                cached_tokens=replied.cached_tokens,
                canvas_tokens=replied.text_tokens,
                text_tokens=replied.text_tokens // max(1, len(answers)),
            ),
            timings=Timings(denoise_ms=spent_ms, total_ms=spent_ms),
        )
        if answers:
            return result
        return _silent(result, is_late=is_late)

    async def _replied(self) -> Replied:
        request = self._request
        return await self._remote.ask(
            [{"role": each.role, "content": each.content} for each in request.messages],
            alternatives=request.alternatives,
            max_tokens=request.max_tokens,
            think=request.think,
            seed=request.seed,
            is_greedy=request.greedy,
            grammar=request.grammar,
            stop=request.stop,
            has_deadline=self._until is not None,
            on_text=self._heard,
        )

    def _heard(self, so_far: Replied) -> None:
        self._so_far = so_far
        answer = so_far.answers.get(0)
        if self._on_update is None or answer is None:
            return
        chars = len(answer.text) + len(answer.thoughts)
        if chars == self._chars:
            return
        self._chars, self.has_spoken = chars, True
        update = ChatUpdate(
            seq=self._updates,
            canvas=self._updates,
            passes=self._updates + 1,
            text=answer.text,
            thoughts=answer.thoughts,
            draft="",
        )
        self._updates += 1
        self._on_update(update)


def _answer(written: Written) -> ChatAnswer:
    finish: Finish = "length" if written.finish == "length" else "stop"
    return ChatAnswer(written.text, written.thoughts, finish if written.finish else "deadline")


def _silent(result: ChatResult, *, is_late: bool) -> ChatResult:
    if is_late:
        why = "The deadline struck before the remote engine had written anything."
        return replace(result, reason="deadline", why=why)
    return replace(result, reason="empty", why="The remote engine gave no answer.")
