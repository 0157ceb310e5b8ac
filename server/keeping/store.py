"""The file of the statistics: answers and feedback in SQLite, and what is counted from them.

No source text and no paths: kinds, reasons, counts and times alone. Times `at` are Unix time in s.
"""

import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from infilld.server.keeping.outcomes import Outcome
from infilld.server.settings import Problem

VERSION = 1
KEPT_S = 90 * 86_400.0
KEPT_ROWS = 200_000
_BUSY_S = 2.0
# Somebody waits for a report, and nobody for a row.
_READ_BUSY_S = 0.5
_WEEK_S = 7 * 86_400.0

# MIGRATIONS[v] makes version v + 1 of version v.
MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE answers (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL, at REAL NOT NULL, route TEXT NOT NULL,
        kind TEXT NOT NULL, language TEXT, reason TEXT NOT NULL, is_failure INTEGER NOT NULL,
        passes INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL,
        text_tokens INTEGER NOT NULL, queue_ms REAL NOT NULL, encode_ms REAL NOT NULL,
        denoise_ms REAL NOT NULL, total_ms REAL NOT NULL, choices INTEGER NOT NULL,
        chars INTEGER NOT NULL
    );
    CREATE INDEX answers_at ON answers (at);
    CREATE INDEX answers_ms ON answers (kind, total_ms, at)
        WHERE NOT is_failure AND reason <> 'superseded';
    CREATE TABLE feedback (
        number INTEGER PRIMARY KEY, answer TEXT NOT NULL, at REAL NOT NULL, event TEXT NOT NULL,
        choice INTEGER NOT NULL, chars INTEGER
    );
    CREATE INDEX feedback_at ON feedback (at);
    """,
)


class NewerFile(Problem):
    """A newer infilld wrote the file."""

    code = "newer_statistics"


@dataclass(frozen=True)
class Told:
    """A client's word: what became of choice number `choice` of an answer; `chars` were used."""

    answer: str
    at: float
    event: str
    choice: int
    chars: int | None


Record = Outcome | Told


class Store:
    """One connection to the file, for one thread; made where it is absent.

    Raises:
        sqlite3.Error, OSError: it cannot be opened. NewerFile: it must not be.
    """

    def __init__(self, path: Path) -> None:
        # Before SQLite: its other files get the permissions of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._link = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        try:
            found = self._link.execute("PRAGMA user_version").fetchone()[0]
            if found > VERSION:
                raise NewerFile(
                    f"{path} has version {found}, and this infilld knows {VERSION}",
                    remedy="Update infilld, or move the file away.",
                )
            self._link.execute("PRAGMA journal_mode = WAL")
            # A crash of the machine may lose the last rows, one of the process none.
            self._link.execute("PRAGMA synchronous = NORMAL")
            if found < VERSION:
                self._migrate(found)
        except BaseException:
            self._link.close()
            raise

    def add(self, records: Sequence[Record]) -> None:
        """Add rows in one transaction.

        Raises:
            sqlite3.Error: none was added.
        """
        answers = [_answer_row(each) for each in records if isinstance(each, Outcome)]
        told = [_told_row(each) for each in records if isinstance(each, Told)]
        with self._transaction():
            self._link.executemany(_insert("answers", 17), answers)
            self._link.executemany(_insert("feedback", 5), told)

    def prune(self, *, now: float, kept_rows: int = KEPT_ROWS) -> None:
        """Drop what is older than `KEPT_S`, and the oldest of more than `kept_rows`."""
        with self._transaction():
            for table in ("answers", "feedback"):
                self._link.execute(f"DELETE FROM {table} WHERE at < ?", (now - KEPT_S,))
                newest = f"SELECT MAX(number) FROM {table}"
                self._link.execute(
                    f"DELETE FROM {table} WHERE number <= ({newest}) - ?", (kept_rows,)
                )

    def close(self) -> None:
        """Close the file; harmless twice."""
        with suppress(sqlite3.Error):
            self._link.close()

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._link)

    def _migrate(self, found: int) -> None:
        """From one version to the newest, in one step."""
        with self._transaction():
            for step in MIGRATIONS[found:]:
                for statement in filter(str.strip, step.split(";")):
                    self._link.execute(statement)
            self._link.execute(f"PRAGMA user_version = {VERSION}")


class _Transaction:
    def __init__(self, link: sqlite3.Connection) -> None:
        self._link = link

    def __enter__(self) -> None:
        self._link.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            try:
                self._link.execute("COMMIT")
                return
            except sqlite3.Error:
                self._roll_back()
                raise
        self._roll_back()

    def _roll_back(self) -> None:
        # A full disk may have rolled it back by itself.
        with suppress(sqlite3.Error):
            self._link.execute("ROLLBACK")


def is_damaged(error: BaseException) -> bool:
    """Whether the error says that the file is no database, or not a whole one."""
    code = getattr(error, "sqlite_errorcode", None)
    # The low byte is the primary code; extended ones add detail.
    return code is not None and code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, and drop what SQLite kept beside it; returns its new name.

    Raises:
        OSError: it cannot be renamed.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    aside = path.with_name(f"{path.name}.damaged-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{stamp}-{number}")
    path.rename(aside)
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    return aside


def report(path: Path, *, now: float | None = None) -> dict[str, object]:
    """What the file says of today (since midnight), the last 7 days, and all that is kept.

    Each is a mapping:

    answers: jobs that ended with a result, an empty one or a superseded one too.
    p50_ms, p95_ms: by kind, nearest-rank centiles of the time from arrival to the answer;
        superseded jobs are left out.
    shown, inserted, partly, dismissed, retained: answers of which a client said so at least once.
        `retained` were inserted and still stood there later.
    acceptance: share of the answers inserted, wholly or partly, among those shown; one that was
        inserted or dismissed was shown. None: no client said anything.
    abstentions: by reason, answers without a text. errors: by code, jobs that failed.
    chars_inserted: code points inserted, at most once for each answer.

    Raises:
        sqlite3.Error: the file cannot be read.
    """
    now = time.time() if now is None else now
    midnight = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
    windows = {"today": midnight.timestamp(), "week": now - _WEEK_S, "total": 0.0}
    # immutable would miss the write-ahead log; mode=ro makes no file where there is none.
    address = f"{path.absolute().as_uri()}?mode=ro"
    with closing(
        sqlite3.connect(address, uri=True, timeout=_READ_BUSY_S, isolation_level=None)
    ) as link:
        # All of it as of one moment.
        link.execute("BEGIN")
        return {name: _window(link, since) for name, since in windows.items()}


def _window(link: sqlite3.Connection, since: float) -> dict[str, object]:
    (answers,) = link.execute(
        "SELECT COUNT(*) FROM answers WHERE at >= ? AND NOT is_failure", (since,)
    ).fetchone()
    kinds = link.execute(_KINDS, (since,)).fetchall()
    reasons = link.execute(_REASONS, (since,)).fetchall()
    events = dict(link.execute(_EVENTS, (since,)).fetchall())
    seen, taken, chars = link.execute(_TAKEN, (since,)).fetchone()
    return {
        "answers": answers,
        "p50_ms": {kind: _ms(link, kind, since, (number + 1) // 2) for kind, number in kinds},
        "p95_ms": {
            kind: _ms(link, kind, since, (95 * number + 99) // 100) for kind, number in kinds
        },
        **{name: events.get(name, 0) for name in _EVENT_NAMES},
        "acceptance": taken / seen if seen else None,
        "abstentions": _counts(reasons, is_failure=False),
        "errors": _counts(reasons, is_failure=True),
        "chars_inserted": chars or 0,
    }


def _ms(link: sqlite3.Connection, kind: str, since: float, rank: int) -> float:
    """Time of the answer that is so many-th when they are sorted, counted from 1."""
    ms: float = link.execute(_MS_AT_RANK, (kind, since, rank - 1)).fetchone()[0]
    return ms


def _counts(rows: Sequence[tuple[str, int, int]], *, is_failure: bool) -> Mapping[str, int]:
    return {reason: count for reason, failed, count in rows if failed == is_failure}


_EVENT_NAMES = ("shown", "inserted", "partly", "dismissed", "retained")
# The terms are spelled as those of the index, which SQLite then reads in order: nothing is sorted.
_TIMED = "at >= ? AND NOT is_failure AND reason <> 'superseded'"
_KINDS = f"SELECT kind, COUNT(*) FROM answers WHERE {_TIMED} GROUP BY kind"
_MS_AT_RANK = f"""
    SELECT total_ms FROM answers WHERE kind = ? AND {_TIMED} ORDER BY total_ms LIMIT 1 OFFSET ?
"""
_REASONS = """
    SELECT reason, is_failure, COUNT(*) FROM answers
    WHERE at >= ? AND (is_failure OR (choices = 0 AND kind <> 'warm')) GROUP BY reason, is_failure
"""
_EVENTS = """
    SELECT event, COUNT(DISTINCT answer) FROM feedback WHERE at >= ? GROUP BY event
"""
_TAKEN = """
    SELECT SUM(is_seen), SUM(is_taken), SUM(chars) FROM (
        SELECT MAX(event <> 'retained') AS is_seen,
            MAX(event IN ('inserted', 'partly')) AS is_taken,
            MAX(CASE WHEN event IN ('inserted', 'partly') THEN chars END) AS chars
        FROM feedback WHERE at >= ? GROUP BY answer)
"""


def _insert(table: str, columns: int) -> str:
    return f"INSERT INTO {table} VALUES (NULL{', ?' * columns})"


def _answer_row(got: Outcome) -> tuple[object, ...]:
    used, spent = got.usage, got.timings
    return (
        *(got.id, got.at, got.route, got.kind, got.language, got.reason, got.is_failure),
        *(used.passes, used.prompt_tokens, used.cached_tokens, used.text_tokens),
        *(spent.queue_ms, spent.encode_ms, spent.denoise_ms, spent.total_ms),
        *(len(got.chars), got.chars[0] if got.chars else 0),
    )


def _told_row(got: Told) -> tuple[object, ...]:
    return (got.answer, got.at, got.event, got.choice, got.chars)
