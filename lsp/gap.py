"""The gap at the cursor: what the daemon is asked, and how its fill becomes an item."""

from dataclasses import dataclass

from lsprotocol import types

from infilld.lsp.documents import Snapshot, with_line_feeds

_WINDOW_STEP_CHARS = 8_192
"""The window starts at a multiple of this (then at a line), so that typing does not move it.

A moving start would make every cached prompt useless. A line that begins or ends further away than
this is cut: minified code has lines of megabytes."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Where text may appear, and what an item replaces.

    Without a selected menu entry `lead` is what the document holds between `anchor` and `end`, and
    `end` is the cursor: the model reads `text[:end]`, the gap, `text[end:]`. A selected entry that
    is not in the document yet is pinned to the start of the gap, which then is at `anchor`.

    Attributes:
        snapshot: the document when the request came.
        anchor: start of the range that items replace; it stays put while a word is typed.
        end: end of that range, on the same line.
        lead: what every item starts with.
    """

    snapshot: Snapshot
    anchor: int
    end: int
    lead: str

    @property
    def place(self) -> int:
        """Where the text ends that the fill continues."""
        return self.end if self.follows_document else self.anchor

    @property
    def pin(self) -> str:
        """What the daemon's text must start with."""
        return "" if self.follows_document else with_line_feeds(self.lead)

    @property
    def before(self) -> str:
        """The text the fill continues."""
        return self.snapshot.text[: self.place]

    @property
    def after(self) -> str:
        """The text the fill must join."""
        return self.snapshot.text[self.end :]

    @property
    def follows_document(self) -> bool:
        """Whether `lead` stands in the document, rather than in the editor's menu."""
        return self.lead == self.snapshot.text[self.anchor : self.end]


@dataclass(frozen=True)
class Window:
    """Part of a document with line feeds only, and the place of the gap in it."""

    text: str
    gap: int


def gap_at(snapshot: Snapshot, params: types.InlineCompletionParams) -> Gap | None:
    """Return the gap of a request; None when the selected menu entry spans lines."""
    selected = params.context.selected_completion_info
    if selected is not None:
        start = snapshot.offset_at(selected.range.start)
        end = max(start, snapshot.offset_at(selected.range.end))
        if snapshot.line_at(start) != snapshot.line_at(end):
            return None
        return Gap(snapshot=snapshot, anchor=start, end=end, lead=selected.text)
    cursor = snapshot.offset_at(params.position)
    anchor = _word_start(snapshot, cursor)
    return Gap(snapshot=snapshot, anchor=anchor, end=cursor, lead=snapshot.text[anchor:cursor])


def _word_start(snapshot: Snapshot, cursor: int) -> int:
    line_start, _ = snapshot.line_span(snapshot.line_at(cursor))
    text = snapshot.text
    start = cursor
    while start > line_start and (text[start - 1].isalnum() or text[start - 1] == "_"):
        start -= 1
    return start


def reach(text: str, start: int, end: int, before_chars: int, after_chars: int) -> tuple[int, int]:
    """Return `[start, end)` with about this many code points more on each side."""
    at = max(0, start - before_chars)
    at -= at % _WINDOW_STEP_CHARS
    line_start = text.rfind("\n", 0, at) + 1
    if at - line_start <= _WINDOW_STEP_CHARS:
        at = line_start
    to = len(text)
    if to - end > after_chars:
        least, most = end + after_chars, end + after_chars + _WINDOW_STEP_CHARS
        to = text.find("\n", least, most) + 1 or min(to, most)
    return at, to


def window(gap: Gap, before_chars: int, after_chars: int) -> Window:
    """Return what the daemon gets to read: about this many code points around the gap."""
    text = gap.snapshot.text
    at, to = reach(text, gap.place, gap.end, before_chars, after_chars)
    kept = with_line_feeds(text[at : gap.place])
    return Window(text=kept + with_line_feeds(text[gap.end : to]), gap=len(kept))


def fill_of(gap: Gap, text: str) -> str | None:
    """Return what the daemon's text adds to the gap's lead; None when it breaks the pin."""
    text = with_line_feeds(text)
    return text.removeprefix(gap.pin) if text.startswith(gap.pin) else None


def typed_since(gap: Gap, now: Snapshot) -> str | None:
    """Return what was typed into the gap since the request; None after any other change."""
    old, new = gap.snapshot.text, now.text
    if not gap.follows_document:
        return "" if new == old else None
    typed_chars = len(new) - len(old)
    if typed_chars < 0 or new[: gap.end] != old[: gap.end]:
        return None
    if new[gap.end + typed_chars :] != old[gap.end :]:
        return None
    return new[gap.end : gap.end + typed_chars]


def item_for(gap: Gap, fill: str, now: Snapshot) -> types.InlineCompletionItem | None:
    """Return the item that puts `fill` into the document as it is now.

    None when the document has moved on in another way, or when everything is typed already.
    """
    typed = typed_since(gap, now)
    fill = with_line_feeds(fill)
    # A carriage return alone may be the first half of a line end.
    if typed is None or typed.endswith("\r"):
        return None
    expected = with_line_feeds(typed)
    if not fill.startswith(expected) or fill == expected:
        return None
    start, text = gap.anchor, gap.lead + fill
    if "\n" in expected:
        # The range must stay on one line: start after the last line end that was typed.
        start = gap.end + max(typed.rfind("\n"), typed.rfind("\r")) + 1
        text = fill[expected.rfind("\n") + 1 :]
    return types.InlineCompletionItem(
        insert_text=text, range=now.range_at(start, gap.end + len(typed))
    )
