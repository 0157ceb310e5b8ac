"""Gaps and the text given around them as a row of tokens, and the row back as text.

    [ gap: fill, then fillers | given | gap | given | head: first tokens of the suffix ]

A gap is longer than any fill is expected to be; the model writes filler tokens where it needs no
text. That is how a gap finds its own length. A model without a filler token fills gaps of several
exact lengths instead.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from infilld.engine.errors import GapTooLong
from infilld.engine.reading import Bans, Pins
from infilld.engine.tokenizer import Tokenizer

GapKind = Literal["in_line", "tail", "block"]

# Suffix tokens on the canvas, at most: enough to decide the join, cheap to carry.
HEAD_TOKENS = 16
_FIRST_GAP_TOKENS: dict[GapKind, int] = {"in_line": 24, "tail": 24, "block": 48}


def gap_kind(prefix: str, suffix: str) -> GapKind:
    """What stands around the cursor decides how much is likely to be missing.

    in_line: text follows on the line. block: the line is blank. tail: the end of a line.
    """
    if suffix.partition("\n")[0].strip():
        return "in_line"
    return "tail" if prefix.rpartition("\n")[2].strip() else "block"


@dataclass(frozen=True, kw_only=True)
class Gap:
    """One gap on a canvas.

    Attributes:
        tokens: positions it has. limit_tokens: most it may grow to. min_tokens: of text.
        one_line: no line end may be written.
        stem: text before the gap that its first token writes again, as the start of a word.
    """

    tokens: int
    limit_tokens: int
    min_tokens: int = 0
    one_line: bool = False
    stem: str = ""


@dataclass(frozen=True)
class Draft:
    """What a gap starts from.

    Attributes:
        tokens: of its first positions; the others are fillers.
        known: which of them are meant; the others start from noise. Empty: all.
    """

    tokens: tuple[int, ...]
    known: tuple[bool, ...] = ()


@dataclass(frozen=True)
class CanvasLayout:
    """Gaps, each with the pinned tokens that follow it.

    Attributes:
        gaps: in order. given: tokens behind each gap; those of the last are the head.
    """

    gaps: tuple[Gap, ...]
    given: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return sum(gap.tokens for gap in self.gaps) + sum(map(len, self.given))

    @property
    def slices(self) -> list[slice]:
        """Where the gaps are."""
        places, at = [], 0
        for gap, given in zip(self.gaps, self.given, strict=True):
            places.append(slice(at, at + gap.tokens))
            at += gap.tokens + len(given)
        return places

    def pins(self, rows: int, device: torch.device) -> Pins:
        """The given tokens imposed on `rows` rows."""
        row = torch.zeros(self.tokens, dtype=torch.int64)
        mask = torch.ones(self.tokens, dtype=torch.bool)
        for place, given in zip(self.slices, self.given, strict=True):
            mask[place] = False
            row[place.stop : place.stop + len(given)] = torch.tensor(given, dtype=torch.int64)
        shape = (rows, self.tokens)
        return Pins(mask=mask.expand(shape).to(device), tokens=row.expand(shape).to(device))

    def grown(self, which: Iterable[int], most_tokens: int) -> "CanvasLayout | None":
        """The layout with some gaps twice as long, as far as they may; None where none can grow.

        Args:
            which: numbers of the gaps. most_tokens: of the whole row.
        """
        gaps = list(self.gaps)
        for number in which:
            room = most_tokens - sum(gap.tokens for gap in gaps) - sum(map(len, self.given))
            gap = gaps[number]
            more = min(gap.tokens, gap.limit_tokens - gap.tokens, room)
            gaps[number] = replace(gap, tokens=gap.tokens + max(0, more))
        return replace(self, gaps=tuple(gaps)) if tuple(gaps) != self.gaps else None

    def banned(
        self,
        tokenizer: Tokenizer,
        vocab_tokens: int,
        *,
        never: Sequence[int],
        filler: int | None,
    ) -> Bans:
        """Tokens that a position may not take.

        What never stands for text, and no carriage return; the filler not in the first
        `min_tokens` positions; line ends not where text follows on the line; where there is a
        stem, the first token writes it again.

        Args:
            tokenizer: vocabulary. vocab_tokens: V of the model.
            never: control tokens. filler: the one of them that may be written, if there is one.
        """
        # What is pinned is banned nothing: the first row.
        rows = [torch.zeros(vocab_tokens, dtype=torch.bool)]
        places = torch.zeros(self.tokens, dtype=torch.int64)
        usual = rows[0].clone()
        usual[list(never)] = True
        # Ids beyond the tokenizer's are padding of the embedding matrix.
        usual[tokenizer.vocab_tokens :] = True
        # The model writes LF; the document's own line end is put in its place afterwards.
        usual[list(tokenizer.carriage_return_ids)] = True
        numbers: dict[tuple[bool, bool, str], int] = {}

        def row_of(*, one_line: bool, no_filler: bool, stem: str) -> int:
            """Number of the row for a position; gaps that are alike share theirs."""
            key = (one_line, no_filler, stem)
            if key not in numbers:
                row = usual.clone()
                if one_line:
                    row[list(tokenizer.newline_ids)] = True
                if no_filler and filler is not None:
                    row[filler] = True
                if stem:
                    extending = torch.ones(vocab_tokens, dtype=torch.bool)
                    extending[list(tokenizer.tokens_extending(stem))] = False
                    row |= extending
                numbers[key] = len(rows)
                rows.append(row)
            return numbers[key]

        for gap, place in zip(self.gaps, self.slices, strict=True):
            bound = place.start + (gap.min_tokens if filler is not None else 0)
            places[place] = row_of(one_line=gap.one_line, no_filler=False, stem="")
            if bound > place.start:
                row = row_of(one_line=gap.one_line, no_filler=True, stem="")
                places[place.start : bound] = row
            if gap.stem and gap.tokens:
                no_filler = bound > place.start
                places[place.start] = row_of(
                    one_line=gap.one_line, no_filler=no_filler, stem=gap.stem
                )
        return Bans(rows=torch.stack(rows), places=places)


def first_gap_tokens(
    kind: GapKind,
    selected_tokens: int | None,
    room_tokens: int,
    min_tokens: int | None,
    max_tokens: int | None,
) -> int:
    """How long a gap starts.

    Args:
        kind: of the gap.
        selected_tokens: length of the text to be replaced; None for a cursor gap.
        room_tokens: most that the canvas can hold beside what is given.
        min_tokens, max_tokens: the request's bounds.

    Raises:
        GapTooLong: a bound, or the selection, does not fit the canvas.
    """
    wanted = {"min_tokens": min_tokens, "max_tokens": max_tokens, "the selection": selected_tokens}
    for name, tokens in wanted.items():
        if tokens is not None and tokens > room_tokens:
            raise GapTooLong(f"{name} needs {tokens} tokens, the canvas holds {room_tokens}")
    if max_tokens is not None:
        return max_tokens
    expected = _FIRST_GAP_TOKENS[kind]
    if selected_tokens is not None:
        # A rewrite is often a little longer than what it replaces.
        expected = max(expected, selected_tokens * 5 // 4 + 16)
    return min(room_tokens, max(expected, min_tokens or 0))


def read_gap(tokens: Sequence[int], filler: int | None) -> list[int]:
    """Positions of a gap that hold text, in order."""
    return [position for position, token in enumerate(tokens) if token != filler]
