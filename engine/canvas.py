"""A gap and its pinned suffix as a row of tokens, and the row back as text.

    [ gap: fill, then fillers | head: first tokens of the suffix, pinned ]

The gap is longer than any fill is expected to be; the model writes filler tokens where it needs
no text. That is how a gap finds its own length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infilld.engine.errors import GapTooLong
from infilld.engine.prompt import Controls, InfillPrompt
from infilld.engine.sampler import Pins
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


@dataclass(frozen=True)
class GapCanvas:
    """Layout of one gap with its pinned head.

    Attributes:
        gap_tokens: positions `[0, gap_tokens)` are the gap.
        head: pinned suffix tokens that follow.
    """

    gap_tokens: int
    head: tuple[int, ...]

    @property
    def canvas_tokens(self) -> int:
        """Length of the row."""
        return self.gap_tokens + len(self.head)

    def pins(self, rows: int, device: torch.device) -> Pins:
        """The head imposed on `rows` rows."""
        row = torch.zeros(self.canvas_tokens, dtype=torch.int64)
        row[self.gap_tokens :] = torch.tensor(self.head, dtype=torch.int64)
        mask = torch.arange(self.canvas_tokens) >= self.gap_tokens
        shape = (rows, self.canvas_tokens)
        return Pins(mask=mask.expand(shape).to(device), tokens=row.expand(shape).to(device))

    def grown(self, gap_tokens: int) -> "GapCanvas":
        """The same head behind a longer gap."""
        return GapCanvas(gap_tokens, self.head)


def head_of(prompt: InfillPrompt, controls: Controls) -> tuple[int, ...]:
    """Suffix tokens to pin; `<eos>` stands where the text ends."""
    ends = () if prompt.suffix_is_cut else (controls.eos,)
    return (*prompt.suffix, *ends)[:HEAD_TOKENS]


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
        room_tokens: most that the canvas can hold beside the head.
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


def banned_tokens(
    tokenizer: Tokenizer,
    controls: Controls,
    canvas: GapCanvas,
    vocab_tokens: int,
    *,
    one_line: bool,
    min_tokens: int,
) -> Tensor:
    """Tokens that a position may not take: [canvas_tokens, V] bool.

    Control tokens but the filler never, and no carriage return; the filler not in the first
    `min_tokens` positions; line ends not where text follows on the line.
    """
    banned = torch.zeros(canvas.canvas_tokens, vocab_tokens, dtype=torch.bool)
    never = sorted(tokenizer.control_ids - {controls.filler})
    banned[: canvas.gap_tokens, never] = True
    # Ids beyond the tokenizer's are padding of the embedding matrix.
    banned[: canvas.gap_tokens, tokenizer.vocab_tokens :] = True
    # The model writes LF; the document's own line end is put in its place afterwards.
    banned[: canvas.gap_tokens, list(tokenizer.carriage_return_ids)] = True
    if one_line:
        banned[: canvas.gap_tokens, list(tokenizer.newline_ids)] = True
    banned[:min_tokens, controls.filler] = True
    return banned


def read_gap(tokens: Sequence[int], filler: int) -> list[int]:
    """Positions of a gap that hold text, in order."""
    return [position for position, token in enumerate(tokens) if token != filler]
