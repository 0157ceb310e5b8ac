"""Requests and answers of the wire as records of the engine, and back."""

from infilld.engine.request import CanvasUpdate, Context, InfillRequest, InfillResult, Pin, Span
from infilld.server import wire


def to_engine(asked: wire.InfillRequest) -> InfillRequest:
    """The engine's record of a request.

    Raises:
        RequestError: a span, a pin, a bound or a text no model could serve.
    """
    return InfillRequest(
        text=asked.text,
        spans=tuple(Span(span.start, span.end) for span in asked.spans),
        document=asked.document,
        path=asked.path,
        language=asked.language,
        instruction=asked.instruction,
        context=tuple(Context(item.path, item.text, item.kind) for item in asked.context or ()),
        pins=tuple(Pin(pin.span, pin.at, pin.text) for pin in asked.pins or ()),
        drafts=tuple(asked.draft or ()),
        repair=None
        if asked.repair is None
        else tuple(Span(each.start, each.end) for each in asked.repair),
        alternatives=asked.n,
        min_tokens=asked.min_tokens,
        max_tokens=asked.max_tokens,
        boldness=asked.boldness,
        deadline_ms=asked.deadline_ms,
        seed=asked.seed,
        think=asked.think,
        warm=asked.warm,
        background=asked.background,
        shows_tokens=asked.show_tokens,
    )


def to_reply(result: InfillResult, model: str) -> wire.InfillReply:
    """The reply of a result."""
    used, spent = result.usage, result.timings
    return wire.InfillReply(
        id=result.id,
        model=model,
        seed=result.seed,
        choices=[
            wire.Choice(
                spans=[
                    wire.SpanText(
                        start=span.start, end=span.end, text=span.text, confidence=span.confidence
                    )
                    for span in choice.spans
                ],
                score=choice.score,
            )
            for choice in result.alternatives
        ],
        reason=result.reason,
        why=result.why,
        usage=wire.Usage(
            prompt_tokens=used.prompt_tokens,
            cached_tokens=used.cached_tokens,
            canvas_tokens=used.canvas_tokens,
            passes=used.passes,
            text_tokens=used.text_tokens,
        ),
        timings=wire.Timings(
            queue_ms=spent.queue_ms,
            encode_ms=spent.encode_ms,
            denoise_ms=spent.denoise_ms,
            total_ms=spent.total_ms,
        ),
    )


def to_event(job_id: str, update: CanvasUpdate) -> wire.CanvasEvent:
    """The event of a canvas."""
    return wire.CanvasEvent(
        id=job_id,
        seq=update.seq,
        canvas=update.canvas,
        passes=update.passes,
        spans=[wire.DraftSpan(text=span.text, settled=span.settled) for span in update.spans],
        revised=update.revised,
        tokens=[
            wire.CanvasToken(
                text=token.text,
                entropy=token.entropy_nats,
                state=token.state,
                span=token.span,
                filler=token.is_filler,
            )
            for token in update.tokens
        ],
    )
