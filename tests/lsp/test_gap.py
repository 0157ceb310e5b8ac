"""The gap: nothing outside it changes, and items fit what was typed meanwhile."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lsprotocol import types

from infilld.lsp.documents import Encoding, Snapshot, with_line_feeds
from infilld.lsp.gap import Gap, fill_of, gap_at, item_for, typed_since, window

ALPHABET = "ab_ (é中😀\n\r\x0c"
texts = st.text(ALPHABET, max_size=40)
encodings = st.sampled_from(("utf-8", "utf-16", "utf-32"))


def snapshot(text: str, encoding: Encoding = "utf-16") -> Snapshot:
    return Snapshot(uri="file:///a.py", version=1, language="python", text=text, encoding=encoding)


def params(
    position: types.Position, selected: types.SelectedCompletionInfo | None = None
) -> types.InlineCompletionParams:
    return types.InlineCompletionParams(
        context=types.InlineCompletionContext(
            trigger_kind=types.InlineCompletionTriggerKind.Automatic,
            selected_completion_info=selected,
        ),
        text_document=types.TextDocumentIdentifier("file:///a.py"),
        position=position,
    )


def gap_in(here: Snapshot, offset: int) -> Gap:
    gap = gap_at(here, params(here.position_at(offset)))
    assert gap is not None
    return gap


def applied(now: Snapshot, item: types.InlineCompletionItem) -> str:
    """What the editor holds after inserting the item, by the editor's own arithmetic."""
    assert isinstance(item.insert_text, str)
    assert item.range is not None
    change = types.TextDocumentContentChangePartial(item.range, item.insert_text)
    return now.changed([change], now.version + 1).text


@given(texts, encodings, st.data(), st.text(ALPHABET, min_size=1, max_size=12))
def test_inserting_an_item_changes_nothing_outside_the_gap(
    text: str, encoding: Encoding, data: st.DataObject, fill: str
) -> None:
    here = snapshot(text, encoding)
    cursor = data.draw(st.integers(0, len(text)))
    assume(text[max(0, cursor - 1) : cursor + 1] != "\r\n")
    item = item_for(gap_in(here, cursor), fill, here)
    assert item is not None
    assert applied(here, item) == text[:cursor] + with_line_feeds(fill) + text[cursor:]
    assert item.range is not None
    assert item.range.start.line == item.range.end.line
    assert item.range.end == here.position_at(cursor)


@given(texts, encodings, st.data(), st.text(ALPHABET, min_size=1, max_size=12))
def test_typing_along_keeps_the_item(
    text: str, encoding: Encoding, data: st.DataObject, fill: str
) -> None:
    here = snapshot(text, encoding)
    cursor = data.draw(st.integers(0, len(text)))
    assume(text[max(0, cursor - 1) : cursor + 1] != "\r\n")
    wanted = with_line_feeds(fill)
    typed = wanted[: data.draw(st.integers(0, len(wanted)))]
    # "\n" typed after a lone "\r" would join it to one line end, which is no insertion any more.
    assume(not (typed.startswith("\n") and text[:cursor].endswith("\r")))
    now = snapshot(text[:cursor] + typed + text[cursor:], encoding)
    item = item_for(gap_in(here, cursor), fill, now)
    if typed == wanted:
        assert item is None
        return
    assert item is not None
    assert item.range is not None
    assert applied(now, item) == text[:cursor] + wanted + text[cursor:]
    assert item.range.start.line == item.range.end.line
    in_range = now.text[now.offset_at(item.range.start) : now.offset_at(item.range.end)]
    assert str(item.insert_text).startswith(in_range)


@given(texts, texts, st.data())
def test_any_other_change_drops_the_item(text: str, other: str, data: st.DataObject) -> None:
    here = snapshot(text)
    cursor = data.draw(st.integers(0, len(text)))
    assume(text[max(0, cursor - 1) : cursor + 1] != "\r\n")
    now = snapshot(other)
    typed = typed_since(gap_in(here, cursor), now)
    if typed is None:
        assert item_for(gap_in(here, cursor), "filled", now) is None
    else:
        assert other == text[:cursor] + typed + text[cursor:]


@pytest.mark.parametrize(
    ("line", "anchor"),
    [("", 0), ("  ", 2), ("  retu", 2), ("x = foo(", 8), ("é_中1", 0), ("a😀b", 2), ("f'a", 2)],
)
def test_the_anchor_is_the_start_of_the_word(line: str, anchor: int) -> None:
    here = snapshot(f"first\n{line}")
    gap = gap_in(here, len("first\n") + len(line))
    assert gap.anchor == len("first\n") + anchor
    assert gap.lead == line[anchor:]


def test_a_selected_menu_entry_leads_the_item() -> None:
    here = snapshot("😀.app + 1\n")
    entry = types.SelectedCompletionInfo(
        range=types.Range(types.Position(0, 3), types.Position(0, 6)), text="append"
    )
    gap = gap_at(here, params(types.Position(0, 6), entry))
    assert gap is not None
    assert (gap.before, gap.pin, gap.after) == ("😀.", "append", " + 1\n")
    assert fill_of(gap, "append(x)") == "(x)"
    assert fill_of(gap, "apply(x)") is None
    item = item_for(gap, "(x)", here)
    assert item == types.InlineCompletionItem(insert_text="append(x)", range=entry.range)
    assert item_for(gap, "(x)", snapshot("😀.appe + 1\n")) is None


def test_a_menu_entry_over_two_lines_is_no_gap() -> None:
    entry = types.SelectedCompletionInfo(
        range=types.Range(types.Position(0, 0), types.Position(1, 1)), text="x"
    )
    assert gap_at(snapshot("ab\ncd\n"), params(types.Position(1, 1), entry)) is None


def test_text_that_disagrees_with_the_fill_drops_it() -> None:
    gap = gap_in(snapshot("re"), 2)
    assert item_for(gap, "turn x", snapshot("ret")) is not None
    assert item_for(gap, "turn x", snapshot("reT")) is None
    assert item_for(gap, "turn x", snapshot("r")) is None
    assert item_for(gap, "turn x", snapshot("ret\r")) is None


def test_a_small_document_is_sent_whole_with_line_feeds() -> None:
    here = snapshot("a\r\nbb\r\nc")
    part = window(gap_in(here, 4), 1000, 1000)
    assert (part.text, part.gap) == ("a\nbb\nc", 3)


@given(st.integers(0, 60_000), st.integers(0, 3_000), st.integers(1, 60))
def test_the_window_holds_the_gap_and_starts_at_a_line(
    cursor: int, more: int, line_chars: int
) -> None:
    text = ("x" * line_chars + "\n") * (60_000 // (line_chars + 1) + 1)
    here = snapshot(text)
    first = window(gap_in(here, cursor), 20_000, 5_000)
    before, after = first.text[: first.gap], first.text[first.gap :]
    assert text[:cursor].endswith(before)
    assert text[cursor:].startswith(after)
    assert len(before) == cursor or len(before) >= 20_000
    assert len(before) <= 20_000 + 8_192 + line_chars + 1
    start = cursor - len(before)
    assert start == 0 or text[start - 1] == "\n"
    later = min(cursor + more, len(text))
    second = window(gap_in(here, later), 20_000, 5_000)
    assert 0 <= later - second.gap - start <= more + 8_192 + line_chars + 1


def test_typing_does_not_move_the_start_of_the_window() -> None:
    text = "line of code\n" * 5_000
    starts = {
        cursor - window(gap_in(snapshot(text), cursor), 20_000, 5_000).gap
        for cursor in range(50_000, 50_200)
    }
    assert len(starts) == 1


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1_900_000,
        "first\n" + "x" * 1_900_000 + "\nlast",
        "x" * 900_000 + "\n" + "y" * 8 + "\n" + "z" * 900_000,
    ],
)
def test_a_long_line_is_cut(text: str) -> None:
    cursor = 900_005
    here = snapshot(text)
    part = window(gap_in(here, cursor), 48_000, 12_000)
    assert text[:cursor].endswith(part.text[: part.gap])
    assert text[cursor:].startswith(part.text[part.gap :])
    assert 48_000 <= part.gap <= 48_000 + 2 * 8_192
    assert 12_000 <= len(part.text) - part.gap <= 12_000 + 8_192


def test_typing_does_not_move_the_window_in_a_long_line() -> None:
    text = "x." * 500_000
    starts = {
        cursor - window(gap_in(snapshot(text), cursor), 48_000, 12_000).gap
        for cursor in range(500_000, 500_040)
    }
    assert len(starts) == 1
