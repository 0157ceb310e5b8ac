"""Other files that go along with a request, and those that had better not."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from infilld.server import wire
from infilld.server.verbs.document import Document, DocumentProblem

MAX_BYTES = 1_000_000
# Told by name, lower case: what programs keep passwords, keys and tokens in.
SECRET_NAMES = (
    *(".env", ".env.*", "*.env", ".secrets", "secrets.y*ml", "secrets.json", "secrets.toml"),
    *("credentials", "credentials.json", "credentials.csv"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.asc", "*.gpg"),
    *("id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "id_*_sk"),
    *(".netrc", "_netrc", ".pgpass", ".htpasswd", ".npmrc", ".pypirc", ".git-credentials"),
)
SECRET_FOLDERS = frozenset({".ssh", ".gnupg", ".aws"})
_PRIVATE_KEY = re.compile("-----BEGIN [A-Z0-9 ]*PRIVATE KEY")


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
    if _PRIVATE_KEY.search(text):
        raise _secret(path)
    return wire.ContextItem(path=shown(path), text=text, kind="open")


def looks_secret(path: Path) -> bool:
    """Whether the name of a file, or of what a link leads to, is one of a secret."""
    places = (path.absolute(), Path(os.path.realpath(path)))
    return any(
        fnmatch(place.name.lower(), pattern) for place in places for pattern in SECRET_NAMES
    ) or any(part.lower() in SECRET_FOLDERS for place in places for part in place.parts[:-1])


def shown(path: Path) -> str:
    """A path as text; bytes that are none become the replacement character."""
    return str(path).encode(errors="surrogateescape").decode(errors="replace")


def _secret(path: Path) -> DocumentProblem:
    return DocumentProblem(
        f"{path} looks like a secret", remedy="Leave it out, or give a copy without what is secret."
    )
