"""A canvas's layout: what may stand where, how long gaps start, and how they grow."""

import pytest
import torch
from tiny_infill import byte_tokenizer

from infilld.engine.canvas import CanvasLayout, Gap, first_gap_tokens, gap_kind, read_gap
from infilld.engine.errors import GapTooLong
from infilld.engine.prompt import Controls

TOKENIZER = byte_tokenizer()
CONTROLS = Controls.of(TOKENIZER)
assert CONTROLS is not None
FILLER = CONTROLS.filler
HEAD = tuple(TOKENIZER.encode("ab"))
VOCAB = TOKENIZER.vocab_tokens + 3


def gap(tokens: int = 6, limit: int = 99, **about: object) -> Gap:
    return Gap(tokens=tokens, limit_tokens=limit, **about)  # type: ignore[arg-type]


def banned(layout: CanvasLayout) -> torch.Tensor:
    never = sorted(TOKENIZER.control_ids - {FILLER})
    return layout.banned(TOKENIZER, VOCAB, never=never, filler=FILLER).dense()


def test_control_tokens_stay_out_of_a_gap_but_the_filler() -> None:
    mask = banned(CanvasLayout((gap(),), (HEAD,)))
    for token in TOKENIZER.control_ids:
        assert mask[:6, token].all() == (token != FILLER)
    # Ids beyond the vocabulary stand for nothing; the head is pinned and needs no ban.
    assert mask[:6, TOKENIZER.vocab_tokens :].all()
    assert not mask[6:].any()


def test_line_ends() -> None:
    (lf,), (cr,) = TOKENIZER.encode("\n"), TOKENIZER.encode("\r")
    layout = CanvasLayout((gap(), gap(one_line=True)), (HEAD, HEAD))
    mask = banned(layout)
    assert not mask[:6, lf].any()
    assert mask[8:14, lf].all()
    assert mask[:6, cr].all()


def test_a_gap_of_at_least_some_tokens_has_its_fillers_behind_them() -> None:
    mask = banned(CanvasLayout((gap(min_tokens=4),), (HEAD,)))
    assert mask[:6, FILLER].tolist() == [True] * 4 + [False] * 2


def test_a_stem_is_written_again_by_the_first_token() -> None:
    (x,), (y,) = TOKENIZER.encode("x"), TOKENIZER.encode("y")
    mask = banned(CanvasLayout((gap(stem="x"),), (HEAD,)))
    assert not mask[0, x]
    assert mask[0].sum() == VOCAB - 1
    assert not mask[1, y]


def test_pins_are_what_is_given() -> None:
    layout = CanvasLayout((gap(3), gap(2)), ((7, 8), HEAD))
    pins = layout.pins(2, torch.device("cpu"))
    noise = torch.full((2, layout.tokens), 99)
    assert pins.impose(noise).tolist() == [[99] * 3 + [7, 8] + [99] * 2 + list(HEAD)] * 2
    assert layout.slices == [slice(0, 3), slice(5, 7)]


def test_gaps_grow_as_far_as_they_may() -> None:
    layout = CanvasLayout((gap(3), gap(4, limit=5)), ((7, 8), HEAD))
    grown = layout.grown([0], 64)
    assert grown is not None
    assert [each.tokens for each in grown.gaps] == [6, 4]
    both = layout.grown([0, 1], 13)
    assert both is not None
    assert [each.tokens for each in both.gaps] == [5, 4], "the canvas ends at 13"
    second = layout.grown([1], 64)
    assert second is not None
    assert [each.tokens for each in second.gaps] == [3, 5]
    assert second.grown([1], 64) is None
    assert layout.grown([], 64) is None


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


def test_gaps_that_are_alike_share_what_is_banned() -> None:
    """A pass takes few sets of banned tokens, however many gaps it has."""
    several = CanvasLayout((gap(min_tokens=2),) * 9, (HEAD,) * 9)
    bans = several.banned(TOKENIZER, VOCAB, never=sorted(TOKENIZER.control_ids), filler=FILLER)
    # Nothing for what is pinned, the usual, and the usual without a filler.
    assert len(bans.rows) == 3
    alone = CanvasLayout((gap(min_tokens=2),), (HEAD,))
    assert torch.equal(banned(several)[: alone.tokens], banned(alone))
    assert torch.equal(banned(several), banned(alone).repeat(9, 1))
