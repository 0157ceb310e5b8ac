"""When to stay silent without asking the daemon, and why."""

from dataclasses import dataclass

from infilld.lsp.documents import Snapshot, has_lone_surrogate
from infilld.lsp.options import Options


@dataclass(frozen=True)
class Silence:
    """No suggestion: `reason` is a stable code, `why` one sentence without document text."""

    reason: str
    why: str


def silence_for(snapshot: Snapshot, options: Options) -> Silence | None:
    """Return why this document gets no suggestion now; None when nothing speaks against one."""
    length_chars = len(snapshot.text)
    if length_chars > options.max_document_chars:
        return Silence(
            "filtered",
            f"The document has {length_chars} code points, "
            f"maxDocumentChars is {options.max_document_chars}.",
        )
    if has_lone_surrogate(snapshot.text):
        return Silence("filtered", "The document holds half a surrogate pair.")
    return None
