"""An infill by questions, one for each target, asked side by side."""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from infilld.engine.choices import GapResult, with_choices
from infilld.engine.errors import UnknownOption, Unsupported
from infilld.engine.languages import language_of
from infilld.engine.lines import unix
from infilld.engine.passages import Target, composed, passage_of, targets_of
from infilld.engine.request import (
    CanvasUpdate,
    DraftSpan,
    InfillRequest,
    InfillResult,
    Timings,
    Usage,
)
from infilld.engine.scheduler import OnCanvas
from infilld.server.remote.asking import Remote
from infilld.server.remote.faults import Refused
from infilld.server.remote.judging import CHARS_PER_TOKEN, judged
from infilld.server.remote.questions import Place, draft_in, question, repair_instruction
from infilld.server.remote.service import Replied

# What a gap is given where nobody says; thoughts come on top, and what stands around the gap.
_GAP_TOKENS, _THOUGHT_TOKENS, _FRAME_TOKENS = 512, 2048, 64
# Kept back from a deadline for the filters, and for the way back.
_MARGIN_S = 0.02
_UPDATE_S = 0.05


class Infilling:
    """One infill on its way.

    Args:
        remote: is asked. request: what is asked. job_id: of the result.
        deadline_at: `time.monotonic()` reading; None: there is none.
        on_canvas: gets drafts; None: nobody watches.
    """

    def __init__(
        self,
        remote: Remote,
        request: InfillRequest,
        job_id: str,
        deadline_at: float | None,
        on_canvas: OnCanvas | None,
    ) -> None:
        self._remote, self._request, self._on_canvas = remote, request, on_canvas
        self._until = None if deadline_at is None else deadline_at - _MARGIN_S
        self._language = language_of(request.path, request.language)
        self._result = InfillResult(
            id=job_id, seed=secrets.randbits(63) if request.seed is None else request.seed
        )
        self._usage = Usage()
        self._updates, self._updated_at = 0, 0.0
        self._drafts: dict[Target, str | None] = {}

    async def answer(self) -> InfillResult:
        """The result.

        Raises:
            RequestError: it cannot be served. Unreachable, KeyRefused: nobody answered.
        """
        began = time.monotonic()
        request = self._request
        if "\0" in request.text:
            why = "The text looks binary: it holds NUL characters."
            return replace(self._result, reason="filtered", why=why)
        targets = self._targets()
        self._drafts = dict.fromkeys(targets)
        results = await self._together(targets)
        spent_ms = 1e3 * (time.monotonic() - began)
        return replace(
            with_choices(request, self._result, targets, results),
            usage=self._usage,
            timings=Timings(denoise_ms=spent_ms, total_ms=spent_ms),
        )

    def _targets(self) -> list[Target]:
        request = self._request
        targets = targets_of(request)
        if request.warm:
            return targets[:1]
        if request.repair is None:
            return targets
        if request.pins or request.drafts:
            raise UnknownOption(
                "a repair with pins or drafts", remedy="Send the repair without them."
            )
        if not request.repair:
            raise Unsupported(
                "a remote engine does not say what it finds unlikely in a text",
                remedy="Name the suspected text in `repair`, or rewrite with an instruction.",
            )
        return [part for target in targets for part in _suspects(target, request)]

    async def _together(self, targets: Sequence[Target]) -> list[GapResult]:
        """Results of all targets; of those that are late, that they are."""
        tasks = [asyncio.ensure_future(self._filled(target)) for target in targets]
        try:
            left_s = None if self._until is None else max(0.0, self._until - time.monotonic())
            done, _ = await asyncio.wait(tasks, timeout=left_s, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
            return [task.result() if task in done else _late() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            # Their connections are closed before anybody is told.
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _filled(self, target: Target) -> GapResult:
        """Ask about one target."""
        request = self._request
        passage = passage_of(request.text, [target])
        instruction = request.instruction
        if target.is_suspect:
            instruction = repair_instruction()
        place = Place(
            before=passage.before,
            after=passage.after,
            selection=target.selection,
            instruction=instruction,
            draft=target.draft,
            context=request.context,
            path=request.path,
            language=self._language,
            has_shape=request.grammar is not None,
        )
        replied = await self._replied(target, place)
        if request.warm:
            why = "Only the prompt was encoded, as asked."
            return GapResult(choices=(), reason="empty", why=why, texts=())
        answers = [replied.answers[number] for number in sorted(replied.answers)]
        # Parsing a document takes a while, and others are being read here.
        return await asyncio.to_thread(
            judged, place, answers, request, language=self._language, until=self._until
        )

    async def _replied(self, target: Target, place: Place) -> Replied:
        request = self._request
        tokens = self._answer_tokens(place)
        while True:
            text = question(place, self._remote.prompt_chars(tokens))
            try:
                replied = await self._remote.ask(
                    [{"role": "user", "content": text}],
                    alternatives=1 if request.warm else request.alternatives,
                    max_tokens=1 if request.warm else tokens,
                    think=request.think,
                    seed=request.seed,
                    is_greedy=request.alternatives == 1,
                    grammar=None if request.warm else request.grammar,
                    with_scores=True,
                    has_deadline=self._until is not None,
                    on_text=lambda so_far: self._show(target, place, so_far),
                )
            except Refused as refused:
                is_too_long = refused.is_too_long and self._remote.shorten()
                if not is_too_long:
                    raise self._remote.error_of(refused, request.grammar) from None
                continue
            self._count(replied)
            return replied

    def _answer_tokens(self, place: Place) -> int:
        wanted = self._request.max_tokens or _GAP_TOKENS
        if place.instruction is not None:
            # A rewrite may be longer than what it replaces.
            wanted = max(wanted, 2 * len(place.selection) // CHARS_PER_TOKEN)
        around = len(place.lead + place.tail) // 2 + _FRAME_TOKENS
        thoughts = _THOUGHT_TOKENS if self._request.think else 0
        return self._remote.answer_tokens(wanted + around + thoughts)

    def _count(self, replied: Replied) -> None:
        used = self._usage
        answers = max(1, len(replied.answers))
        self._usage = Usage(
            prompt_tokens=used.prompt_tokens + replied.prompt_tokens,
            cached_tokens=used.cached_tokens + replied.cached_tokens,
            canvas_tokens=used.canvas_tokens + replied.text_tokens,
            text_tokens=used.text_tokens + replied.text_tokens // answers,
        )

    def _show(self, target: Target, place: Place, so_far: Replied) -> None:
        """Tell who watches what is written of the first answer; not more often than one can see."""
        now = time.monotonic()
        if self._on_canvas is None or now - self._updated_at < _UPDATE_S:
            return
        answer = so_far.answers.get(0)
        draft = None if answer is None else draft_in(answer.text, place)
        if not draft or draft == self._drafts[target]:
            return
        self._drafts[target], self._updated_at = draft, now
        spans = []
        for number in range(len(self._request.spans)):
            pieces = [
                (each, self._drafts[each])
                for each in sorted(self._drafts, key=lambda each: each.span.start)
                if each.number == number
            ]
            spans.append(DraftSpan(composed(self._request, number, pieces), 0))
        update = CanvasUpdate(
            seq=self._updates, canvas=0, passes=self._updates + 1, spans=tuple(spans)
        )
        self._updates += 1
        self._on_canvas(update)


def _late() -> GapResult:
    why = "The deadline struck before the remote engine had answered."
    return GapResult(choices=(), reason="deadline", why=why, texts=())


def _suspects(target: Target, request: InfillRequest) -> list[Target]:
    """What is suspected in a target, those that touch as one."""
    merged: list[list[int]] = []
    for each in sorted(request.repair or (), key=lambda each: each.start):
        if not target.span.start <= each.start <= each.end <= target.span.end:
            continue
        if merged and each.start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], each.end)
        else:
            merged.append([each.start, each.end])
    return [
        Target(
            number=target.number,
            span=replace(target.span, start=start, end=end),
            selection=unix(request.text[start:end]),
            is_suspect=True,
        )
        for start, end in merged
    ]
