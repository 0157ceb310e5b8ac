"""A fill that says again what stands around it: cut off where it can be, else told."""

import itertools
from collections.abc import Iterator

from infilld.engine.silence.brackets import Brackets
from infilld.engine.silence.lines import Lines, is_telling, solid

# Closing text that a fill may share with what follows, and what it is made of.
_MOST_TAIL_CHARS = 40
_CLOSING = frozenset(")]}>\"'`,;: \t")
# Text of the same line, written once more: shorter text may be meant.
_FEWEST_COPIED_CHARS = 20
_LONGEST_FILL_CHARS = 20_000
# Signs that no line ends with twice, but in a shell.
_ONCE = frozenset(";,")


class Overlap:
    """What a fill and the text around it have in common.

    Args:
        lines: around the gap. brackets: around the gap. language: as `language_of` names it.
    """

    def __init__(self, lines: Lines, brackets: Brackets, language: str | None) -> None:
        self._lines, self._brackets, self._language = lines, brackets, language

    def trimmed(self, fill: str) -> str:
        """The fill without an end that the suffix starts with; no blanks at the end of a line."""
        if len(fill) > _LONGEST_FILL_CHARS:
            return fill
        # What is left of two repetitions may end with a third.
        for _ in range(4):
            before = fill
            fill = self._without_closers(self._without_lines(fill))
            if self._lines.is_tail and self._language != "markdown":
                # Two blanks at the end of a line of Markdown break it.
                fill = fill.rstrip(" \t")
            if fill == before:
                break
        return fill

    def repeated_suffix(self, fill: str) -> str | None:
        """What of the suffix a fill says again, in a sentence; None: nothing."""
        if fill.strip() and not self.trimmed(fill).strip():
            return "The text stands behind the gap already."
        if len(fill) > _LONGEST_FILL_CHARS:
            return None
        lines = self._lines
        written = solid((lines.left + fill).split("\n"))
        below = lines.below
        if lines.is_tail and "\n" not in fill and written and below[:1] == written:
            is_table = below[:1] == below[1:2] or lines.above[-1:] == below[:1]
            if is_telling(written[0]) and not is_table:
                return "The line would say what the next one says."
        if len(below) > 1 and all(map(is_telling, below[:2])):
            pairs = itertools.pairwise(written)
            if below[0] != below[1] and any(pair == below[:2] for pair in pairs):
                return "The text writes the lines behind the gap again."
        for tail in self._tails(fill, lines.right, most=len(lines.right)):
            if len(tail) >= _FEWEST_COPIED_CHARS and is_telling(tail):
                return "The text ends with what follows in the line."
        return None

    def repeated_prefix(self, fill: str) -> str | None:
        """What of the prefix a fill only says again, in a sentence; None: nothing."""
        lines = self._lines
        if len(fill) > _LONGEST_FILL_CHARS:
            return None
        start = lines.left.strip()
        if len(start) >= _FEWEST_CHARS_BEFORE and is_telling(start) and fill.startswith(start):
            return "The text starts its line again."
        if not lines.is_tail:
            return None
        written = solid((lines.left + fill).split("\n"))
        count = len(written)
        if not fill.strip() or not count or not any(map(is_telling, written)):
            return None
        if lines.above[-count:] != written:
            return None
        # Where the lines above repeat each other, one more is in order.
        if lines.above[-2 * count : -count] == written or lines.below[:count] == written:
            return None
        return "The text only says again what stands above the gap."

    def _without_lines(self, fill: str) -> str:
        """The fill without whole lines at its end that follow it in the document."""
        lines = self._lines
        if not lines.below:
            return fill
        starts = list(_line_starts(fill))
        is_whole = not lines.left.strip()
        # The longest run of lines first: a part of it may repeat itself.
        for start in starts:
            head = fill[:start]
            if not lines.is_tail:
                # The rest of the gap's line has to be written again too.
                joint = head[:-1].rstrip(" \t")
                if start == 0 or not joint.endswith(lines.right.rstrip()):
                    continue
                kept = joint[: len(joint) - len(lines.right.rstrip())]
            elif start == 0 and not is_whole:
                continue
            else:
                kept = head.rstrip() if head.strip() else ""
            run = (lines.left if start == 0 else "") + fill[start:]
            again = solid(run.split("\n"))
            count = len(again)
            if not count or again != lines.below[:count]:
                continue
            above = solid((lines.left + head).split("\n")) or lines.above
            if self._may_go(fill, kept, again, above):
                return kept
        return fill

    def _may_go(self, fill: str, kept: str, again: tuple[str, ...], above: tuple[str, ...]) -> bool:
        """Whether lines written twice are a fault, and not a table or the end of two blocks."""
        count = len(again)
        with_them, without = self._brackets.faults(fill), self._brackets.faults(kept)
        if with_them is not None and without is not None and without.total != with_them.total:
            return without.total < with_them.total
        is_table = above[-count:] == again or self._lines.below[count : 2 * count] == again
        telling = [line for line in again if is_telling(line)]
        return bool(telling) and len(set(telling)) == len(telling) and not is_table

    def _without_closers(self, fill: str) -> str:
        """The fill without closing text that follows it, where brackets are better off without."""
        lines = self._lines
        following = lines.right.lstrip()
        is_here = bool(following)
        if not is_here:
            following = lines.below[0].lstrip() if lines.below else ""
        elif lines.right[:1].isspace():
            following = lines.right
        best, fewest = fill, None
        for tail in self._tails(fill, following, most=_MOST_TAIL_CHARS):
            if not (is_here or _CLOSING.issuperset(tail)):
                continue
            if fewest is None:
                found = self._brackets.faults(fill)
                if found is None or not found.total:
                    break
                fewest = found.total
            kept = fill[: len(fill) - len(tail)]
            found = self._brackets.faults(kept)
            if found is not None and found.total < fewest:
                best, fewest = kept, found.total
        if is_here and following.strip() in _ONCE and self._language not in (None, "bash"):
            best = best.removesuffix(following.strip())
        return best

    @staticmethod
    def _tails(fill: str, following: str, *, most: int) -> Iterator[str]:
        """Every end of the fill that the following text starts with, shortest first."""
        for count in range(1, min(len(fill), len(following), most) + 1):
            if fill.endswith(following[:count]):
                yield following[:count]


# What stands before a gap in its line, to be noticed when it is written again.
_FEWEST_CHARS_BEFORE = 12


def _line_starts(text: str) -> Iterator[int]:
    yield 0
    at = text.find("\n")
    while at >= 0:
        yield at + 1
        at = text.find("\n", at + 1)
