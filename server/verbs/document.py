"""A document on disk: read, addressed by line and column, changed in spans and nowhere else."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from infilld.server.process import files
from infilld.server.settings import Problem

BEFORE_CHARS = 64_000
AFTER_CHARS = 16_000
_BOM = "\ufeff"
_LINE_END = re.compile(r"\r\n|\n|\r")


class DocumentProblem(Problem):
    """The document cannot be read, addressed or written."""

    code = "document"


class PositionProblem(DocumentProblem):
    """A line or a column is not there."""

    code = "position"


@dataclass(frozen=True)
class Window:
    """A part of a document around a range; offsets count in `text`, `at` is where it begins."""

    text: str
    at: int
    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """A snapshot: the bytes as read, and their text without a byte-order mark."""

    path: Path
    raw: bytes
    text: str
    has_bom: bool

    @classmethod
    def read(cls, path: Path) -> "Document":
        """Read a UTF-8 document.

        Raises:
            DocumentProblem: it cannot be read, is not UTF-8, or is no text.
        """
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DocumentProblem(f"cannot read {path}: {error.strerror}") from error
        try:
            # Bytes, not a text stream: line ends stay what they are.
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DocumentProblem(
                f"{path} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}",
                remedy="Convert it first; nothing was changed.",
            ) from None
        if (at := raw.find(0)) >= 0:
            raise DocumentProblem(
                f"{path} is no text: byte {at} is NUL",
                remedy="Give a text file; nothing was changed.",
            )
        return cls(path, raw, text.removeprefix(_BOM), text.startswith(_BOM))

    def offset(self, line: int, column: int) -> int:
        """The code point at a 1-based line and column; one past a line's last is its end.

        Raises:
            PositionProblem: the document has no such place.
        """
        begins = [0, *(match.end() for match in _LINE_END.finditer(self.text))]
        if not 1 <= line <= len(begins):
            raise PositionProblem(
                f"line {line} of {self.path}: it has {len(begins)} lines",
                remedy=f"Give a line from 1 to {len(begins)}.",
            )
        begin = begins[line - 1]
        found = _LINE_END.search(self.text, begin)
        end = len(self.text) if found is None else found.start()
        if not 1 <= column <= end - begin + 1:
            raise PositionProblem(
                f"column {column} of line {line} of {self.path}: the line has "
                f"{end - begin} characters",
                remedy=f"Give a column from 1 to {end - begin + 1}; columns count code points.",
            )
        return begin + column - 1

    def window(
        self, start: int, end: int, *, before: int = BEFORE_CHARS, after: int = AFTER_CHARS
    ) -> Window:
        """`[start, end)` and the text around it: at most so many code points on each side.

        A side that is cut is cut at a line, unless that would give up more than half of the side:
        a document that seems to end at the span is worse than a line that is cut.
        """
        at, to = max(0, start - before), min(len(self.text), end + after)
        if at > 0:
            found = _LINE_END.search(self.text, at, start)
            at = found.end() if found and found.end() <= start - before // 2 else at
        if to < len(self.text):
            least = max(end, end + after // 2 - 1)
            # A carriage return in the last place may be the first half of a line end.
            line_end = max(
                self.text.rfind("\n", least, to), self.text.rfind("\r", least, max(least, to - 1))
            )
            to = line_end + 1 if line_end >= 0 else to
        return Window(self.text[at:to], at, start - at, end - at)

    def replaced(self, changes: Iterable[tuple[int, int, str]]) -> bytes:
        """The bytes of the document with each `[start, end)` replaced by a text.

        The ranges do not overlap; their order is of no matter.
        """
        parts, at = [_BOM if self.has_bom else ""], 0
        # An empty range at the start of another goes first.
        for start, end, text in sorted(changes, key=lambda change: change[:2]):
            assert at <= start <= end <= len(self.text), "the ranges overlap"
            parts += [self.text[at:start], text]
            at = end
        return "".join([*parts, self.text[at:]]).encode("utf-8")

    def write(self, data: bytes) -> None:
        """Put other bytes in the document's place, in one step; its mode stays.

        Raises:
            DocumentProblem: it changed since it was read, or cannot be written.
        """
        try:
            files.put(self.path, data, check=self._refuse_change)
        except OSError as error:
            raise DocumentProblem(f"cannot write {self.path}: {error.strerror}") from error

    def _refuse_change(self) -> None:
        if self.path.read_bytes() != self.raw:
            raise DocumentProblem(
                f"{self.path} changed while the model was writing",
                remedy="Nothing was written; run the command again.",
            )
