"""Does a fill break the document? Asked of Python's own parser.

A document is often broken elsewhere while it is being written. Then nothing can be said: only where
the text around the gap would parse with some ordinary line in its place is a fill to blame.
"""

import ast
import functools
import time
import warnings

# Longer documents would hold up the device: 100 kB take about 60 ms to parse.
_MOST_CHARS = 100_000
# Lines that may stand where the gap's lines stand, whatever is around them.
_STAND_INS = (
    "pass",
    "_,",
    "_: _,",
    "if 0: pass",
    "try: pass",
    "else:",
    "except Exception:",
    "finally:",
    "case _:",
    ")",
    "]",
    "}",
    '"""',
    "",
)
# A fill that cannot be blamed in this time is not.
_MOST_S = 0.2


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
        until = time.monotonic() + _MOST_S
        for line in (_headers(indent, behind), *_STAND_INS):
            if time.monotonic() >= until:
                break
            if parses(f"{start}{indent}{line}\n{behind}"):
                return True
        return False


def _headers(indent: str, behind: str) -> str:
    """Block headers that lead from an indent to that of the text behind; "pass" where none do."""
    line = next((line for line in behind.split("\n") if line.strip()), "")
    deeper = len(line) - len(line.lstrip()) - len(indent)
    headers = [" " * more + "if 0:" for more in range(0, deeper, 4)]
    return f"\n{indent}".join(headers) or "pass"
