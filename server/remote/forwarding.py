"""An infill handed on to another infilld, which can do all that this one can.

Its filters and its ranking are ours, so what it answers is taken as it is; only the frame is
checked: the spans that were asked for, and the pins.
"""

import asyncio
import secrets
import time
from dataclasses import replace
from typing import Any, get_args

from pydantic import ValidationError

from infilld.engine import errors
from infilld.engine.errors import InfilldError, RequestError
from infilld.engine.request import (
    Alternative,
    CanvasToken,
    CanvasUpdate,
    DraftSpan,
    InfillRequest,
    InfillResult,
    Reason,
    SpanFill,
    Timings,
    Usage,
)
from infilld.engine.scheduler import OnCanvas
from infilld.server import wire
from infilld.server.remote.asking import Remote
from infilld.server.remote.faults import Refused, Unreachable

# Kept back from a deadline for the way there and back.
_MARGIN_S = 0.02
_KINDS: dict[str, type[RequestError]] = {
    kind.code: kind
    for kind in (
        errors.BadText,
        errors.ContextTooLong,
        errors.GapTooLong,
        errors.SpanOutOfRange,
        errors.SpansOverlap,
        errors.UnknownOption,
        errors.Unsupported,
    )
}
# Documents of other people have the same names: theirs and ours must not supersede each other.
_OWN = secrets.token_hex(8)


class Forwarding:
    """One infill on its way; arguments as of `Infilling`."""

    def __init__(
        self,
        remote: Remote,
        request: InfillRequest,
        job_id: str,
        deadline_at: float | None,
        on_canvas: OnCanvas | None,
    ) -> None:
        self._remote, self._request, self._id = remote, request, job_id
        self._deadline_at, self._on_canvas = deadline_at, on_canvas

    async def answer(self) -> InfillResult:
        """The result.

        Raises:
            RequestError: it cannot be served. Unreachable, KeyRefused: nobody answered.
        """
        began = time.monotonic()
        left_s = None if self._deadline_at is None else self._deadline_at - began
        try:
            async with asyncio.timeout(left_s):
                told = await self._remote.forward(
                    _asked(self._request, left_s), self._show, has_deadline=left_s is not None
                )
            result = self._result(wire.InfillReply.model_validate(told))
        except TimeoutError:
            why = "The deadline struck before the remote engine had answered."
            result = InfillResult(
                id=self._id, seed=self._request.seed or 0, reason="deadline", why=why
            )
        except ValidationError:
            raise _foreign() from None
        except Refused as refused:
            raise self._error_of(refused) from None
        spent_ms = 1e3 * (time.monotonic() - began)
        return replace(result, timings=replace(result.timings, total_ms=spent_ms))

    def _error_of(self, refused: Refused) -> InfilldError:
        kind = _KINDS.get(refused.code)
        if kind is None:
            return self._remote.error_of(refused, None)
        return kind(f"the remote engine at {self._remote.url} refuses; {refused.said}")

    def _show(self, told: dict[str, Any]) -> None:
        if self._on_canvas is None:
            return
        try:
            event = wire.CanvasEvent.model_validate(told)
        except ValidationError:
            raise _foreign() from None
        update = CanvasUpdate(
            seq=event.seq,
            canvas=event.canvas,
            passes=event.passes,
            spans=tuple(DraftSpan(span.text, span.settled) for span in event.spans),
            revised=event.revised,
            tokens=tuple(
                CanvasToken(each.text, each.entropy, each.state, each.span, each.filler)
                for each in event.tokens
            ),
        )
        self._on_canvas(update)

    def _result(self, reply: wire.InfillReply) -> InfillResult:
        spans = [(span.start, span.end) for span in self._request.spans]
        for choice in reply.choices:
            if [(span.start, span.end) for span in choice.spans] != spans:
                raise _foreign()
        alternatives = tuple(
            Alternative(
                tuple(
                    SpanFill(span.start, span.end, span.text, span.confidence)
                    for span in choice.spans
                ),
                choice.score,
            )
            for choice in reply.choices
            if self._holds_pins(choice)
        )
        known: dict[str, Reason] = {each: each for each in get_args(Reason)}
        reason = known.get(reply.reason, "filtered")
        if reason == "ok" and not alternatives:
            reason = "filtered"
        used, spent = reply.usage, reply.timings
        return InfillResult(
            id=self._id,
            seed=reply.seed,
            alternatives=alternatives,
            reason=reason,
            why=reply.why,
            usage=Usage(
                prompt_tokens=used.prompt_tokens,
                cached_tokens=used.cached_tokens,
                canvas_tokens=used.canvas_tokens,
                passes=used.passes,
                text_tokens=used.text_tokens,
            ),
            timings=Timings(encode_ms=spent.encode_ms, denoise_ms=spent.denoise_ms),
        )

    def _holds_pins(self, choice: wire.Choice) -> bool:
        texts = [span.text for span in choice.spans]
        return all(
            texts[pin.span].startswith(pin.text)
            if pin.at == "start"
            else texts[pin.span].endswith(pin.text)
            for pin in self._request.pins
        )


def _foreign() -> Unreachable:
    return Unreachable("it does not answer as infilld does", is_down=False, may_retry=False)


def _asked(request: InfillRequest, left_s: float | None) -> dict[str, Any]:
    """The body of `POST /v1/infill`."""
    deadline_ms = None if left_s is None else max(1, int(1e3 * (left_s - _MARGIN_S)))
    body = wire.InfillRequest(
        text=request.text,
        spans=[wire.Span(start=span.start, end=span.end) for span in request.spans],
        document=None if request.document is None else f"{_OWN} {request.document}",
        path=request.path,
        language=request.language,
        instruction=request.instruction,
        context=[
            wire.ContextItem(path=each.path, text=each.text, kind=each.kind)
            for each in request.context[: wire.MAX_CONTEXT_ITEMS]
        ]
        or None,
        pins=[wire.Pin(span=pin.span, at=pin.at, text=pin.text) for pin in request.pins] or None,
        draft=list(request.drafts) or None,
        repair=None
        if request.repair is None
        else [wire.Span(start=span.start, end=span.end) for span in request.repair],
        n=request.alternatives,
        min_tokens=request.min_tokens,
        max_tokens=request.max_tokens,
        boldness=request.boldness,
        deadline_ms=deadline_ms,
        seed=request.seed,
        stream=True,
        think=request.think,
        warm=request.warm,
        background=request.background,
        show_tokens=request.shows_tokens,
    )
    return body.model_dump(exclude_defaults=True)
