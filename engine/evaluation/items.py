"""Gaps with known answers, cut out of files. Nothing is picked by hand: a seed is."""

import functools
import io
import os
import random
import tokenize
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infilld.engine.errors import RequestError
from infilld.engine.request import Context
from infilld.engine.training.corpus import SourceFile

_LONGEST_SPAN_CHARS = 40
# Open files of the same package, and how much of each.
_CONTEXT_FILES, _CONTEXT_CHARS = 3, 20_000
_FEWEST_LINES, _MOST_LINES = 2, 4
# Directly before one of these an operand to the left is complete.
_COMPLETED_BY = frozenset(")]}:,")
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_OPERANDS = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING)
# Random places looked at for one item: a file of nothing but blank lines must end the search.
_TRIES = 1000


@dataclass(frozen=True)
class Check:
    """Tests of an item: Python that defines `check(function)`, and the function's name."""

    test: str
    entry_point: str


@dataclass(frozen=True)
class Item:
    """A gap and what stood in it.

    Attributes:
        kind: of the gap, see `KINDS`.
        before, missing, after: the document in three parts; `missing` is the gap's true text,
            and empty where nothing ought to be shown.
        source: path of the file, or name of the task.
        check: tests to run; None: there are none. context: from other files.
    """

    kind: str
    before: str
    missing: str
    after: str
    source: str
    check: Check | None = None
    context: tuple[Context, ...] = ()

    def filled(self, text: str) -> str:
        """The document with a text in the gap."""
        return self.before + text + self.after


# Where a gap around a place of a text starts and ends; None where there is none.
_Cut = Callable[[str, int, random.Random], tuple[int, int] | None]


def cut_items(files: Sequence[SourceFile], kind: str, count: int, seed: int) -> list[Item]:
    """Random gaps of a kind; every character of the files is as likely to be met.

    Args:
        files: held out. kind: of `CUT_KINDS`. count: items wanted.
        seed: chooses them, and nothing else does.

    Raises:
        RequestError: the files hold too few such gaps.
    """
    # The first kind was measured before there were others: it keeps its draws.
    rng = random.Random(seed) if kind == "rest_of_line" else random.Random(f"{kind} {seed}")
    sizes = [len(file.text) for file in files]
    items: list[Item] = []
    for _ in range(_TRIES * count):
        if len(items) == count:
            break
        file = rng.choices(files, sizes)[0]
        found = _CUTS[kind](file.text, rng.randrange(len(file.text)), rng)
        if found is not None:
            start, end = found
            text = file.text
            around = _siblings(files, file) if kind == "context" else ()
            before, missing, after = text[:start], text[start:end], text[end:]
            items.append(Item(kind, before, missing, after, file.path, context=around))
    if len(items) < count:
        raise RequestError(
            f"{len(items)} gaps of kind {kind} in {len(files)} files, {count} are wanted",
            remedy="Give folders with more Python source.",
        )
    return items


def _siblings(files: Sequence[SourceFile], file: SourceFile) -> tuple[Context, ...]:
    """Other files of the package, the nearest in the tree first."""
    own = [each for each in files if each.package == file.package and each.path != file.path]
    own.sort(key=lambda each: -len(os.path.commonpath([each.path, file.path])))
    return tuple(Context(each.path, each.text[:_CONTEXT_CHARS]) for each in own[:_CONTEXT_FILES])


def _rest_of_line(text: str, at: int, rng: random.Random) -> tuple[int, int] | None:
    start, end = _line_around(text, at)
    return (at, end) if text[at:end].strip() and text[start:at].strip() else None


def _line(text: str, at: int, rng: random.Random) -> tuple[int, int] | None:
    start, end = _line_around(text, at)
    return _behind_indent(text, start, end)


def _lines(text: str, at: int, rng: random.Random) -> tuple[int, int] | None:
    start, end = _line_around(text, at)
    if not text[start:end].strip():
        return None
    last = start
    for _ in range(rng.randint(_FEWEST_LINES, _MOST_LINES) - 1):
        if end == len(text):
            return None
        last, end = _line_around(text, end + 1)
    # A blank last line would be a shorter gap.
    return _behind_indent(text, start, end) if text[last:end].strip() else None


def _span(text: str, at: int, rng: random.Random) -> tuple[int, int] | None:
    end = at + rng.randint(1, _LONGEST_SPAN_CHARS)
    return (at, end) if end <= len(text) and text[at:end].strip() else None


def _silent(text: str, at: int, rng: random.Random) -> tuple[int, int] | None:
    """A place where nothing is missing, the next one of a kind that is drawn."""
    places = _quiet_places(text)[rng.randrange(3)]
    index = bisect_left(places, at)
    return (places[index], places[index]) if index < len(places) else None


# Of the files of one evaluation; the tokens of a long one take a tenth of a second.
@functools.lru_cache(maxsize=512)
def _quiet_places(text: str) -> tuple[list[int], list[int], list[int]]:
    """Ends of complete statements' lines, blank lines, and places right before a token.

    All three end where code follows, so that nothing at the end of a file can be missing.
    """
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    ends: list[int] = []
    blank: list[int] = []
    before: list[int] = []
    last_code = len(text.rstrip())
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return ends, blank, before
    depth, left, is_complete = 0, 0, False
    for token in tokens:
        start = starts[token.start[0] - 1] + token.start[1]
        if token.type == tokenize.NEWLINE and start < last_code:
            ends.append(start)
        is_blank = token.type == tokenize.NL and not token.line.strip()
        # Within brackets a blank line stands between no statements.
        if is_blank and depth == 0 and start < last_code:
            blank.append(start)
        if token.type == tokenize.OP:
            if left == start and is_complete and token.string in _COMPLETED_BY:
                before.append(start)
            depth += (token.string in _OPENING) - (token.string in _CLOSING)
        is_complete = token.type in _OPERANDS or token.string in _CLOSING
        left = starts[token.end[0] - 1] + token.end[1]
    return ends, blank, before


def _line_around(text: str, at: int) -> tuple[int, int]:
    """Start and end of the line that holds `at`; its line end is not part of it."""
    end = text.find("\n", at)
    return text.rfind("\n", 0, at) + 1, len(text) if end < 0 else end


def _behind_indent(text: str, start: int, end: int) -> tuple[int, int] | None:
    code = text[start:end].lstrip(" \t")
    return (end - len(code), end) if code.strip() else None


_CUTS: dict[str, _Cut] = {
    "rest_of_line": _rest_of_line,
    "context": _rest_of_line,
    "line": _line,
    "lines": _lines,
    "span": _span,
    "silent": _silent,
}
