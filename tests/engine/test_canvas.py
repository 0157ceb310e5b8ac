"""A gap's layout: what may stand where, and how long it starts."""

import pytest
import torch
from tiny_infill import byte_tokenizer

from infilld.engine.canvas import (
    HEAD_TOKENS,
    GapCanvas,
    banned_tokens,
    first_gap_tokens,
    gap_kind,
    head_of,
    read_gap,
)
from infilld.engine.errors import GapTooLong
from infilld.engine.prompt import Controls, infill_prompt

TOKENIZER = byte_tokenizer()
CONTROLS = Controls.of(TOKENIZER)
assert CONTROLS is not None
CANVAS = GapCanvas(6, tuple(TOKENIZER.encode("ab")))


def banned(*, one_line: bool = False, min_tokens: int = 0) -> torch.Tensor:
    assert CONTROLS is not None
    vocab = TOKENIZER.vocab_tokens + 3
    return banned_tokens(
        TOKENIZER, CONTROLS, CANVAS, vocab, one_line=one_line, min_tokens=min_tokens
    )


def test_control_tokens_stay_out_of_a_gap_but_the_filler() -> None:
    assert CONTROLS is not None
    mask = banned()
    for token in TOKENIZER.control_ids:
        assert mask[:6, token].all() == (token != CONTROLS.filler)
    # Ids beyond the vocabulary stand for nothing; the head is pinned and needs no ban.
    assert mask[:6, TOKENIZER.vocab_tokens :].all()
    assert not mask[6:].any()


def test_line_ends() -> None:
    (lf,), (cr,) = TOKENIZER.encode("\n"), TOKENIZER.encode("\r")
    assert not banned()[:, lf].any()
    assert banned(one_line=True)[:6, lf].all()
    assert banned()[:6, cr].all()


def test_a_gap_of_at_least_some_tokens_has_its_fillers_behind_them() -> None:
    assert CONTROLS is not None
    filler = banned(min_tokens=4)[:6, CONTROLS.filler]
    assert filler.tolist() == [True] * 4 + [False] * 2


def test_pins_are_the_head() -> None:
    pins = CANVAS.pins(2, torch.device("cpu"))
    noise = torch.full((2, CANVAS.canvas_tokens), 99)
    assert pins.impose(noise).tolist() == [[99] * 6 + list(CANVAS.head)] * 2


@pytest.mark.parametrize(
    ("suffix", "ends"),
    [("", True), ("ab", True), ("x" * (HEAD_TOKENS - 1), True), ("x" * 999, False)],
)
def test_a_head_ends_where_the_text_ends(suffix: str, ends: bool) -> None:
    assert CONTROLS is not None
    head = head_of(infill_prompt(TOKENIZER, CONTROLS, "a", suffix, 512), CONTROLS)
    assert (head[-1] == CONTROLS.eos) == ends
    assert suffix.startswith(TOKENIZER.text(head))
    assert len(head) <= HEAD_TOKENS


@pytest.mark.parametrize(
    ("prefix", "suffix", "kind"),
    [
        ("f(", ")\n", "in_line"),
        ("x = ", "\ny", "tail"),
        ("x = ", "", "tail"),
        ("if a:\n    ", "  \nb", "block"),
        ("", "", "block"),
    ],
)
def test_kinds(prefix: str, suffix: str, kind: str) -> None:
    assert gap_kind(prefix, suffix) == kind


def test_how_long_a_gap_starts() -> None:
    assert first_gap_tokens("in_line", None, 100, None, None) == 24
    assert first_gap_tokens("tail", None, 100, None, 7) == 7
    assert first_gap_tokens("tail", None, 100, 60, None) == 60
    assert first_gap_tokens("block", None, 30, None, None) == 30
    assert first_gap_tokens("in_line", 40, 100, None, None) == 66
    for selected, low, high in ((101, None, None), (None, 101, None), (None, None, 101)):
        with pytest.raises(GapTooLong):
            first_gap_tokens("tail", selected, 100, low, high)


def test_fillers_are_no_text() -> None:
    assert read_gap([5, 9, 5, 5, 9], filler=9) == [0, 2, 3]
