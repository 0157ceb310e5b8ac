"""Canvases of training examples: spans of a text as rows that the model must restore.

    one gap    [ middle, fillers | head ]
    two gaps   [ middle, fillers | text between | middle, fillers | head ]
    no head    [ middle, fillers ]            the suffix stands in the prompt, or nowhere

Some start from a found draft, wrong names and all, instead of noise.
"""

import random
from dataclasses import dataclass, field

from infilld.engine.canvas import HEAD_TOKENS, gap_kind
from infilld.engine.found import found_drafts
from infilld.engine.prompt import Controls
from infilld.engine.tokenizer import Tokenizer

_MIDDLES = (("rest_of_line", 0.45), ("line", 0.2), ("lines", 0.15), ("chars", 0.2))
# Heads are as long as the engine pins them, or shorter, or missing.
_FEWEST_HEAD_TOKENS = 2
_FULL_HEADS = 0.5
_NO_HEAD, _NO_HEAD_AT_END = 0.1, 0.4
# Share of the cuts that split no word: a prompt with all its words split is unlike any real one.
_WHOLE_WORDS = 0.65
# Gaps are as long as the engine makes them at first, or shorter.
_FULL_GAPS = 0.6
# Fillers behind the first few of a gap are "spare".
_NEAR_FILLERS = 3
_TWO_GAPS = 0.05
_BETWEEN_TOKENS, _BETWEEN_CHARS = 16, 60
_MOST_SPARE = 6
# Share of the canvases that look for a draft, and how often which of those found is taken.
_DRAFTED = 0.6
_RANKS = (0.6, 0.25, 0.15)


@dataclass(frozen=True)
class Cut:
    """A span `[start, end)` of a text, in characters, to be filled."""

    start: int
    end: int


def choose_cut(text: str, at: int, rng: random.Random) -> Cut:
    """A span around `at`, of one of the usual kinds: rest of line, line, lines, characters."""
    kind = rng.choices([k for k, _ in _MIDDLES], [w for _, w in _MIDDLES])[0]
    line_start, line_end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
    line_end = len(text) if line_end < 0 else line_end
    if kind in ("chars", "rest_of_line") and rng.random() < _WHOLE_WORDS:
        at = max(line_start, _word_start(text, at))
    if kind == "chars":
        return Cut(at, min(len(text), at + rng.randint(1, 40)))
    if kind == "rest_of_line":
        return Cut(at, line_end)
    # The cursor stands behind the indent, where an editor puts it.
    start = line_start + len(text[line_start:line_end]) - len(text[line_start:line_end].lstrip())
    for _ in range(rng.randint(1, 3) if kind == "lines" else 0):
        following = text.find("\n", line_end + 1)
        line_end = len(text) if following < 0 else following
    return Cut(start, line_end)


def _word_start(text: str, at: int) -> int:
    """Where the word or the run of signs begins that `at` is in, with the space before it."""
    if 0 < at < len(text) and not text[at].isspace():
        is_word = text[at].isalnum() or text[at] == "_"
        while at > 0 and not text[at - 1].isspace():
            if (text[at - 1].isalnum() or text[at - 1] == "_") != is_word:
                break
            at -= 1
    return at - 1 if at > 0 and text[at - 1] == " " else at


@dataclass
class CanvasRow:
    """One canvas, clean, token by token.

    Attributes:
        ids: tokens. gap: whether each is of a gap; the others are given.
        spare: whether each is a filler well behind the end of a fill.
        first: what the canvas starts from where that is a draft; else None.
    """

    ids: list[int] = field(default_factory=list)
    gap: list[bool] = field(default_factory=list)
    spare: list[bool] = field(default_factory=list)
    first: list[int] | None = None

    def add_gap(self, middle: list[int], gap_tokens: int, filler: int) -> None:
        """A gap that holds the middle."""
        self.ids += middle + [filler] * (gap_tokens - len(middle))
        self.gap += [True] * gap_tokens
        far = max(0, gap_tokens - len(middle) - _NEAR_FILLERS)
        self.spare += [False] * (gap_tokens - far) + [True] * far

    def add_given(self, ids: list[int]) -> None:
        """Tokens that are pinned."""
        self.ids += ids
        self.gap += [False] * len(ids)
        self.spare += [False] * len(ids)


class CanvasWriter:
    """Writes canvases.

    Args:
        tokenizer: vocabulary. controls: its control tokens.
    """

    def __init__(self, tokenizer: Tokenizer, controls: Controls) -> None:
        self._encode, self._controls = tokenizer.encode, controls

    def write(
        self,
        text: str,
        cut: Cut,
        gap_tokens: int,
        head_tokens: int,
        rng: random.Random,
        *,
        is_last: bool,
    ) -> CanvasRow:
        """The canvas of a cut whose middle fits `gap_tokens`; `is_last` of its sequence.

        It is at most `gap_tokens + head_tokens` long.
        """
        if rng.random() < _TWO_GAPS:
            row = self._two_gaps(text, cut, gap_tokens + head_tokens, rng)
            if row is not None:
                return row
        row = CanvasRow()
        middle = self._encode(text[cut.start : cut.end])[:gap_tokens]
        length = gap_tokens
        if rng.random() >= _FULL_GAPS:
            length = rng.randint(max(2, len(middle)), gap_tokens)
        row.add_gap(middle, length, self._controls.filler)
        if rng.random() >= (_NO_HEAD_AT_END if is_last else _NO_HEAD):
            row.add_given(self._head(text, cut.end, head_tokens, rng))
        if rng.random() < _DRAFTED:
            row.first = self._found(text, cut, row, length, rng)
        return row

    def _found(
        self, text: str, cut: Cut, row: CanvasRow, length: int, rng: random.Random
    ) -> list[int] | None:
        """The row with a found draft in its gap; None where nothing is found."""
        before, behind = text[: cut.start], text[cut.end :]
        found = found_drafts(before, behind, gap_kind(before, behind), most=len(_RANKS))
        if not found:
            return None
        draft = rng.choices(found, _RANKS[: len(found)])[0].text
        ids = self._encode(draft)[:length]
        return ids + [self._controls.filler] * (length - len(ids)) + row.ids[length:]

    def _two_gaps(
        self, text: str, cut: Cut, canvas_tokens: int, rng: random.Random
    ) -> CanvasRow | None:
        """Two gaps with what stands between them; None where they do not fit."""
        at = cut.end + rng.randint(1, _BETWEEN_CHARS)
        if at >= len(text):
            return None
        second = choose_cut(text, at, rng)
        between = self._encode(text[cut.end : second.start])
        if second.start <= cut.end or len(between) > _BETWEEN_TOKENS:
            return None
        row = CanvasRow()
        for part, given in ((cut, between), (second, [])):
            middle = self._encode(text[part.start : part.end])
            spare = rng.randint(0, _MOST_SPARE)
            row.add_gap(middle, len(middle) + spare, self._controls.filler)
            row.add_given(given)
        room = canvas_tokens - len(row.ids)
        if room < _FEWEST_HEAD_TOKENS or not any(row.gap):
            return None
        row.add_given(self._head(text, second.end, min(room, HEAD_TOKENS), rng))
        return row

    def _head(self, text: str, end: int, most: int, rng: random.Random) -> list[int]:
        wanted = most if rng.random() < _FULL_HEADS else rng.randint(_FEWEST_HEAD_TOKENS, most)
        head = self._encode(text[end : end + 8 * wanted])
        if end + 8 * wanted >= len(text):
            head = [*head, self._controls.eos]
        return head[:wanted]
