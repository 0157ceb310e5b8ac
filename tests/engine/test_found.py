"""Found drafts: the most similar place wins, and its text ends where the gap's would."""

import time

import pytest

from infilld.engine.found import found_drafts

DOCUMENT = """def first(self):
    self.width = parse(text, "width")
    return self.width


def second(self):
    self.height = parse(other, "height")
    return self.height
"""


def test_the_rest_of_a_line_is_what_followed_the_longest_equal_text() -> None:
    prefix = DOCUMENT + "\n\ndef third(self):\n    self.depth = parse("
    found = found_drafts(prefix, "\n    return self.depth\n", "tail")
    assert {draft.text for draft in found} == {'text, "width")', 'other, "height")'}
    # "depth" ends like "width".
    assert found[0].text == 'text, "width")'
    assert found[0].evidence > found[1].evidence > len(" = parse(")


def test_of_equal_places_the_nearer_one_is_better() -> None:
    assert found_drafts("\na(1)\na(2)\nb\na(", "\n", "tail")[0].text == "2)"


def test_what_stands_behind_counts() -> None:
    before = "w = 1\nz = 1\na(1, 2)\nx = 1\nz = 1\na(3, 4)\ny = 1\nz = 1\n"
    assert found_drafts(before + "a(", "\nx = 1\n", "tail")[0].text == "1, 2)"
    assert found_drafts(before + "a(", "\ny = 1\n", "tail")[0].text == "3, 4)"


def test_text_behind_the_gap_is_searched_too() -> None:
    found = found_drafts("for item in ", "\n    pass\n\nfor item in basket:\n    pass\n", "tail")
    assert [draft.text for draft in found] == ["basket:"]


def test_a_gap_within_a_line_ends_where_the_line_goes_on() -> None:
    found = found_drafts("print(a, b, sep='')\nprint(", ", sep='')\n", "in_line")
    assert found[0].text == "a, b"


def test_a_block_ends_before_the_line_that_follows() -> None:
    prefix = DOCUMENT + "\n\ndef second(self):\n    "
    found = found_drafts(prefix, "\n    return self.height\n", "block")
    assert found[0].text == 'self.height = parse(other, "height")'


@pytest.mark.parametrize("kind", ["tail", "in_line", "block"])
@pytest.mark.parametrize("prefix", ["", "x", "\n", "ab"])
@pytest.mark.parametrize("suffix", ["", "\n", "y"])
def test_nothing_to_find_is_no_draft(kind: str, prefix: str, suffix: str) -> None:
    assert found_drafts(prefix, suffix, kind) == []  # type: ignore[arg-type]


def test_a_document_of_one_phrase_is_searched_in_bounded_time() -> None:
    prefix = "x = 1\n" * 200_000
    started = time.monotonic()
    assert found_drafts(prefix + "x = ", "\n" + prefix, "tail")[0].text == "1"
    assert time.monotonic() - started < 1.0
