import os
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infilld.server.verbs.document import Document, DocumentProblem, PositionProblem

TEXTS = st.lists(
    st.sampled_from(
        ["a", "\n", "\r\n", "\r", "\N{GRINNING FACE}", "e\u0301", "\u2028", "\t", "\x0c"]
    )
).map("".join)


def document(text: str) -> Document:
    return Document(Path("x.py"), text.encode(), text, has_bom=False)


@pytest.mark.parametrize(
    ("text", "line", "column", "offset"),
    [
        ("", 1, 1, 0),
        ("ab", 1, 3, 2),
        ("a\nb", 2, 1, 2),
        ("a\n", 2, 1, 2),
        ("a\r\nb", 1, 2, 1),
        ("a\r\nb", 2, 2, 4),
        ("a\rb", 2, 1, 2),
        ("\N{GRINNING FACE}x\n", 1, 2, 1),
        ("a\u2028b\x0cc\nd", 1, 6, 5),
    ],
)
def test_lines_and_columns_count_from_one(text: str, line: int, column: int, offset: int) -> None:
    assert document(text).offset(line, column) == offset


@pytest.mark.parametrize(
    ("line", "column", "words"),
    [(0, 1, "2 lines"), (3, 1, "2 lines"), (1, 0, "2 characters"), (1, 4, "column from 1 to 3")],
)
def test_a_place_that_is_not_there_is_named(line: int, column: int, words: str) -> None:
    with pytest.raises(PositionProblem) as caught:
        document("ab\r\n").offset(line, column)
    assert words in f"{caught.value} {caught.value.remedy}"


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.integers(0, 12), st.integers(0, 12))
def test_a_window_holds_the_span_and_maps_back(
    before: str, inside: str, after: str, reach: int, ahead: int
) -> None:
    whole = before + inside + after
    start, end = len(before), len(before + inside)
    window = document(whole).window(start, end, before=reach, after=ahead)
    assert window.at + window.start == start
    assert window.text[window.start : window.end] == inside
    assert whole[window.at : window.at + len(window.text)] == window.text
    assert window.start <= reach
    assert len(window.text) - window.end <= ahead


def test_a_window_is_cut_at_lines_where_there_are_some() -> None:
    window = document("one\r\ntwo\r\nthree\nfour\nfive").window(12, 12, before=8, after=8)
    assert window.text == "two\r\nthree\n"


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("near", [0, 3])
def test_a_long_line_is_cut_rather_than_left_out(line_end: str, near: int) -> None:
    """The model must not believe that the document starts or ends at the span."""
    before = "a" * 200 + line_end + "b" * near
    after = "c" * near + line_end + "d" * 200
    window = document(before + after).window(len(before), len(before), before=40, after=40)
    assert window.text == before[-40:] + after[:40]
    one_line = document("a" * 200).window(100, 100, before=40, after=40)
    assert (one_line.text, one_line.start) == ("a" * 80, 40)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_window_ends_at_any_line_end(line_end: str) -> None:
    text = f"one{line_end}two{line_end}three"
    assert document(text).window(0, 0, after=10).text == f"one{line_end}two{line_end}"[:10]
    assert document(text).window(0, 0, after=6).text == f"one{line_end}"


def test_a_document_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.py"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(DocumentProblem, match="byte 3 is 0xe9"):
        Document.read(path)


def test_a_binary_document_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pyc"
    path.write_bytes(b"ab\0\0c")
    with pytest.raises(DocumentProblem, match="byte 2 is NUL"):
        Document.read(path)


def test_several_ranges_are_replaced_in_any_order() -> None:
    changes = [(4, 4, "D"), (0, 1, "A"), (1, 1, "B"), (2, 4, "")]
    assert document("abcde").replaced(changes) == b"ABbDe"
    assert document("abc").replaced([]) == b"abc"


def test_a_document_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentProblem, match=r"none\.py: No such file"):
        Document.read(tmp_path / "none.py")


def test_writing_keeps_mode_and_link_and_leaves_no_draft(tmp_path: Path) -> None:
    path, link = tmp_path / "a.py", tmp_path / "link.py"
    path.write_bytes(b"\xef\xbb\xbfa\r\n")
    path.chmod(0o750)
    link.symlink_to(path)
    snapshot = Document.read(link)
    snapshot.write(snapshot.replaced([(1, 1, "b")]))
    assert path.read_bytes() == b"\xef\xbb\xbfab\r\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a.py", "link.py"]


def test_a_document_that_changed_meanwhile_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes(b"old")
    snapshot = Document.read(path)
    path.write_bytes(b"new")
    with pytest.raises(DocumentProblem, match="changed while"):
        snapshot.write(b"mine")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.py"]
