"""How code is shown to a model that answers questions: in fences, with marks, under titles."""

import re
from collections.abc import Mapping

from infilld.engine.request import ContextKind

TITLES: Mapping[ContextKind, str] = {
    "open": "From {}",
    "recent": "Edited before, in {}",
    "definition": "Defined in {}",
    "diagnostic": "Reported for {}",
    "clipboard": "Copied from {}",
}


def fence_for(*texts: str) -> str:
    """Backticks that no line of the texts closes earlier than it should."""
    runs = (len(run) for text in texts for run in re.findall("`{3,}", text))
    return "`" * (max(runs, default=2) + 1)


def tag_of(path: str | None, language: str | None) -> str:
    """Word behind a fence: the language, else the ending of the path; empty where none fits."""
    ending = (path or "").rpartition(".")[2] if "." in (path or "") else ""
    word = language or ending
    return word if re.fullmatch(r"[\w+#.-]{1,32}", word) else ""


def marks_for(name: str, document: str) -> tuple[str, str]:
    """Texts that mark the two ends of a place in a document, and do not occur in it."""
    found, count = name, 1
    while f"<{found}>" in document or f"</{found}>" in document:
        count += 1
        found = f"{name}-{count}"
    return f"<{found}>", f"</{found}>"
