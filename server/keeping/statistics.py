"""Statistics of answers and of what became of them, kept over restarts in SQLite.

A thread of its own writes, so a slow disk never holds a request up; where it is too slow, records
are dropped and counted. Whatever is wrong with the file, the daemon stays up: it says so once in
its log, tells it in `/stats`, and tries again.
"""

import logging
import queue
import sqlite3
import threading
import time
from collections import OrderedDict
from pathlib import Path

from infilld.server.jobs import Event
from infilld.server.keeping import store
from infilld.server.keeping.outcomes import Outcome
from infilld.server.keeping.store import Record, Store, Told

log = logging.getLogger(__name__)

FILE_NAME = "stats.sqlite"
MOST_WAITING = 4096
_BATCH = 512
_RETRY_S = 30.0
_PRUNE_S = 3600.0
_CLOSE_WAIT_S = 1.0
_FLUSH_WAIT_S = 0.5
# Counting 200,000 answers may take a second; it gets a twentieth of the time at most.
_QUICK_S = 0.1
_REST = 20.0
# Feedback names an answer; how long its texts were is known for so many.
_REMEMBERED = 1024


class Statistics:
    """The statistics of one state folder.

    Args:
        path: of the file; it and what SQLite puts beside it are their owner's alone.
        retry_s: seconds until a file that could not be used is tried again.
        most_waiting: records that wait for the disk; more are dropped.
    """

    def __init__(
        self, path: Path, *, retry_s: float = _RETRY_S, most_waiting: int = MOST_WAITING
    ) -> None:
        self.path = path
        self._retry_s = retry_s
        self._waiting: queue.Queue[Record | threading.Event | None] = queue.Queue(most_waiting)
        self._chars: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._store: Store | None = None
        self._why: str | None = None
        self._lost_file: str | None = None
        self._is_refused = self._is_suspect = False
        self._retry_at = self._prune_at = self._report_until = 0.0
        self._report: dict[str, object] = {}
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="infilld-statistics", daemon=True)

    def start(self) -> None:
        """Open the file and begin to write, on a thread; returns at once."""
        self._thread.start()

    def answered(self, outcome: Outcome) -> None:
        """Keep an outcome; returns at once."""
        self._chars[outcome.id] = outcome.chars
        if len(self._chars) > _REMEMBERED:
            self._chars.popitem(last=False)
        self._put(outcome)

    def told(self, job_id: str, event: Event, choice: int, chars: int | None) -> None:
        """Keep a client's word; returns at once. `chars` None: all of the text."""
        known = self._chars.get(job_id, ())
        if chars is None and choice < len(known):
            chars = known[choice]
        self._put(Told(job_id, time.time(), event, choice, chars))

    def status(self) -> dict[str, object]:
        """Whether records are kept, and if not, why; how many were lost."""
        told: dict[str, object] = {
            "state": "kept" if self._why is None else "disabled",
            "why": self._why,
            "file": str(self.path),
            "dropped": self._dropped,
        }
        return told if self._lost_file is None else told | {"damaged_file": self._lost_file}

    def report(self) -> dict[str, object]:
        """As `store.report`, of all that has been told by now; nothing where it cannot be read.

        Blocks for the disk: not for the event loop. One that took long is told again for a while.
        """
        if time.monotonic() < self._report_until:
            return self._report
        self.flush()
        begun = time.monotonic()
        try:
            self._report = store.report(self.path)
            took_s = time.monotonic() - begun
            if took_s > _QUICK_S:
                self._report_until = time.monotonic() + _REST * took_s
            return self._report
        except sqlite3.Error as error:
            if self._why is None:
                log.warning("the statistics cannot be read: %s", error)
            # Whoever writes has pages of its own in memory, and would not notice.
            self._is_suspect = store.is_damaged(error)
            return {}

    def flush(self, timeout_s: float = _FLUSH_WAIT_S) -> bool:
        """Wait until what was told is written, or given up; False: not within the time."""
        written = threading.Event()
        try:
            self._waiting.put(written, timeout=timeout_s)
        except queue.Full:
            return False
        return written.wait(timeout_s)

    def close(self) -> None:
        """Write what waits and close the file; a stuck disk keeps nobody from ending."""
        if not self._thread.is_alive():
            return
        try:
            self._waiting.put(None, timeout=_CLOSE_WAIT_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_WAIT_S)

    def _put(self, record: Record) -> None:
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    # The thread.

    def _run(self) -> None:
        self._write([])
        is_open = True
        while is_open:
            got = [self._waiting.get()]
            while len(got) < _BATCH and not self._waiting.empty():
                got.append(self._waiting.get_nowait())
            is_open = None not in got
            self._write([each for each in got if isinstance(each, (Outcome, Told))])
            for each in got:
                if isinstance(each, threading.Event):
                    each.set()
        if self._store is not None:
            self._store.close()

    def _write(self, records: list[Record]) -> None:
        """Write records, or drop and count them; never raises."""
        is_waiting = self._why is not None and (time.monotonic() < self._retry_at or not records)
        if self._is_refused or is_waiting:
            self._dropped += len(records)
            return
        try:
            self._add(records)
        except Exception as error:
            self._dropped += len(records)
            self._disable(error)
        else:
            if self._why is not None:
                log.info("statistics are kept again in %s", self.path)
            self._why = None

    def _add(self, records: list[Record]) -> None:
        try:
            self._add_once(records)
        except sqlite3.DatabaseError as error:
            if not store.is_damaged(error):
                raise
            self._close_file()
            aside = store.set_aside(self.path)
            self._lost_file = str(aside)
            log.error("%s is damaged (%s): moved to %s, begun anew", self.path, error, aside.name)
            self._add_once(records)

    def _add_once(self, records: list[Record]) -> None:
        if self._is_suspect:
            self._is_suspect = False
            self._close_file()
        if self._store is None:
            self._store = Store(self.path)
        if records:
            self._store.add(records)
        if time.monotonic() >= self._prune_at:
            self._store.prune(now=time.time())
            self._prune_at = time.monotonic() + _PRUNE_S

    def _disable(self, error: Exception) -> None:
        self._close_file()
        self._retry_at = time.monotonic() + self._retry_s
        self._is_refused = isinstance(error, store.NewerFile)
        is_news = self._why is None
        self._why = f"{error}. {getattr(error, 'remedy', '')}".strip()
        if is_news:
            log.error("statistics are not kept in %s: %s", self.path, self._why)

    def _close_file(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
