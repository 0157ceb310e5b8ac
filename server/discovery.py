"""Find the running daemon of a state folder, start one, or stop it.

The state folder holds `daemon.lock` (flock held for the daemon's life, its pid inside),
`daemon.json` (written atomically once listening, removed at a clean stop), `token` (0600), and
`start.lock`, which whoever starts a daemon holds until that daemon answers.
"""

import fcntl
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from infilld.server.settings import Problem, Settings

API = 1
"""Version of the shapes; daemons and clients with unequal numbers do not talk."""

UNIX = "unix:"
"""What an address begins with that is the path of a Unix socket."""

# -P: the folder we stand in must not shadow a package.
COMMAND = (sys.executable, "-P", "-m", "infilld.server", "serve")
# How the threads of a product wait for each other: asleep, after about 10 microseconds. Beside a
# busy process, threads that spin longer cost 8 ms an operation; ones that sleep at once cost a
# fifth of a pass where nothing else runs.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
_POLL_S = 0.02
_HEALTH_TIMEOUT_S = 2.0


class DaemonProblem(Problem):
    """The daemon cannot be started, found or stopped."""

    code = "daemon"


@dataclass(frozen=True)
class Daemon:
    """A daemon that listens; its model may still be loading.

    `url` is `http://host:port`, or `unix:` and a path. `token` is empty when it has none.
    """

    url: str
    token: str
    pid: int
    api: int
    version: str


def find(settings: Settings) -> Daemon | None:
    """The daemon that answers for this state folder, or None."""
    if not is_locked(lock_file(settings)):
        return None
    daemon = _read_address(settings)
    return daemon if daemon is not None and _answers(daemon) else None


def ensure(settings: Settings, wait_s: float = 30.0) -> Daemon:
    """Find the daemon, or start one and return once it listens (not: once it is loaded).

    Safe to call from many processes at once. A daemon of an older `API` is replaced when idle.

    Raises:
        DaemonProblem: it did not start, or did not answer within `wait_s`.
    """
    until = time.monotonic() + wait_s
    child: subprocess.Popen[bytes] | None = None
    log_start_bytes = 0
    make_private_folder(settings.state_dir)
    with open_lock(settings.state_dir / "start.lock") as start:
        while True:
            found = find(settings)
            if found is not None and found.api == API:
                return found
            if found is not None:
                _retire(found)
            is_held = is_locked(lock_file(settings))
            if child is not None and child.poll() is not None and not is_held:
                raise _failed_start(settings, log_start_bytes)
            # Looked at again with start.lock in hand: its last holder may just have succeeded.
            is_our_turn = child is None and not is_held and try_lock(start)
            if is_our_turn and not is_locked(lock_file(settings)):
                log_start_bytes = _length_bytes(settings.log_file)
                child = _spawn(settings)
            if time.monotonic() > until:
                raise DaemonProblem(
                    f"the daemon did not answer within {wait_s:g} s",
                    remedy=f"Look into {settings.log_file}, or run: infilld stop",
                )
            time.sleep(_POLL_S)


def stop(settings: Settings, wait_s: float = 15.0) -> bool:
    """Ask the daemon to end and wait until it has; False when none runs.

    Raises:
        DaemonProblem: it still runs after `wait_s`, or is not ours to stop.
    """
    until = time.monotonic() + wait_s
    pid: int | None = None
    while is_locked(lock_file(settings)):
        if pid is None and (pid := running_pid(settings)) is not None:
            _terminate(pid)
        if time.monotonic() > until:
            raise DaemonProblem(
                f"the daemon (pid {pid}) did not stop within {wait_s:g} s",
                remedy=f"End it by hand: kill -9 {pid}",
            )
        time.sleep(_POLL_S)
    return pid is not None


def running_pid(settings: Settings) -> int | None:
    """The process that holds the daemon's lock, listening or not; None when none does."""
    path = lock_file(settings)
    if not is_locked(path):
        return None
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None  # the holder is about to write it


def lock_file(settings: Settings) -> Path:
    """Held by the daemon for its life."""
    return settings.state_dir / "daemon.lock"


def address_file(settings: Settings) -> Path:
    """Says where the daemon listens, once it does."""
    return settings.state_dir / "daemon.json"


def make_private_folder(path: Path) -> None:
    """Make the state folder, closed to others.

    Raises:
        DaemonProblem: it cannot be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DaemonProblem(
            f"cannot make the state folder {path}: {error.strerror}",
            remedy="Choose another with --state-dir.",
        ) from error


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Say what is wrong with the state folder where it cannot be written.

    Raises:
        DaemonProblem: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DaemonProblem(
            f"cannot write in {folder}: {error.strerror}",
            remedy="Make room there, or choose another folder with --state-dir.",
            code="cannot_write",
        ) from error


@contextmanager
def open_lock(path: Path) -> Iterator[int]:
    """Open a lock file, not yet locked; leaving the block releases the lock.

    Raises:
        DaemonProblem: it cannot be made.
    """
    with writing_in(path.parent):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Take the lock if it is free; True when we hold it now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock.

    Looking takes a shared lock for a moment, so whoever wants the lock for good tries more than
    once.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _read_address(settings: Settings) -> Daemon | None:
    try:
        got = json.loads(address_file(settings).read_bytes())
        url, version = str(got["url"]), str(got["version"])
        return Daemon(url, _token(settings), int(got["pid"]), int(got["api"]), version)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _token(settings: Settings) -> str:
    """The token; empty where there is none that a header could hold: the daemon will say so."""
    try:
        token = settings.token_file.read_bytes()[:1024].decode("ascii").strip()
    except (OSError, ValueError):
        return ""
    return token if token.isprintable() else ""


def _answers(daemon: Daemon) -> bool:
    got = _get(daemon, "/health")
    return isinstance(got, dict) and {"api", "version", "state"} <= got.keys()


def _get(daemon: Daemon, path: str) -> Any:
    """The JSON at a path of the daemon; None when nothing of the kind answers."""
    link = _link(daemon.url)
    try:
        headers = {"Authorization": f"Bearer {daemon.token}"} if daemon.token else {}
        link.request("GET", path, headers=headers)
        return json.loads(link.getresponse().read(1 << 20))
    except (OSError, ValueError, http.client.HTTPException):
        return None
    finally:
        link.close()


def _link(url: str) -> http.client.HTTPConnection:
    if url.startswith(UNIX):
        return _UnixConnection(url.removeprefix(UNIX))
    where = urlsplit(url)
    return http.client.HTTPConnection(
        where.hostname or "", where.port or 0, timeout=_HEALTH_TIMEOUT_S
    )


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_HEALTH_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _retire(daemon: Daemon) -> None:
    """Stop an older daemon that has nothing to do; leave a busy one for the next look."""
    if daemon.api > API:
        raise DaemonProblem(
            f"the running daemon (infilld {daemon.version}) is newer than this program",
            remedy="Update this one, or run: infilld stop",
        )
    stats = _get(daemon, "/stats")
    if not isinstance(stats, dict) or stats.get("live_jobs", 0) == 0:
        _terminate(daemon.pid)


def _terminate(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError as error:
        raise DaemonProblem(f"the daemon (pid {pid}) belongs to another user") from error


def _spawn(settings: Settings) -> subprocess.Popen[bytes]:
    """Start a daemon that outlives us, in its own session."""
    with writing_in(settings.state_dir):
        descriptor = os.open(settings.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as log:
        child = subprocess.Popen(
            [*COMMAND, *settings.flags()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
            # Read when torch is loaded.
            env={**WAITING, **os.environ},
        )
    # Reaps it, should it end before we do.
    threading.Thread(target=child.wait, daemon=True).start()
    return child


def _length_bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _is_full(folder: Path) -> bool:
    return os.statvfs(folder).f_bavail == 0


def _failed_start(settings: Settings, log_start_bytes: int) -> DaemonProblem:
    log = settings.log_file.read_bytes()
    # A daemon that came as far as writing its log may have moved the old one away.
    said = log[log_start_bytes if log_start_bytes <= len(log) else 0 :].decode(errors="replace")
    silence = "the disk is full" if _is_full(settings.state_dir) else "it said nothing"
    last = "\n".join(said.strip().splitlines()[-5:]) or silence
    return DaemonProblem(
        f"the daemon did not start: {last}", remedy=f"The whole log is {settings.log_file}."
    )
