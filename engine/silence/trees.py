"""Does a fill break the document? Asked of tree-sitter, which reads broken documents too.

Its grammars are loaded when the first document of their language is judged.
"""

import functools
import importlib
import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from infilld.engine.silence.lines import parsable_part

if TYPE_CHECKING:
    from tree_sitter import Language, Node, Tree

log = logging.getLogger(__name__)

# Package of each grammar and its function.
_GRAMMARS = {
    "bash": ("tree_sitter_bash", "language"),
    "c": ("tree_sitter_c", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
    "css": ("tree_sitter_css", "language"),
    "go": ("tree_sitter_go", "language"),
    "html": ("tree_sitter_html", "language"),
    "java": ("tree_sitter_java", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "json": ("tree_sitter_json", "language"),
    "python": ("tree_sitter_python", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "toml": ("tree_sitter_toml", "language"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
    "yaml": ("tree_sitter_yaml", "language"),
}
# Texts that may stand in a gap: with one of them the surroundings are at their best.
_OF_BRACES = ("a", "a;", "a()", "a = 1;", "a: 1", "a,", "a {", "{", "int a;", "() {", "(a) {}")
_STAND_INS = {
    "bash": ("a", "a; then", "a; do", "then", "do", "fi", "done", ";;", "a)", "esac"),
    "css": ("a", "a: b;", "b;", ": b;", "a {", "a {}", "{"),
    "html": ("a", "a>", ">", "<a>", "</a>", '"a"', "/>"),
    "json": ('"a"', "1", '"a": 1', '"a": 1,', "1,", ": 1", ", 1"),
    "python": ("a", "a:", "pass", "a = 1", ":", "else:", "a,"),
    "rust": (*_OF_BRACES, "fn a() {}", "a: b,", "a => b,", "let a = 1;"),
    "go": (*_OF_BRACES, "func a() {}", "a := 1", "a int"),
    "toml": ("a = 1", "1", '"a"', " = 1", "[a]", "a"),
    "yaml": ("a", "a: b", "- a", ": b", " b"),
}
# A fill that cannot be blamed in this time is not.
_MOST_S = 0.04
# A grammar reads C and C++ before the preprocessor does: a macro is an error, and so is a part of a
# condition. Of 400 true texts of a library 20 were blamed without this.
_PREPROCESSED = frozenset(("c", "cpp"))
_MACRO = re.compile(r"[A-Z]{3}|\b[A-Z][A-Z0-9_]{2,}\b|^[ \t]*#", re.MULTILINE)
_MOST_FILL_CHARS = 20_000
# A line that nobody reads; one such can hold a whole document.
_MOST_LINE_CHARS = 20_000
_READ_BYTES = 4096


class _TooLate(Exception):
    """Parsing did not end in time."""


@dataclass(frozen=True)
class _Errors:
    """What does not fit in a parsed text: how often, and at which bytes."""

    ranges: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return len(self.ranges)

    def touch(self, start: int, end: int) -> bool:
        """Whether one overlaps `[start, end)` or borders on it."""
        return any(first <= end and last >= start for first, last in self.ranges)


class SyntaxTrees:
    """The text around a gap, as tree-sitter reads it.

    Args:
        prefix, suffix: of the document, with LF line ends. language: as `language_of` names it.
        likely: texts that may stand in the gap, such as the one that stood there.
        closers: of the brackets left open in the gap's line.
    """

    def __init__(
        self,
        prefix: str,
        suffix: str,
        language: str | None,
        *,
        likely: tuple[str, ...] = (),
        closers: str = "",
    ) -> None:
        self._language = language or ""
        self._likely = likely
        self._closers = closers
        part = parsable_part(prefix, suffix, language)
        if part is not None and _line_chars(*part) > _MOST_LINE_CHARS:
            part = None
        self._prefix, self._suffix = (_bytes(text) for text in part or ("", ""))
        self._is_judged = part is not None and self._language in _GRAMMARS
        self._line = prefix[prefix.rfind("\n") + 1 :]
        self._row = self._prefix.count(b"\n")
        self._column = len(self._prefix) - (self._prefix.rfind(b"\n") + 1)
        self._fewest: int | None = None
        self._bare: Tree | None = None

    def is_broken_by(self, fill: str, until: float | None = None) -> bool:
        """Whether the text is more broken with this fill than with some other one.

        Args:
            fill: to be judged. until: reading of `time.monotonic()` after which nothing is said.
        """
        if not self._is_judged or len(fill) > _MOST_FILL_CHARS:
            return False
        if self._language in _PREPROCESSED and _MACRO.search(self._line + fill):
            return False
        language = _grammar(self._language)
        if language is None:
            return False
        latest = time.monotonic() + _MOST_S
        until = latest if until is None else min(latest, until)
        try:
            return self._is_broken_by(language, fill, until)
        except _TooLate:
            return False

    def _is_broken_by(self, language: "Language", fill: str, until: float) -> bool:
        if not self._errors(language, fill, until).count:
            return False
        # What is read anew in part is not always read as from the start.
        found = self._errors(language, fill, until, anew=True)
        fewest = self._fewest_errors(language, until)
        if found.count <= fewest:
            return False
        if not fewest or self._language in _PREPROCESSED:
            return not fewest
        # Broken elsewhere as well: a fault that the fill makes shows in its lines or in the next.
        start = self._prefix.rfind(b"\n") + 1
        end = len(self._prefix) + len(_bytes(fill))
        next_end = self._suffix.find(b"\n", self._suffix.find(b"\n") + 1)
        return found.touch(start, end + max(0, next_end))

    def _fewest_errors(self, language: "Language", until: float) -> int:
        """Errors with the text that fits best of those tried."""
        if self._fewest is not None:
            return self._fewest
        fewest: int | None = None
        for text in self._stand_ins():
            count = self._errors(language, text, until).count
            fewest = count if fewest is None else min(fewest, count)
            if not fewest:
                break
        assert fewest is not None
        self._fewest = fewest
        return fewest

    def _stand_ins(self) -> Iterator[str]:
        yield ""
        yield from self._likely
        texts = _STAND_INS.get(self._language, _OF_BRACES)
        yield from texts
        if self._closers:
            for text in ("", *texts[:3]):
                for end in ("", ";", ":", " {"):
                    yield f"{text}{self._closers}{end}"

    def _errors(
        self, language: "Language", fill: str, until: float, *, anew: bool = False
    ) -> _Errors:
        middle = _bytes(fill)
        tree = None
        if not anew:
            if self._bare is None:
                self._bare = _parse(language, self._prefix + self._suffix, until)
            tree = self._bare.copy()
            at = len(self._prefix)
            rows = middle.count(b"\n")
            last = len(middle) - (middle.rfind(b"\n") + 1)
            tree.edit(
                start_byte=at,
                old_end_byte=at,
                new_end_byte=at + len(middle),
                start_point=(self._row, self._column),
                old_end_point=(self._row, self._column),
                new_end_point=(self._row + rows, last if rows else self._column + last),
            )
        text = self._prefix + middle + self._suffix
        return _Errors(
            tuple(_faults(_parse(language, text, until, tree).root_node, self._language))
        )


@functools.cache
def _grammar(language: str) -> "Language | None":
    """A grammar; None, and one line in the log, where it cannot be loaded."""
    package, function = _GRAMMARS[language]
    try:
        from tree_sitter import Language

        return Language(getattr(importlib.import_module(package), function)())
    except (ImportError, AttributeError, OSError, ValueError, TypeError) as error:
        log.warning("no syntax check of %s: %s does not load: %s", language, package, error)
        return None


def _parse(language: "Language", text: bytes, until: float, old: "Tree | None" = None) -> "Tree":
    from tree_sitter import Parser

    view = memoryview(text)

    def read(at: int, _: object) -> memoryview:
        return view[at : at + _READ_BYTES]

    def is_late(_: int, __: bool) -> bool:
        return time.monotonic() >= until

    parser = Parser(language)
    try:
        if old is None:
            return parser.parse(read, progress_callback=is_late)
        return parser.parse(read, old, progress_callback=is_late)
    except ValueError:
        raise _TooLate from None


def _faults(root: "Node", language: str) -> Iterator[tuple[int, int]]:
    """Where something is missing or fits nowhere."""
    is_html = language == "html"
    nodes = [root]
    while nodes:
        node = nodes.pop()
        # The grammar of HTML has a name for an end without a start.
        if node.is_error or node.is_missing or node.type == "erroneous_end_tag":
            yield node.start_byte, node.end_byte
        nodes.extend(child for child in node.children if is_html or child.has_error)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _line_chars(prefix: str, suffix: str) -> int:
    """Characters of the gap's line without the fill."""
    end = suffix.find("\n")
    return len(prefix) - prefix.rfind("\n") + (len(suffix) if end < 0 else end)
