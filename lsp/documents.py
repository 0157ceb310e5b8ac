"""What is open in the editor, as immutable snapshots; the only place that knows UTF-16.

A position of the protocol is a line and a count of code units in the negotiated encoding.
Everything else in the bridge counts code points from the start of the text. pygls' own workspace is
not used: it splits lines at form feeds and other characters that are no line ends in the protocol,
and it rounds positions up.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args
from urllib.parse import unquote

from lsprotocol import types

Encoding = Literal["utf-8", "utf-16", "utf-32"]
Change = types.TextDocumentContentChangePartial | types.TextDocumentContentChangeWholeDocument

_LINE_FEED = re.compile("\n")
_LINE_END = re.compile(r"\r\n|\r|\n")
_SURROGATE = re.compile("[\ud800-\udfff]")


def encoding_named(name: str) -> Encoding:
    """Return the position encoding called `name`.

    Raises:
        ValueError: no such encoding in the protocol.
    """
    for known in get_args(Encoding):
        if known == name:
            return known  # type: ignore[no-any-return]  # get_args is untyped
    raise ValueError(f"position encoding {name!r}, expected one of {get_args(Encoding)}")


def count_units(text: str, encoding: Encoding) -> int:
    """Return how many code units of `encoding` the text takes."""
    if encoding == "utf-32" or text.isascii():
        return len(text)
    if encoding == "utf-8":
        return len(text.encode("utf-8", "surrogatepass"))
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def count_chars(line: str, units: int, encoding: Encoding) -> int:
    """Return how many code points of `line` lie before code unit `units`.

    Past the end counts as the end; inside a code point counts as before it.
    """
    if encoding == "utf-32" or line.isascii():
        return min(units, len(line))
    if encoding == "utf-8":
        raw = line.encode("utf-8", "surrogatepass")
        if units >= len(raw):
            return len(line)
        while raw[units] & 0xC0 == 0x80:
            units -= 1
        return len(raw[:units].decode("utf-8", "surrogatepass"))
    raw = line.encode("utf-16-le", "surrogatepass")
    if 2 * units >= len(raw):
        return len(line)
    # A snapshot never holds the two halves of a pair as two code points (see `join_surrogates`), so
    # a low half after a high half is the middle of one code point.
    if units and raw[2 * units + 1] & 0xFC == 0xDC and raw[2 * units - 1] & 0xFC == 0xD8:
        units -= 1
    return len(raw[: 2 * units].decode("utf-16-le", "surrogatepass"))


def has_lone_surrogate(text: str) -> bool:
    """Return whether `text` holds a surrogate, and so is not encodable Unicode."""
    return _SURROGATE.search(text) is not None


def join_surrogates(text: str) -> str:
    """Return `text` with each high half and low half side by side made one code point."""
    if not has_lone_surrogate(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def with_line_feeds(text: str) -> str:
    """Return `text` with every line end written as one line feed."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def line_end_near(text: str, offset: int) -> str:
    """Return the line end in use at `offset`: of the line before, else the next one there is."""
    # Two searches from behind, as most documents hold no carriage return at all.
    place = max(text.rfind("\n", 0, offset), text.rfind("\r", 0, offset))
    begin = place - 1 if text[max(0, place - 1) : place + 1] == "\r\n" else place
    found = _LINE_END.search(text, begin if place >= 0 else offset)
    return found[0] if found else "\n"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """One version of a document.

    Attributes:
        uri: as the editor wrote it.
        version: the editor's number for this text.
        language: the editor's language identifier.
        text: the whole text, line ends as the editor sent them.
        encoding: of the positions this snapshot reads and writes.
    """

    uri: str
    version: int
    language: str
    text: str
    encoding: Encoding

    @cached_property
    def line_starts(self) -> Sequence[int]:
        """Offsets at which lines start; a text that ends in a line end has an empty last line."""
        # A single character is searched for three times faster than a choice.
        pattern = _LINE_END if "\r" in self.text else _LINE_FEED
        return [0, *[match.end() for match in pattern.finditer(self.text)]]

    def line_span(self, line: int) -> tuple[int, int]:
        """Return the offsets `[start, end)` of a line without its line end."""
        starts = self.line_starts
        start = starts[line]
        if line + 1 == len(starts):
            return start, len(self.text)
        end = starts[line + 1] - 1
        # "\r\n" is one line end; a lone "\r" or "\n" is one as well.
        if self.text[end] == "\n" and end > start and self.text[end - 1] == "\r":
            end -= 1
        return start, end

    def line_at(self, offset: int) -> int:
        """Return the number of the line that holds `offset`."""
        return bisect_right(self.line_starts, offset) - 1

    def offset_at(self, position: types.Position) -> int:
        """Return the code-point offset of a position.

        A character past the end of its line means the end of that line, a line past the last one
        the end of the text, and the middle of a code point its start.
        """
        if position.line >= len(self.line_starts):
            return len(self.text)
        start, end = self.line_span(position.line)
        return start + count_chars(self.text[start:end], position.character, self.encoding)

    def position_at(self, offset: int) -> types.Position:
        """Return the position of a code-point offset; inside a line end means before it."""
        offset = min(max(offset, 0), len(self.text))
        line = self.line_at(offset)
        start, end = self.line_span(line)
        return types.Position(
            line=line,
            character=count_units(self.text[start : min(offset, end)], self.encoding),
        )

    def range_at(self, start: int, end: int) -> types.Range:
        """Return the protocol's range for offsets `[start, end)`."""
        return types.Range(start=self.position_at(start), end=self.position_at(end))

    def changed(self, changes: Sequence[Change], version: int) -> "Snapshot":
        """Return the next snapshot: the changes applied one after the other."""
        current = self
        for change in changes:
            current = replace(current, text=current._text_after(change), version=version)
        return current if changes else replace(self, version=version)

    def _text_after(self, change: Change) -> str:
        if isinstance(change, types.TextDocumentContentChangeWholeDocument):
            return join_surrogates(change.text)
        start = self.offset_at(change.range.start)
        end = max(start, self.offset_at(change.range.end))
        text = self.text[:start] + change.text + self.text[end:]
        return join_surrogates(text) if has_lone_surrogate(change.text) else text


class Documents:
    """The open documents, newest snapshot of each.

    Not thread-safe: everything happens on the bridge's event loop.
    """

    def __init__(self) -> None:
        self.encoding: Encoding = "utf-16"
        self._snapshots: dict[str, Snapshot] = {}

    def open(self, item: types.TextDocumentItem) -> Snapshot:
        """Add a document, or replace the one with the same address."""
        snapshot = Snapshot(
            uri=item.uri,
            version=item.version,
            language=item.language_id,
            text=join_surrogates(item.text),
            encoding=self.encoding,
        )
        self._snapshots[unquote(item.uri)] = snapshot
        return snapshot

    def change(self, uri: str, version: int, changes: Sequence[Change]) -> Snapshot | None:
        """Apply changes and return the new snapshot; None when the document is not open."""
        current = self.get(uri)
        if current is None:
            return None
        snapshot = current.changed(changes, version)
        self._snapshots[unquote(uri)] = snapshot
        return snapshot

    def close(self, uri: str) -> None:
        """Forget a document."""
        self._snapshots.pop(unquote(uri), None)

    def get(self, uri: str) -> Snapshot | None:
        """Return the newest snapshot; None when the document is not open."""
        return self._snapshots.get(unquote(uri))

    def __len__(self) -> int:
        return len(self._snapshots)
