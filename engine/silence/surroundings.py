"""When to be silent: what speaks against a fill, told by its text and the text around it alone.

Where nothing can be said, nothing is: an objection takes away something that may be right.
"""

import functools
import time
from dataclasses import dataclass
from typing import Literal

from infilld.engine.silence.brackets import Brackets, Faults
from infilld.engine.silence.lines import Lines
from infilld.engine.silence.markup import Markup
from infilld.engine.silence.overlap import Overlap
from infilld.engine.silence.python import PythonText
from infilld.engine.silence.repetition import repetition
from infilld.engine.silence.trees import SyntaxTrees

Fault = Literal["repeats_suffix", "repeats_prefix", "repetition", "unbalanced", "does_not_parse"]

# Languages whose blocks start with a brace at the end of a line.
_OF_BRACES = frozenset(("c", "cpp", "css", "go", "java", "javascript", "rust", "tsx", "typescript"))


@dataclass(frozen=True)
class Objection:
    """Why a fill should not be shown: a code, and a sentence for the user."""

    reason: Fault
    why: str


class Surroundings:
    """The text around a gap, and what may stand in it.

    Args:
        prefix, suffix: of the document, with LF line ends.
        language: as `language_of` names it; None: unknown, then lines alone are compared.
        replaced: the selected text that a fill stands in for.
    """

    def __init__(
        self, prefix: str, suffix: str, *, language: str | None, replaced: str = ""
    ) -> None:
        self._prefix, self._suffix = prefix, suffix
        self._language, self._replaced = language, replaced

    def trimmed(self, fill: str) -> str:
        """The fill without what the suffix says anyway, and without blanks at a line's end.

        That is whole lines that follow, and closing text such as `):` where the brackets are
        better off without it. Trimming twice changes nothing more.
        """
        return self._overlap.trimmed(fill)

    def objection(self, fill: str, *, until: float | None = None) -> Objection | None:
        """What speaks against a fill, judged as `trimmed`; None: nothing.

        Args:
            fill: with LF line ends. until: reading of `time.monotonic()` after which nothing is
                parsed.
        """
        if not fill.strip():
            return None
        if why := self._overlap.repeated_suffix(fill):
            return Objection("repeats_suffix", why)
        fill = self.trimmed(fill)
        if why := self._overlap.repeated_prefix(fill):
            return Objection("repeats_prefix", why)
        if why := repetition(fill, self._lines):
            return Objection("repetition", why)
        # The end of an opened block is still to be written.
        if self._opens_block(fill):
            fill = f"{fill}\n}}"
        if why := self._unbalanced(fill):
            return Objection("unbalanced", why)
        if self._is_broken_by(fill, until):
            return Objection("does_not_parse", "The text would break the syntax around it.")
        return None

    @functools.cached_property
    def _lines(self) -> Lines:
        return Lines.around(self._prefix, self._suffix)

    @functools.cached_property
    def _brackets(self) -> Brackets:
        return Brackets(self._prefix, self._suffix, self._language)

    @functools.cached_property
    def _overlap(self) -> Overlap:
        return Overlap(self._lines, self._brackets, self._language)

    @functools.cached_property
    def _python(self) -> PythonText:
        return PythonText(self._prefix, self._suffix)

    @functools.cached_property
    def _trees(self) -> SyntaxTrees:
        return SyntaxTrees(
            self._prefix,
            self._suffix,
            self._language,
            likely=(self._replaced,) if self._replaced else (),
            closers=self._brackets.line_closers,
        )

    @functools.cached_property
    def _markup(self) -> Markup:
        return Markup(self._prefix, self._suffix, self._language)

    @functools.cached_property
    def _as_it_was(self) -> tuple[Faults, ...]:
        return self._without_fill(self._brackets)

    @functools.cached_property
    def _markup_as_it_was(self) -> tuple[Faults, ...]:
        return self._without_fill(self._markup)

    def _without_fill(self, scanner: Brackets | Markup) -> tuple[Faults, ...]:
        """What has no partner with nothing in the gap, and with what stood there."""
        texts = ("", self._replaced) if self._replaced else ("",)
        return tuple(found for text in texts if (found := scanner.faults(text)) is not None)

    def _opens_block(self, fill: str) -> bool:
        """Whether the last brace of a fill starts a block that nothing ends yet."""
        if self._language not in _OF_BRACES or not self._lines.is_tail or not fill.endswith("{"):
            return False
        opened, closed = self._brackets.faults(fill), self._brackets.faults(f"{fill}\n}}")
        return opened is not None and closed is not None and closed.total < opened.total

    def _unbalanced(self, fill: str) -> str | None:
        found = self._brackets.faults(fill)
        if found is not None and (why := _excess(found, self._as_it_was, "bracket")):
            return why
        found = self._markup.faults(fill)
        return None if found is None else _excess(found, self._markup_as_it_was, self._markup.kind)

    def _is_broken_by(self, fill: str, until: float | None) -> bool:
        if until is not None and time.monotonic() >= until:
            return False
        if self._trees.is_broken_by(fill, until):
            return True
        if until is not None and time.monotonic() >= until:
            return False
        return self._language == "python" and self._python.is_broken_by(fill)


def _excess(found: Faults, as_it_was: tuple[Faults, ...], kind: str) -> str | None:
    """What has no partner only since the fill; None: nothing, or that cannot be said."""
    if not found.total or not as_it_was or any(map(found.is_within, as_it_was)):
        return None
    least = as_it_was[0]
    # What a comment or a quote swallows has no partner either.
    if found.quotes > least.quotes and kind != "bracket":
        return "The text leaves a quote, a code span, a tag or a comment open."
    if found.openers > least.openers:
        return f"The text opens a {kind} that nothing closes."
    if found.closers > least.closers:
        return f"The text closes a {kind} that nothing opens."
    return "The text leaves a string or a comment open."
