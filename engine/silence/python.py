"""Does a fill break a Python document? Asked of Python's own parser.

A document is often broken elsewhere while it is being written. Then nothing can be said: only where
the text around the gap would parse with some ordinary line in its place is a fill to blame.
"""

import ast
import functools
import time
import warnings

from infilld.engine.silence.lines import parsable_part

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
_MOST_S = 0.1
# A longer line is not judged: it may nest deeper than the parser's stack.
_MOST_FILL_CHARS = 20_000


def parses(source: str) -> bool:
    """Whether Python can parse the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


class PythonText:
    """The text around a gap of a Python document.

    Args:
        prefix, suffix: of the document, with LF line ends.
    """

    def __init__(self, prefix: str, suffix: str) -> None:
        self._part = parsable_part(prefix, suffix, "python")

    def is_broken_by(self, fill: str) -> bool:
        """Whether the document parses with some other line there, but not with this fill."""
        if self._part is None or len(fill) > _MOST_FILL_CHARS:
            return False
        prefix, suffix = self._part
        return not parses(prefix + fill + suffix) and self._can_parse

    @functools.cached_property
    def _can_parse(self) -> bool:
        assert self._part is not None
        prefix, suffix = self._part
        before, _, line = prefix.rpartition("\n")
        indent = line[: len(line) - len(line.lstrip())]
        behind = suffix.partition("\n")[2]
        start = before + "\n" if "\n" in prefix else ""
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
