"""Does a fill break the document? The names that the engine knew before `engine.silence`."""

from infilld.engine.languages import STARTER_LANGUAGE, language_of
from infilld.engine.silence.python import PythonText, parses

__all__ = ["Surroundings", "is_python", "parses"]


def is_python(path: str | None, language: str | None) -> bool:
    """Whether a document is Python, as far as is told; unnamed documents count as Python."""
    return language_of(path, language, unnamed=STARTER_LANGUAGE) == "python"


class Surroundings:
    """The text around a gap, and what may stand in it.

    Args:
        prefix, suffix: of the document, with LF line ends.
        is_python: other languages are not judged.
    """

    def __init__(self, prefix: str, suffix: str, *, is_python: bool = True) -> None:
        self._python = PythonText(prefix, suffix) if is_python else None

    def are_broken_by(self, fill: str) -> bool:
        """Whether the document parses with some other line there, but not with this fill."""
        return self._python is not None and self._python.is_broken_by(fill)
