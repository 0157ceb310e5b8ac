"""What is never context, whoever sends it: files that programs keep secrets in, and private keys.

Editors send what is open, and a key file or an environment file may well be.
"""

import logging
import re
from dataclasses import replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infilld.engine.request import InfillRequest

log = logging.getLogger(__name__)

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


def is_secret_path(path: str) -> bool:
    """Whether a path, of whatever system or as an address, is named as a secret is."""
    *folders, name = re.split(r"[/\\]", path.lower())
    return any(fnmatch(name, pattern) for pattern in SECRET_NAMES) or not SECRET_FOLDERS.isdisjoint(
        folders
    )


def holds_private_key(text: str) -> bool:
    """Whether a text has a private key in it."""
    return _PRIVATE_KEY.search(text) is not None


def without_secrets(request: "InfillRequest") -> "InfillRequest":
    """The request without the context that looks secret."""
    kept = tuple(
        each
        for each in request.context
        if not is_secret_path(each.path) and not holds_private_key(each.text)
    )
    if len(kept) == len(request.context):
        return request
    log.info("left out %d files of the context: secret", len(request.context) - len(kept))
    return replace(request, context=kept)
