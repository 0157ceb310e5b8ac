"""Found drafts: what stood behind text like this, elsewhere in the same document, or in another.

Code repeats itself. Where the end of the prefix occurs again, what follows there is a good guess at
what is missing here, often right but for its names. A canvas that starts from it instead of noise
has less to do.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from infilld.engine.canvas import GapKind
from infilld.engine.lines import unix

# A place is compared when this many characters before it are equal; fewer only when none is found.
_KEYS_CHARS = (24, 8, 3, 2)
# How far equality is measured; more would tell no more.
_MOST_BEFORE_CHARS = 120
_MOST_BEHIND_CHARS = 60
# One equal character behind is worth this many before.
_BEHIND_WEIGHT = 0.3
# Of two equal places the nearer one is better, by less than a character.
_NEAR_WEIGHT = 0.5
# Text searched on either side of the span, and places compared for one key.
_SEARCHED_CHARS = 60_000
_MOST_PLACES = 400
_MOST_LINES = 8
# Text behind a gap in a line by which its end is found at another place, the longest first.
_JOINS_CHARS = (12, 4, 1)


@dataclass(frozen=True)
class Found:
    """Text found for a gap; `evidence` counts equal characters around it, here and there."""

    text: str
    evidence: float


def found_drafts(
    prefix: str, suffix: str, kind: GapKind, *, most: int = 3, elsewhere: Sequence[str] = ()
) -> list[Found]:
    """Different texts that may fill the gap between prefix and suffix, best first.

    Args:
        prefix, suffix: of the document, with LF line ends. kind: of the gap. most: how many.
        elsewhere: other texts that are searched.
    """
    others = [unix(text[:_SEARCHED_CHARS]) for text in elsewhere]
    near = prefix[-_SEARCHED_CHARS:]
    best: dict[str, float] = {}
    for key_chars in _KEYS_CHARS:
        key = near[-key_chars:]
        if len(key) < key_chars:
            continue
        for text, evidence in _places(key, near, suffix, kind, others):
            best[text] = max(best.get(text, 0.0), evidence)
        if len(best) >= most:
            break
    chosen = heapq.nlargest(most, best.items(), key=lambda item: item[1])
    return [Found(text, evidence) for text, evidence in chosen]


def _places(
    key: str, near: str, suffix: str, kind: GapKind, others: Sequence[str]
) -> Iterator[tuple[str, float]]:
    """Text behind every place that `key` stands at, with its evidence."""
    own = ((near, True), (suffix[:_SEARCHED_CHARS], False))
    for document, is_before in (*own, *((text, False) for text in others)):
        # The last occurrence before the gap is the gap itself.
        end = len(document) - 1 if is_before else len(document)
        for _ in range(_MOST_PLACES):
            # From the gap outwards on the one side, from its end inwards on the other.
            at = document.rfind(key, 0, end)
            if at < 0:
                break
            end = at + len(key) - 1
            start = at + len(key)
            stop = _end_of(document, start, suffix, kind)
            if stop <= start:
                continue
            before = _equal_before(near, document, start)
            behind = _equal_behind(suffix, document, stop)
            nearness = start / len(document) if is_before else 0.5
            evidence = before + _BEHIND_WEIGHT * behind + _NEAR_WEIGHT * nearness
            yield document[start:stop].rstrip(), evidence


def _end_of(document: str, start: int, suffix: str, kind: GapKind) -> int:
    """Where the text that starts there ends, if it were in the gap; `start` where it cannot be."""
    line_end = document.find("\n", start)
    line_end = len(document) if line_end < 0 else line_end
    if kind == "in_line":
        following = suffix.partition("\n")[0]
        for join_chars in _JOINS_CHARS:
            stop = document.find(following[:join_chars], start, line_end)
            if stop >= 0:
                return stop
        return start
    if kind == "block":
        # As many lines as stand there before the line that follows here.
        following = suffix.lstrip().partition("\n")[0]
        stop = line_end
        for _ in range(_MOST_LINES if following else 0):
            next_end = document.find("\n", stop + 1)
            next_end = len(document) if next_end < 0 else next_end
            if document[stop + 1 : next_end].strip() == following:
                return stop
            if next_end == len(document):
                break
            stop = next_end
    return line_end


def _equal_before(here: str, there: str, end: int) -> int:
    """Characters before `end` there that equal the last ones here."""
    most = min(len(here), end, _MOST_BEFORE_CHARS)
    count = 0
    while count < most and here[-1 - count] == there[end - 1 - count]:
        count += 1
    return count


def _equal_behind(here: str, there: str, start: int) -> int:
    """Characters from `start` there that equal the first ones here."""
    most = min(len(here), len(there) - start, _MOST_BEHIND_CHARS)
    count = 0
    while count < most and here[count] == there[start + count]:
        count += 1
    return count
