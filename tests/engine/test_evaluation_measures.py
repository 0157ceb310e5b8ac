"""Figures against values worked out by hand."""

import pytest

from infilld.engine.evaluation.contenders import Answer
from infilld.engine.evaluation.items import Item
from infilld.engine.evaluation.measures import (
    is_exact,
    measure,
    measure_silence,
    measure_tests,
    noise_of,
    similarity,
    wilson,
)
from infilld.engine.evaluation.sandbox import Outcome

ITEM = Item("rest_of_line", "x = ", "abcd", "\n", "made up")


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == (low, high)
    assert wilson(count - hits, count) == pytest.approx((1 - high, 1 - low), abs=1e-4)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("abcd", True),
        ("abcd \n", True),
        (" abcd", False),
        ("abc", False),
        ("", False),
        (None, False),
    ],
)
def test_exact_match(text: str | None, exact: bool) -> None:
    assert is_exact(ITEM, Answer(text, "ok")) is exact


def test_an_abstention_is_not_exact_even_where_blanks_are_missing() -> None:
    blank = Item("benchmark", "x = 1", "\n", "y = 2\n", "made up")
    assert is_exact(blank, Answer("", "ok"))
    assert not is_exact(blank, Answer(None, "empty"))


def test_similarity_is_twice_the_common_characters_over_all() -> None:
    assert similarity("abxd", "abcd") == 2 * 3 / 8
    assert similarity("", "abcd") == 0


def test_every_figure() -> None:
    items = [ITEM, ITEM, ITEM, Item("rest_of_line", "x = ", "abcd", "\n)\n", "made up")]
    answers = [
        Answer("abcd", "ok", 0.9, 4, 10.0),
        Answer("a +", "ok", 0.2, 8, 20.0),
        Answer(None, "low_confidence", None, 8, 30.0),
        Answer("abc", "ok", 0.5, 4, 40.0),
    ]
    found = measure(items, answers, [True, True, True, False])
    assert found == {
        "items": 4,
        "exact_match": 0.25,
        "exact_match_95": wilson(1, 4),
        # 1, twice 1 of 7 characters, 0, twice 3 of 7.
        "edit_similarity": round((1 + 2 / 7 + 0 + 6 / 7) / 4, 4),
        # The last file never parses; of the others only the first one does.
        "parse_rate": round(1 / 3, 4),
        "parse_items": 3,
        "abstained": 0.25,
        "abstained_for": {"low_confidence": 1},
        "precision": round(1 / 3, 4),
        "precision_95": wilson(1, 3),
        "shown_parse_rate": 0.5,
        "mean_passes": 6.0,
        "median_ms": 25.0,
        # Between 30 and 40, seven tenths of the way: place 2.7 of 0 to 3.
        "p90_ms": 37.0,
    }


def test_nothing_shown_and_nothing_sound_is_none_not_a_number() -> None:
    found = measure([ITEM], [Answer(None, "empty", ms=3.0)], [False])
    for name in ("parse_rate", "precision", "precision_95", "shown_parse_rate"):
        assert found[name] is None
    assert (found["exact_match"], found["abstained"], found["p90_ms"]) == (0.0, 1.0, 3.0)


def test_an_abstention_passes_no_test() -> None:
    outcomes = [Outcome("passed"), Outcome("failed", "x"), None, Outcome("timed out")]
    assert measure_tests(outcomes) == {
        "pass_at_1": 0.25,
        "pass_at_1_95": wilson(1, 4),
        "tests": {"passed": 1, "failed": 1, "abstained": 1, "timed out": 1},
    }


BLANK, INNER = Item("silent", "f()\n", "", "\nx = 1\n", ""), Item("silent", "f(a", "", ")\n", "")


@pytest.mark.parametrize(
    ("text", "exact"), [(None, True), ("", True), ("  \n", True), ("x", False), (" ,", False)]
)
def test_where_nothing_is_missing_nothing_is_exact(text: str | None, exact: bool) -> None:
    assert is_exact(INNER, Answer(text, "ok")) is exact


def test_silence_is_no_precision() -> None:
    found = measure([INNER, INNER], [Answer(None, "empty"), Answer("b", "ok")], [False, False])
    assert (found["exact_match"], found["abstained"]) == (0.5, 0.5)
    assert (found["precision"], found["precision_95"]) == (None, None)


def test_noise_is_told_by_place_and_by_what_was_shown() -> None:
    items = [INNER, INNER, BLANK, Item("silent", "f()", "", "\nx\n", "")]
    answers = [Answer(", b", "ok"), Answer(")", "ok"), Answer(None, "empty"), Answer("", "ok")]
    assert measure_silence(items, answers) == {
        "silent": 0.5,
        "silent_95": wilson(2, 4),
        "noise": 0.5,
        "noise_at": {"before_code": 1.0, "blank_line": 0.0, "line_end": 0.0},
        "noise_shown": {"word": 1, "repeats_suffix": 1},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "repeats_suffix"),
        ("y = 1\nz = 2", "lines"),
        ("y = 1", "word"),
        (" # ..", "punctuation"),
    ],
)
def test_noise(text: str, expected: str) -> None:
    assert noise_of(BLANK, text) == expected
