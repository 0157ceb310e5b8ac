"""Positions in all three encodings, and the editor's changes applied to snapshots."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lsprotocol import types

from infilld.lsp.documents import (
    Documents,
    Encoding,
    Snapshot,
    count_chars,
    count_units,
    encoding_named,
    join_surrogates,
    line_end_near,
    with_line_feeds,
)

ENCODINGS: tuple[Encoding, ...] = ("utf-8", "utf-16", "utf-32")
# Every width of UTF-8, both widths of UTF-16, all line ends, and what `str.splitlines` wrongly
# takes for a line end.
ALPHABET = "ab\t é中😀𝒳\u0301\n\r\x0b\x0c\x1c\x85\u2028"
texts = st.text(ALPHABET, max_size=40) | st.lists(
    st.sampled_from(["x", "\r\n", "\n", "\r", "😀", "é", "\x0c"]), max_size=30
).map("".join)
encodings = st.sampled_from(ENCODINGS)


def snapshot(text: str, encoding: Encoding = "utf-16", version: int = 1) -> Snapshot:
    return Snapshot(
        uri="file:///a.py", version=version, language="python", text=text, encoding=encoding
    )


def at(line: int, character: int) -> types.Position:
    return types.Position(line, character)


def edit(
    start: types.Position, end: types.Position, text: str
) -> types.TextDocumentContentChangePartial:
    return types.TextDocumentContentChangePartial(types.Range(start, end), text)


def lines_of(text: str) -> list[str]:
    """The protocol's lines without their ends, by another road than the code under test."""
    return re.split(r"\r\n|\r|\n", text)


def width(char: str, encoding: Encoding) -> int:
    code = ord(char)
    if encoding == "utf-32":
        return 1
    if encoding == "utf-16":
        return 1 + (code > 0xFFFF)
    return 1 + (code > 0x7F) + (code > 0x7FF) + (code > 0xFFFF)


@given(texts, encodings)
def test_every_offset_comes_back(text: str, encoding: Encoding) -> None:
    here = snapshot(text, encoding)
    for offset in range(len(text) + 1):
        inside_line_end = text[offset - 1 : offset + 1] == "\r\n"
        expected = offset - 1 if inside_line_end else offset
        assert here.offset_at(here.position_at(offset)) == expected


@given(texts, encodings)
def test_positions_count_units_of_their_line(text: str, encoding: Encoding) -> None:
    here = snapshot(text, encoding)
    lines = lines_of(text)
    assert len(here.line_starts) == len(lines)
    for number, line in enumerate(lines):
        start, end = here.line_span(number)
        assert text[start:end] == line
        for chars in range(len(line) + 1):
            units = sum(width(c, encoding) for c in line[:chars])
            assert here.position_at(start + chars) == at(number, units)
            assert here.offset_at(at(number, units)) == start + chars


@given(texts, encodings, st.integers(0, 60), st.integers(0, 2**31 - 1))
def test_any_position_lands_inside_the_text(
    text: str, encoding: Encoding, line: int, character: int
) -> None:
    here = snapshot(text, encoding)
    offset = here.offset_at(at(line, character))
    lines = lines_of(text)
    if line >= len(lines):
        assert offset == len(text)
    else:
        start, end = here.line_span(line)
        assert start <= offset <= end
        if character >= sum(width(c, encoding) for c in lines[line]):
            assert offset == end


@given(texts, encodings)
def test_the_middle_of_a_code_point_means_its_start(text: str, encoding: Encoding) -> None:
    for line in lines_of(text):
        units = 0
        for chars, char in enumerate(line):
            for inside in range(width(char, encoding)):
                assert count_chars(line, units + inside, encoding) == chars
            units += width(char, encoding)
        assert count_units(line, encoding) == units


@given(texts, encodings, st.data())
def test_a_change_replaces_exactly_its_range(
    text: str, encoding: Encoding, data: st.DataObject
) -> None:
    here = snapshot(text, encoding)
    offsets = [o for o in range(len(text) + 1) if text[o - 1 : o + 1] != "\r\n"]
    start, end = sorted(data.draw(st.lists(st.sampled_from(offsets), min_size=2, max_size=2)))
    new = data.draw(st.text(ALPHABET, max_size=8))
    change = edit(here.position_at(start), here.position_at(end), new)
    after = here.changed([change], 2)
    assert after.text == text[:start] + new + text[end:]
    assert (after.version, here.text) == (2, text)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_changes_apply_in_order(encoding: Encoding) -> None:
    after = snapshot("a😀b\r\nc", encoding).changed(
        [edit(at(0, 0), at(0, 1), "xy"), edit(at(1, 1), at(1, 1), "\r\nd")], 7
    )
    assert after.text == "xy😀b\r\nc\r\nd"
    whole = after.changed([types.TextDocumentContentChangeWholeDocument("é")], 8)
    assert (whole.text, whole.version) == ("é", 8)


@pytest.mark.parametrize(
    ("text", "position", "offset"),
    [
        ("", at(0, 0), 0),
        ("", at(5, 5), 0),
        ("ab", at(0, 9), 2),
        ("ab\n", at(0, 9), 2),
        ("ab\r\n", at(0, 3), 2),
        ("ab\n", at(1, 0), 3),
        ("ab\n", at(1, 9), 3),
        ("ab\n", at(2, 0), 3),
        ("a\rb", at(1, 0), 2),
        ("a\x0cb", at(1, 0), 3),
    ],
)
def test_clamping(text: str, position: types.Position, offset: int) -> None:
    before = types.Position(position.line, position.character)
    assert snapshot(text).offset_at(position) == offset
    assert position == before, "the caller's position must not be changed"


def test_a_reversed_range_changes_nothing_before_its_start() -> None:
    assert snapshot("abcd").changed([edit(at(0, 3), at(0, 1), "X")], 2).text == "abcXd"


def test_surrogate_halves_typed_one_by_one_become_one_code_point() -> None:
    half = snapshot("ab").changed([edit(at(0, 1), at(0, 1), "\ud83d")], 2)
    assert half.text == "a\ud83db"
    assert half.offset_at(at(0, 2)) == 2
    whole = half.changed([edit(at(0, 2), at(0, 2), "\ude00")], 3)
    assert whole.text == "a😀b"
    assert join_surrogates("\ude00\ud83d") == "\ude00\ud83d"


def test_line_feeds() -> None:
    assert with_line_feeds("a\r\nb\rc\n\r\n") == "a\nb\nc\n\n"


def test_an_unknown_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="utf-7"):
        encoding_named("utf-7")


def test_documents_keep_the_newest_snapshot() -> None:
    documents = Documents()
    documents.encoding = "utf-8"
    first = documents.open(types.TextDocumentItem("file:///a%20b.py", "python", 1, "é"))
    second = documents.change("file:///a b.py", 2, [edit(at(0, 2), at(0, 2), "x")])
    assert (first.text, second and second.text) == ("é", "éx")
    assert documents.get("file:///a%20b.py") == second
    assert documents.change("file:///other.py", 1, []) is None
    documents.close("file:///a%20b.py")
    assert documents.get("file:///a%20b.py") is None
    assert len(documents) == 0


@pytest.mark.parametrize(
    ("text", "offset", "expected"),
    [
        ("", 0, "\n"),
        ("a", 1, "\n"),
        ("a\nb\r\nc", 1, "\n"),
        ("a\nb\r\nc", 3, "\n"),
        ("a\nb\r\nc", 5, "\r\n"),
        ("a\r\nb\nc", 0, "\r\n"),
        ("a\r\nb\nc", 5, "\n"),
        ("\r\na", 3, "\r\n"),
        ("\na", 2, "\n"),
        ("a\rb", 3, "\r"),
        ("a\rb", 0, "\r"),
    ],
)
def test_the_line_end_in_use(text: str, offset: int, expected: str) -> None:
    assert line_end_near(text, offset) == expected
