"""Which of the answers are shown: the filters of local fills, and what the service knows of them.

Where it tells the log-probability of its tokens, the mean over those of the new text is the score
and its exponential the confidence. Where it does not, answers stay in its order with a score and a
confidence of 0, and none is held back for being unsure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from infilld.engine.choices import Choice, GapResult
from infilld.engine.request import InfillRequest, Reason
from infilld.engine.silence.surroundings import Surroundings
from infilld.server.remote.questions import Place, code_in, fill_in
from infilld.server.remote.service import Written

CHARS_PER_TOKEN = 4
# What the shyest setting asks for, as of a local model without a calibration.
_SHY = 0.9


@dataclass(frozen=True)
class _Candidate:
    """A text that may be shown, and the mean log-probability of its tokens where it is known."""

    text: str
    mean_nats: float | None

    @property
    def confidence(self) -> float:
        return 0.0 if self.mean_nats is None else min(1.0, math.exp(self.mean_nats))


def judged(
    place: Place,
    answers: Sequence[Written],
    request: InfillRequest,
    *,
    language: str | None,
    until: float | None,
) -> GapResult:
    """The best answers, as many as are wanted, or why there are none.

    Args:
        place: what was asked. answers: in the order of the service. request: the whole of it.
        language: as `language_of` names it.
        until: reading of `time.monotonic()` after which nothing is parsed any more.
    """
    surroundings = Surroundings(
        place.before, place.after, language=language, replaced=place.selection
    )
    candidates: dict[str, _Candidate] = {}
    silences: list[tuple[Reason, str]] = []
    for answer in answers:
        found = _candidate(place, answer, request, surroundings)
        if isinstance(found, _Candidate):
            candidates.setdefault(found.text, found)
        else:
            silences.append(found)
    ranked = sorted(candidates.values(), key=lambda each: -(each.mean_nats or 0.0))
    texts = tuple(each.text for each in ranked)

    def nothing(reason: Reason, why: str) -> GapResult:
        return GapResult(choices=(), reason=reason, why=why, texts=texts)

    if not ranked:
        return nothing(*(silences or [("empty", "The remote engine gave no answer.")])[0])
    least = _least_confidence(request.boldness)
    likely = [each for each in ranked if each.mean_nats is None or each.confidence >= least]
    if not likely:
        best = ranked[0].confidence
        return nothing("low_confidence", f"The best text is right with a chance of {best:.0%}.")
    objections = [surroundings.objection(each.text, until=until) for each in likely]
    choices = tuple(
        Choice(each.text, each.confidence, each.mean_nats or 0.0)
        for each, objection in zip(likely, objections, strict=True)
        if objection is None
    )
    first = objections[0]
    if not choices and first is not None:
        return nothing(first.reason, first.why)
    return GapResult(choices=choices[: request.alternatives], reason="ok", why="", texts=texts)


def _least_confidence(boldness: float | None) -> float:
    return 0.0 if boldness is None or boldness >= 0.5 else _SHY * (1 - 2 * boldness)


def _candidate(
    place: Place, answer: Written, request: InfillRequest, surroundings: Surroundings
) -> _Candidate | tuple[Reason, str]:
    """The new text of an answer, or why it has none."""
    found = code_in(answer.text, place)
    if found is None:
        if not answer.text.strip():
            return "empty", "The model wrote no text for this span."
        return "filtered", "The model's answer holds no code block."
    fill = fill_in(found.code, place)
    is_cut = answer.finish == "length" and (not found.is_whole or place.has_shape)
    if is_cut:
        if place.selection or place.has_shape:
            return "filtered", "The model's answer was cut off at its longest."
        # What is left of the last line is no line.
        fill = fill.rpartition("\n")[0]
    raw = fill
    if not place.has_shape:
        fill = surroundings.trimmed(fill)
    most = request.max_tokens
    if most is not None:
        fill = _first_lines(fill, most, answer, is_whole=bool(place.selection))
    if not fill.strip():
        if raw.strip() and most is None:
            return "repeats_suffix", "All that was written stands behind the cursor already."
        why = "The model wrote no text for this span"
        return "empty", f"{why} within max_tokens." if raw.strip() or is_cut else f"{why}."
    tokens = _tokens_of(fill, answer)
    count = len(tokens) or _estimate(fill)
    if request.min_tokens is not None and count < request.min_tokens:
        return "empty", f"The model wrote fewer than {request.min_tokens} tokens."
    mean = sum(nats for _, nats in tokens) / len(tokens) if tokens else None
    return _Candidate(fill, mean)


def _first_lines(fill: str, most: int, answer: Written, *, is_whole: bool) -> str:
    """As many lines of a fill as have so many tokens; none or all of a text that is replaced."""
    while fill and (len(_tokens_of(fill, answer)) or _estimate(fill)) > most:
        fill = "" if is_whole else fill.rpartition("\n")[0]
    return fill


def _estimate(text: str) -> int:
    return -(-len(text) // CHARS_PER_TOKEN)


def _tokens_of(fill: str, answer: Written) -> list[tuple[str, float]]:
    """The tokens that a fill is written with; all of the answer's where it is not found in them."""
    whole = "".join(text for text, _ in answer.tokens)
    start = whole.find(fill)
    if start < 0:
        return answer.tokens
    # The last occurrence is the fill where an answer repeats what stands before it.
    start, at = whole.rfind(fill), 0
    found = []
    for text, nats in answer.tokens:
        if at + len(text) > start and at < start + len(fill):
            found.append((text, nats))
        at += len(text)
    return found
