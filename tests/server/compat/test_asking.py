"""What every dialect asks and gets: clamps, cuts, finish reasons."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infilld.engine.canvas import HEAD_TOKENS
from infilld.engine.errors import BadText, UnknownOption
from infilld.engine.request import (
    Alternative,
    Context,
    InfillResult,
    ScoredToken,
    Span,
    SpanFill,
    Usage,
)
from infilld.server.compat.asking import PINNED_TOKENS, Asked, Shaped, shape, shaped

TEXTS = st.text(st.sampled_from("ab \t\n\r;"), max_size=20)
STOPS = st.lists(st.text(st.sampled_from("ab\n;"), min_size=1, max_size=3), max_size=3)


def tokens_of(text: str, length: int = 2) -> tuple[ScoredToken, ...]:
    return tuple(
        ScoredToken(text[at : at + length], -0.5 * (at + 1)) for at in range(0, len(text), length)
    )


def cut(text: str, most: int | None = None, **asked: object) -> Shaped:
    scored = tokens_of(text)
    return shape(Asked(prefix="", **asked), text, scored, len(scored), most)  # type: ignore[arg-type]


def test_the_gap_is_empty_and_nothing_supersedes_it() -> None:
    wanted = Asked(prefix="ab", suffix="c").to_engine(256)
    assert (wanted.text, wanted.spans, wanted.document) == ("abc", (Span(2, 2),), None)


def test_a_line_end_is_not_divided() -> None:
    wanted = Asked(prefix="a\r", suffix="\nb").to_engine(256)
    assert (wanted.text, wanted.spans) == ("a\r\nb", (Span(1, 1),))


@pytest.mark.parametrize(
    ("most", "least", "expected"),
    [
        (None, None, (None, None, False)),
        (4096, None, (256, None, False)),
        (7, 9, (7, 7, False)),
        (None, 9999, (None, 256, False)),
        (7, -3, (7, 0, False)),
        (0, None, (1, None, True)),
    ],
)
def test_bounds_are_what_a_canvas_holds(
    most: int | None, least: int | None, expected: tuple[int | None, int | None, bool]
) -> None:
    wanted = Asked(prefix="", max_tokens=most, min_tokens=least).to_engine(256)
    assert (wanted.max_tokens, wanted.min_tokens, wanted.warm) == expected


def test_more_context_than_anybody_reads_is_left_out() -> None:
    items = [Context(f"{i}.py", "text") for i in range(300)]
    assert Asked(prefix="", context=items).to_engine(256).context == tuple(items[:256])


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(BadText):
        Asked(prefix="\ud800").to_engine(256)
    with pytest.raises(UnknownOption, match="n is 9"):
        Asked(prefix="", n=9).to_engine(256)


@pytest.mark.parametrize(
    ("text", "stop", "expected", "which"),
    [
        ("a; b", (";",), "a", ";"),
        ("a; b", ("x",), "a; b", None),
        ("a; b", ("b", " ", ";"), "a", ";"),
        ("a\n\nb", ("\n", "\n\n"), "a", "\n\n"),
        ("end", ("end",), "", "end"),
        ("", ("a",), "", None),
    ],
)
def test_the_first_stop_ends_a_text(
    text: str, stop: tuple[str, ...], expected: str, which: str | None
) -> None:
    got = cut(text, stop=stop)
    assert (got.text, got.stopped_by, got.finish) == (expected, which, "stop")


@given(TEXTS, STOPS)
def test_no_stop_is_left_and_nothing_else_is_lost(text: str, stop: list[str]) -> None:
    got = cut(text, stop=tuple(stop))
    assert text.startswith(got.text)
    assert not any(each in got.text for each in stop)
    if got.text != text:
        assert got.stopped_by is not None
        assert text[len(got.text) :].startswith(got.stopped_by)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("return 1", "return 1"),
        ("x = 1\n    y = 2\n", "x = 1\n    y = 2\n"),
        ("x = 1\n    y = 2\nz = 3\n", "x = 1\n    y = 2"),
        ("x = 1\r\n    y = 2\r\nz = 3", "x = 1\r\n    y = 2"),
        ("x = 1\n\n    y = 2\n\n\ndef f():", "x = 1\n\n    y = 2"),
        ("x = 1\n\n", "x = 1\n\n"),
        ("\n}", ""),
        ("x\n\t\t\t\ty", "x\n\t\t\t\ty"),
        ("x\n   y", "x"),
    ],
)
def test_a_line_with_less_indentation_ends_a_text(text: str, expected: str) -> None:
    got = cut(text, n_indent=4)
    assert (got.text, got.is_cut_by_indent) == (expected, text != expected)


def test_the_bound_on_tokens_is_said_to_have_ended_it() -> None:
    assert cut("abcd", most=2).finish == "length"
    assert cut("abcd", most=3).finish == "stop"
    assert cut("abcd", most=2, stop=("d",)).finish == "stop"
    assert cut("ab\nc", most=2, n_indent=1).finish == "stop"


@given(TEXTS, STOPS)
def test_tokens_are_those_of_the_text_or_none(text: str, stop: list[str]) -> None:
    got = cut(text, stop=tuple(stop))
    if got.scored is None:
        assert len(got.text) % 2 == 1
    else:
        assert "".join(token.text for token in got.scored) == got.text
        assert got.scored == tokens_of(text)[: len(got.scored)]


def test_tokens_that_are_not_known_are_none() -> None:
    assert shape(Asked(prefix=""), "ab", (), 1, None).scored is None
    assert shape(Asked(prefix=""), "", (), 0, None).scored == ()


def result_of(*texts: str, text_tokens: int = 5) -> InfillResult:
    ranked = tuple(
        Alternative((SpanFill(0, 0, text, 0.5, tokens_of(text)),), -rank)
        for rank, text in enumerate(texts)
    )
    reason = "ok" if texts else "low_confidence"
    usage = Usage(text_tokens=text_tokens)
    return InfillResult(id="a", seed=1, alternatives=ranked, reason=reason, why="why", usage=usage)


def test_silence_is_one_empty_text_and_says_why() -> None:
    asked = Asked(prefix="")
    got = shaped(asked, asked.to_engine(256), result_of())
    assert got.choices == (Shaped(),)
    assert got.extension == {"id": "a", "reason": "low_confidence", "why": "why"}
    assert got.tokens == 0


def test_tokens_of_all_texts_are_counted() -> None:
    asked = Asked(prefix="", n=2)
    got = shaped(asked, asked.to_engine(256), result_of("abcd", "ab"))
    assert [choice.text for choice in got.choices] == ["abcd", "ab"]
    assert got.tokens == 3


def test_a_gap_leaves_room_for_what_is_pinned() -> None:
    assert PINNED_TOKENS == HEAD_TOKENS
