"""The bearer token: a file of its owner's alone, read anew when it changes, and its verb.

A link in its place is followed for reading and writing, and stays a link.
"""

import argparse
import json
import logging
import os
import re
import secrets
import stat
import sys
from pathlib import Path

from infilld.server.discovery import make_private_folder
from infilld.server.process import files
from infilld.server.settings import Problem, Settings

log = logging.getLogger(__name__)

ACTIONS = ("path", "show", "rotate")
SHORTEST_CHARS = 16
# What may stand behind "Bearer" (RFC 6750, section 2.1).
_LEGAL = re.compile(rb"[A-Za-z0-9._~+/=-]{16,512}")
_MOST_BYTES = 1024
_ROTATE = "Make a new one: infilld token rotate"


class TokenProblem(Problem):
    """There is no token that can be used; the remedy says how to get one."""

    code = "bad_token_file"


class _Missing(TokenProblem):
    """There is no file."""


class _Malformed(TokenProblem):
    """The file holds no token."""


class TokenFile:
    """The token as it stands in its file now.

    Asking costs one `stat`; the file is read when that says it is another.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._token = ""

    def current(self) -> str:
        """The token.

        Raises:
            TokenProblem: the file is missing, cannot be read, or holds none: nobody gets in.
        """
        try:
            told = self.path.stat()
        except OSError as error:
            raise _unreadable(self.path, error) from error
        seen = (told.st_mtime_ns, told.st_ino, told.st_size)
        if seen != self._seen:
            self._token = _read(self.path)
            self._seen = seen
        return self._token


def prepare(path: Path) -> TokenFile:
    """The token file of a daemon that starts: made where it is missing, closed to others.

    Raises:
        TokenProblem: it is no file, cannot be read, or belongs to somebody else.
    """
    try:
        _close_to_others(path)
        _read(path)
    except _Missing:
        _put_new(path)
    except _Malformed as problem:
        log.warning("%s; a new one was made", problem)
        _put_new(path)
    return TokenFile(path)


def rotate(path: Path) -> str:
    """Put a new token in place of the old one, which stops working at once.

    Raises:
        TokenProblem: it cannot be written.
    """
    make_private_folder(path.parent)
    return _put_new(path)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `infilld token`."""
    parser.add_argument(
        "action",
        nargs="?",
        choices=ACTIONS,
        default="path",
        help="say where it is, print it, or put a new one in its place",
    )
    parser.add_argument("--show", action="store_true", help="print the token itself")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, wanted: Settings) -> int:
    """Say where the token is, print it, or make a new one."""
    path = wanted.token_file
    told: dict[str, str] = {"token_file": str(path)}
    if options.action == "rotate":
        rotate(path)
    if options.show or options.action == "show":
        told["token"] = TokenFile(path).current()
    if options.json:
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        sys.stdout.write(told.get("token", told["token_file"]) + "\n")
    if options.action == "rotate":
        sys.stderr.write("The old token no longer works, also with a daemon that runs.\n")
    return 0


def _read(path: Path) -> str:
    try:
        # A pipe in its place must not make us wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            data = os.read(descriptor, _MOST_BYTES).strip() if is_file else b""
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not is_file:
        raise TokenProblem(f"{path} is not a file", remedy=f"Remove it. {_ROTATE}")
    if not _LEGAL.fullmatch(data):
        raise _Malformed(
            f"{path} holds no token: expected {SHORTEST_CHARS} or more letters and digits",
            remedy=_ROTATE,
        )
    return data.decode("ascii")


def _close_to_others(path: Path) -> None:
    try:
        told = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    mode = stat.S_IMODE(told.st_mode)
    if not stat.S_ISREG(told.st_mode) or not mode & 0o077:
        return
    try:
        path.chmod(0o600)
    except OSError as error:
        raise TokenProblem(
            f"{path} is open to others (mode {mode:o}) and cannot be closed: {error.strerror}",
            remedy="Make it yours alone, or remove it.",
        ) from error
    log.warning(
        "%s was open to others (mode %o) and is closed now; if anybody may have read it: "
        "infilld token rotate",
        path,
        mode,
    )


def _put_new(path: Path) -> str:
    token = secrets.token_urlsafe(32)
    try:
        files.put(path, f"{token}\n".encode(), mode=0o600)
    except OSError as error:
        raise TokenProblem(
            f"cannot write {path}: {error.strerror}",
            remedy="Make room, remove what stands there, or choose another with --state-dir.",
        ) from error
    return token


def _unreadable(path: Path, error: OSError) -> TokenProblem:
    kind = _Missing if isinstance(error, FileNotFoundError) else TokenProblem
    return kind(f"cannot read {path}: {error.strerror}", remedy=_ROTATE)
