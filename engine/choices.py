"""What came out for each target, and the answer that is put together from it."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, replace

from infilld.engine.lines import line_end
from infilld.engine.passages import Target, composed
from infilld.engine.request import (
    Alternative,
    InfillRequest,
    InfillResult,
    Reason,
    ScoredToken,
    SpanFill,
)


@dataclass(frozen=True)
class Choice:
    """A text for a target, with LF line ends: how likely it is right, its score, nats, its tokens.

    Of what was not scored token by token there are none.
    """

    text: str
    confidence: float
    score: float
    tokens: tuple[ScoredToken, ...] = ()


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
            own: list[tuple[Target, Choice]] = []
            confidences: list[float] = []
            for target, each in pairs:
                if target.number == number:
                    choice = _ranked(each, rank)
                    is_pinned = bool(target.start or target.end)
                    stays = target.selection if is_pinned else None
                    pieces.append((target, stays if choice is None else choice.text))
                    if choice is not None:
                        own.append((target, choice))
                        confidences.append(choice.confidence)
                        scores.append(choice.score)
            text = composed(request, number, pieces)
            # A span of several pieces is as likely as the worst of them; one that stays is none.
            likely = min(confidences, default=0.0)
            tokens = _tokens_of(request, number, text, own)
            spans.append(SpanFill(span.start, span.end, text, likely, tokens))
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


def scored_tokens(
    pieces: Sequence[bytes], logs: Sequence[float], stem: str = ""
) -> tuple[ScoredToken, ...]:
    """Tokens with the text that each of them adds: together the text that they spell.

    Args:
        pieces: bytes of each token. logs: log-probability of each, nats; more may follow.
        stem: text before the fill that the tokens write again; what spells only that is left out.

    A character of several tokens is the text of the last of them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    stands = len(stem.encode())
    found = []
    for piece, log in zip(pieces, logs, strict=False):
        own, stands = piece[stands:], max(0, stands - len(piece))
        if own or not piece:
            found.append(ScoredToken(decoder.decode(own), log))
    return tuple(found)


def text_tokens(results: Sequence[GapResult]) -> int:
    """Tokens of the best answer."""
    return sum(len(each.choices[0].tokens) for each in results if each.choices)


def _tokens_of(
    request: InfillRequest, number: int, text: str, own: Sequence[tuple[Target, Choice]]
) -> tuple[ScoredToken, ...]:
    """The tokens of a span's text, where one choice is all of it."""
    if len(own) != 1:
        return ()
    ((target, choice),) = own
    newline = line_end(request.text, target.span.start)
    tokens = tuple(replace(each, text=each.text.replace("\n", newline)) for each in choice.tokens)
    # Pins, and what is kept around a piece, were not scored.
    return tokens if "".join(each.text for each in tokens) == text else ()


def _ranked(result: GapResult, rank: int) -> Choice | None:
    """The choice of a rank, or the last one there is; None where there is none."""
    if not result.choices:
        return None
    return result.choices[min(rank, len(result.choices) - 1)]
