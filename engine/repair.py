"""Which parts of a text are to be written anew: what is pointed at, or what the model doubts."""

import re
from collections.abc import Sequence

from torch import Tensor

from infilld.engine.lines import unix
from infilld.engine.passages import Target
from infilld.engine.request import Span
from infilld.engine.tokenizer import Tokenizer

# A token this unlikely, in nats, is doubted; but no more than a share of them.
_DOUBTED_NATS = -4.0
_MOST_DOUBTED = 0.2
_WORD = re.compile(r"\w+|[^\w\s]+|\s+")


def pointed_at(target: Target, text: str, suspects: Sequence[Span]) -> list[Target]:
    """Targets for the suspected parts of a target, whole words each.

    Args:
        target: what may change. text: of the request. suspects: parts of it, and of others.
    """
    span = target.span
    own = [each for each in suspects if span.start <= each.start and each.end <= span.end]
    return _targets(target, text, [(each.start, each.end) for each in own], may_stay=False)


def doubted(target: Target, text: str, logs: Tensor, tokenizer: Tokenizer) -> list[Target]:
    """Targets for what the model finds unlikely in a target.

    Args:
        target: what may change. text: of the request.
        logs: log-probability [N] of each token of its selection, nats.
        tokenizer: of the tokens.
    """
    ids = tokenizer.encode(target.selection)
    most = max(1, int(_MOST_DOUBTED * len(ids)))
    worst = sorted(range(len(ids)), key=lambda place: float(logs[place]))[:most]
    unlikely = {place for place in worst if float(logs[place]) < _DOUBTED_NATS}
    ranges, done, at = [], b"", 0
    for place, token in enumerate(ids):
        done += tokenizer.decode([token])
        end = len(done.decode("utf-8", errors="ignore"))
        if place in unlikely and end > at:
            ranges.append((at, end))
        at = end
    start = target.span.start
    raw = text[start : target.span.end]
    places = [(start + _raw(raw, low), start + _raw(raw, high)) for low, high in ranges]
    return _targets(target, text, places, may_stay=True)


def _targets(
    target: Target, text: str, ranges: Sequence[tuple[int, int]], *, may_stay: bool
) -> list[Target]:
    """Ranges as targets: each as whole words, those that touch as one."""
    merged: list[list[int]] = []
    pieces = [
        (m.start(), m.end()) for m in _WORD.finditer(text, target.span.start, target.span.end)
    ]
    for start, end in sorted(ranges):
        for low, high in pieces:
            if low < end and high > start and not text[low:high].isspace():
                if merged and low <= merged[-1][1]:
                    merged[-1][1] = max(high, merged[-1][1])
                else:
                    merged.append([low, high])
    return [
        Target(
            number=target.number,
            span=Span(low, high),
            selection=unix(text[low:high]),
            is_suspect=True,
            may_stay=may_stay,
        )
        for low, high in merged
    ]


def _raw(raw: str, at: int) -> int:
    """Offset in a text with its own line ends, of an offset in it with LF line ends."""
    if "\r" not in raw:
        return at
    place = 0
    for _ in range(at):
        place += 2 if raw.startswith("\r\n", place) else 1
    return place
