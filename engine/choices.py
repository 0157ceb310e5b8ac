"""What came out for each target, and the answer that is put together from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from infilld.engine.passages import Target, composed
from infilld.engine.request import Alternative, InfillRequest, InfillResult, Reason, SpanFill


@dataclass(frozen=True)
class Choice:
    """A text for a target, with LF line ends: how likely it is right, and its score, nats."""

    text: str
    confidence: float
    score: float


@dataclass(frozen=True, kw_only=True)
class GapResult:
    """What came out for one target.

    Attributes:
        choices: the best first; none: `reason` and `why` say why.
        texts: every text that was judged, the best first.
    """

    choices: tuple[Choice, ...]
    reason: Reason
    why: str
    texts: tuple[str, ...]


def with_choices(
    request: InfillRequest,
    result: InfillResult,
    targets: Sequence[Target],
    results: Sequence[GapResult],
) -> InfillResult:
    """The result with the choices of all targets put together."""
    silent = [each for each in results if not each.choices]
    if len(silent) == len(results):
        return replace(result, reason=silent[0].reason, why=silent[0].why)
    pairs = sorted(zip(targets, results, strict=True), key=lambda pair: pair[0].span.start)
    alternatives: dict[tuple[str, ...], Alternative] = {}
    for rank in range(max(len(each.choices) for each in results)):
        spans: list[SpanFill] = []
        scores: list[float] = []
        for number, span in enumerate(request.spans):
            pieces: list[tuple[Target, str | None]] = []
            confidences: list[float] = []
            for target, each in pairs:
                if target.number == number:
                    choice = _ranked(each, rank)
                    is_pinned = bool(target.start or target.end)
                    stays = target.selection if is_pinned else None
                    pieces.append((target, stays if choice is None else choice.text))
                    if choice is not None:
                        confidences.append(choice.confidence)
                        scores.append(choice.score)
            text = composed(request, number, pieces)
            # A span of several pieces is as likely as the worst of them; one that stays is none.
            spans.append(SpanFill(span.start, span.end, text, min(confidences, default=0.0)))
        key = tuple(span.text for span in spans)
        alternatives.setdefault(key, Alternative(tuple(spans), sum(scores) / len(scores)))
    why = ""
    if silent:
        why = f"{len(silent)} of {len(results)} places stay as they are: {silent[0].why}"
    reason: Reason = "ok"
    return replace(
        result,
        alternatives=tuple(alternatives.values())[: request.alternatives],
        reason=reason,
        why=why,
    )


def _ranked(result: GapResult, rank: int) -> Choice | None:
    """The choice of a rank, or the last one there is; None where there is none."""
    if not result.choices:
        return None
    return result.choices[min(rank, len(result.choices) - 1)]
