"""Other files that go along with a request, and those that had better not."""

import os
from pathlib import Path

from infilld.server import wire
from infilld.server.confidential import holds_private_key, is_secret_path
from infilld.server.verbs.document import Document, DocumentProblem

MAX_BYTES = 1_000_000


def read(path: Path) -> wire.ContextItem:
    """The text of a file that goes along.

    Raises:
        DocumentProblem: it looks secret, is no text, is larger than `MAX_BYTES`, or cannot be read.
    """
    if looks_secret(path):
        raise _secret(path)
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        raise DocumentProblem(f"cannot read {path}: {error.strerror}") from error
    # A pipe would be waited for, and could be endless.
    if not path.is_file():
        raise DocumentProblem(f"{path} is no file", remedy="Give --context a text file.")
    if size_bytes > MAX_BYTES:
        raise DocumentProblem(
            f"{path} has {size_bytes} bytes, --context takes up to {MAX_BYTES}",
            remedy="Give the part that matters as a file of its own.",
        )
    text = Document.read(path).text
    if holds_private_key(text):
        raise _secret(path)
    return wire.ContextItem(path=shown(path), text=text, kind="open")


def looks_secret(path: Path) -> bool:
    """Whether the name of a file, or of what a link leads to, is one of a secret."""
    return any(
        is_secret_path(str(place)) for place in (path.absolute(), Path(os.path.realpath(path)))
    )


def shown(path: Path) -> str:
    """A path as text; bytes that are none become the replacement character."""
    return str(path).encode(errors="surrogateescape").decode(errors="replace")


def _secret(path: Path) -> DocumentProblem:
    return DocumentProblem(
        f"{path} looks like a secret", remedy="Leave it out, or give a copy without what is secret."
    )
