"""The daemon's log: how records are written, where to, and how the verb `logs` shows them.

Only the first line of a record begins like one, whatever is in it, so nothing that a client sends
can forge another. Source text is no part of it: messages of errors that may quote what was sent are
left out unless `log_prompts` asks for them.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TextIO

from infilld.server.process import tracebacks
from infilld.server.settings import Settings
from infilld.server.verbs.flags import MANY, whole

LIMIT_BYTES = 1 << 20
KEPT_FILES = 3
_POLL_S = 0.2
_MARK = "    | "

job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
"""The job of the request that is being answered."""
route: ContextVar[str | None] = ContextVar("route", default=None)
"""The route by which it came."""

_CONTROLS = (*range(32), *range(0x7F, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
# Controls, line ends of every script, and what turns the direction of writing.
_ESCAPES = {code: f"\\u{code:04x}" for code in _CONTROLS} | {9: "\\t", 10: "\\n", 13: "\\r"}


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message`, in local time; further lines and a traceback are marked.

    `shows_all`: messages of all errors are shown.
    """

    def __init__(self, *, shows_all: bool) -> None:
        super().__init__()
        self._shows_all = shows_all

    def format(self, record: logging.LogRecord) -> str:
        """The record as lines of which only the first looks like a record."""
        at = datetime.fromtimestamp(record.created).isoformat(" ", "milliseconds")
        lines = f"{at} {record.levelname} {record.name}: {record.getMessage()}".split("\n")
        trace = _trace(record, shows_all=self._shows_all)
        lines += [] if trace is None else trace.split("\n")
        return f"\n{_MARK}".join(map(_one_line, lines))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message; job, route, exception.

    `shows_all`: messages of all errors are shown.
    """

    def __init__(self, *, shows_all: bool) -> None:
        super().__init__()
        self._shows_all = shows_all

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of ASCII."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat("T", "milliseconds")
        told = {
            "time": at.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "job": getattr(record, "job", None) or job_id.get(),
            "route": route.get(),
        }
        told["exception"] = _trace(record, shows_all=self._shows_all)
        return json.dumps({key: value for key, value in told.items() if value is not None})


def _trace(record: logging.LogRecord, *, shows_all: bool) -> str | None:
    error = record.exc_info[1] if record.exc_info else None
    return None if error is None else tracebacks.of(error, with_messages=shows_all)


def _one_line(text: str) -> str:
    return text.translate(_ESCAPES)


class RotatingLog(RotatingFileHandler):
    """The log file, its owner's alone; moved away when it has grown, while the daemon runs.

    `takes_stderr`: stderr and stdout are this file already, and go along with it; so a crash that
    logging knows nothing of is written there.
    """

    def __init__(self, path: Path, takes_stderr: bool, limit_bytes: int) -> None:
        self._takes_stderr = takes_stderr
        super().__init__(
            path,
            maxBytes=limit_bytes,
            backupCount=KEPT_FILES,
            encoding="utf-8",
            # A lone surrogate must not lose the record.
            errors="backslashreplace",
            delay=True,
        )

    def _open(self) -> TextIO:  # type: ignore[override]  # it is a TextIOWrapper
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if self._takes_stderr:
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        return os.fdopen(descriptor, "a", encoding=self.encoding, errors=self.errors)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Lose the record: a full disk must neither end the daemon nor fill its stderr."""


def to_stderr(settings: Settings) -> None:
    """Write records to stderr, after the settings."""
    _install(settings, logging.StreamHandler(sys.stderr))


def to_file(settings: Settings, limit_bytes: int = LIMIT_BYTES) -> None:
    """Write records to the log file too, or only there where stderr is that file.

    It is moved away when it holds `limit_bytes`. Only the daemon that holds the lock may call this:
    two would move the file away under each other.
    """
    is_stderr = _is_stderr(settings.log_file)
    if is_stderr:
        logging.root.handlers.clear()
    _install(settings, RotatingLog(settings.log_file, is_stderr, limit_bytes))


def _install(settings: Settings, handler: logging.Handler) -> None:
    kind = JsonFormatter if settings.log_format == "json" else TextFormatter
    handler.setFormatter(kind(shows_all=settings.log_prompts))
    logging.root.addHandler(handler)
    logging.root.setLevel(settings.log_level.upper())


def _is_stderr(path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(2), path.stat())
    except OSError:
        return False


# The verb.


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument(
        "-n", "--lines", type=whole(0, MANY), default=100, metavar="N", help="how many lines"
    )
    parser.add_argument("-f", "--follow", action="store_true", help="go on as the log grows")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(options: argparse.Namespace, wanted: Settings) -> int:
    """Print the end of the log; returns the exit code. `--follow` ends when interrupted."""
    show = _as_json if options.json else str
    path = wanted.log_file
    if not path.exists() and not options.follow:
        sys.stderr.write(f"infilld: no log at {path}\n")
        return 0
    length_bytes = path.stat().st_size if path.exists() else 0
    for line in last_lines(path, options.lines, length_bytes):
        sys.stdout.write(show(line) + "\n")
    sys.stdout.flush()
    if options.follow:
        for line in following(path, length_bytes):
            sys.stdout.write(show(line) + "\n")
            sys.stdout.flush()
    return 0


def last_lines(path: Path, count: int, length_bytes: int) -> list[str]:
    """The last lines of so many bytes; of files that were moved away too where that is too few."""
    lines: list[str] = []
    for number in range(KEPT_FILES + 1):
        older = path.with_name(f"{path.name}.{number}") if number else path
        missing = count - len(lines)
        if missing <= 0 or not older.exists():
            break
        said = older.read_bytes()[: None if number else length_bytes].decode("utf-8", "replace")
        lines = said.split("\n")[:-1][-missing:] + lines
    return lines


def following(
    path: Path,
    start_bytes: int,
    *,
    is_over: Callable[[], bool] = lambda: False,
    poll_s: float = _POLL_S,
) -> Iterator[str]:
    """Yield lines behind so many bytes as they are written, through every change of the file.

    `is_over`: asked after every look, whether it was the last one.
    """
    file: TextIO | None = None
    rest = ""
    try:
        while True:
            if file is None and path.exists():
                file = path.open(encoding="utf-8", errors="replace", newline="")
                file.seek(start_bytes)
                start_bytes = 0
            # Asked before reading: what is in a file that was moved away is read to its end.
            is_last, was_moved = is_over(), file is not None and not _is_at(file, path)
            while file is not None and (chunk := file.read(1 << 16)):
                *lines, rest = (rest + chunk).split("\n")
                yield from lines
            if is_last:
                return
            if file is not None and was_moved:
                file.close()
                file = None
                continue
            time.sleep(poll_s)
    finally:
        if file is not None:
            file.close()


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether the open file is still the one of this name, and was not cut."""
    try:
        found = path.stat()
    except OSError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), found) and found.st_size >= file.tell()


_RECORD = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) ([A-Z]+) ([\w.-]+): (.*)", re.DOTALL)


def _as_json(line: str) -> str:
    """A line as a JSON object, whichever way it was written."""
    if line.startswith("{"):
        try:
            return json.dumps(json.loads(line))
        except ValueError:
            pass
    found = _RECORD.fullmatch(line)
    if found is None:
        return json.dumps({"message": line})
    at, level, logger, message = found.groups()
    utc = datetime.fromisoformat(at).astimezone(UTC).isoformat("T", "milliseconds")
    told = {"time": utc.replace("+00:00", "Z"), "level": level.lower()}
    return json.dumps(told | {"logger": logger, "message": message})
