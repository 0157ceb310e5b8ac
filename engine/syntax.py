"""Does a fill break the document? Asked of Python's own parser.

A document is often broken elsewhere while it is being written. Then nothing can be said: only where
the text around the gap would parse with some ordinary line in its place is a fill to blame.
"""

import ast
import functools
import warnings

# Longer documents would hold up the device: 100 kB take about 60 ms to parse.
_MOST_CHARS = 100_000
# Lines that may stand where the gap's line stands, whatever is around it.
_STAND_INS = (
    "pass",
    "if 0:",
    "_,",
    "_: _,",
    "else:",
    "except Exception:",
    "finally:",
    "case _:",
    "",
)


def is_python(path: str | None, language: str | None) -> bool:
    """Whether a document is Python, as far as is told; unnamed documents count as Python."""
    if language is not None:
        return language.lower() == "python"
    return path is None or path.endswith((".py", ".pyi"))


def parses(source: str) -> bool:
    """Whether Python can parse the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


class Surroundings:
    """The text around a gap, and what may stand in it.

    Args:
        prefix, suffix: of the document, with LF line ends.
        is_python: other languages are not judged.
    """

    def __init__(self, prefix: str, suffix: str, *, is_python: bool = True) -> None:
        self._prefix, self._suffix, self._is_python = prefix, suffix, is_python

    def are_broken_by(self, fill: str) -> bool:
        """Whether the document parses with some other line there, but not with this fill."""
        chars = len(self._prefix) + len(fill) + len(self._suffix)
        if not self._is_python or chars > _MOST_CHARS:
            return False
        if parses(self._prefix + fill + self._suffix):
            return False
        return self._can_parse

    @functools.cached_property
    def _can_parse(self) -> bool:
        before, _, line = self._prefix.rpartition("\n")
        indent = line[: len(line) - len(line.lstrip())]
        behind = self._suffix.partition("\n")[2]
        start = before + "\n" if "\n" in self._prefix else ""
        return any(parses(f"{start}{indent}{line}\n{behind}") for line in _STAND_INS)
