"""The listening socket, of a port or a path, and who has it when we cannot."""

import errno
import logging
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

from infilld.server.discovery import UNIX, DaemonProblem
from infilld.server.settings import Settings

log = logging.getLogger(__name__)

# sun_path holds so many bytes, and a zero behind them.
_LONGEST_PATH_BYTES = 107 if sys.platform == "linux" else 103


@contextmanager
def door(settings: Settings) -> Iterator[socket.socket]:
    """The socket that the settings ask for, bound and listening; a path is removed behind us.

    Raises:
        DaemonProblem: as `listen` and `listen_unix`.
    """
    if settings.socket is None:
        with listen(settings.host, settings.port) as listening:
            if not ip_address(settings.host).is_loopback:
                log.warning(
                    "OTHER MACHINES CAN REACH THIS DAEMON at %s port %d: who has the token may "
                    "ask, and everybody between can read along, for this is not encrypted",
                    *listening.getsockname()[:2],
                )
            yield listening
        return
    with listen_unix(settings.socket) as listening:
        ours = settings.socket.stat()
        try:
            yield listening
        finally:
            with suppress(OSError):
                if os.path.samestat(ours, settings.socket.stat()):
                    settings.socket.unlink()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 picks a free one.

    Raises:
        DaemonProblem: the port is taken (the message names the program where it can be known), or
            the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is spelled out because asyncio sets TCP_NODELAY only where it is: without it
    # every answer waits 40 ms for an acknowledgement.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # Without it a port stays closed for a minute after a stop.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        # Two programs may bind one port with SO_REUSEADDR as long as neither listens.
        listening.listen()
    except OSError as error:
        listening.close()
        if error.errno != errno.EADDRINUSE:
            raise DaemonProblem(f"cannot listen on {host} port {port}: {error.strerror}") from error
        raise DaemonProblem(
            f"port {port} is taken by {owner_of(port) or 'another program'}",
            remedy="End that program, or choose another port with --port (0 picks a free one).",
            code="port_taken",
        ) from error
    return listening


def listen_unix(path: Path) -> socket.socket:
    """A bound socket at a path, its owner's alone; what a dead program left there is removed.

    Raises:
        DaemonProblem: a program listens there, something else stands there, the path is too long,
            or the folder is open to others.
    """
    length_bytes = len(os.fsencode(path))
    if length_bytes > _LONGEST_PATH_BYTES:
        raise DaemonProblem(
            f"{path} has {length_bytes} bytes, a socket's path may have {_LONGEST_PATH_BYTES}",
            remedy="Choose a shorter one with --socket, such as $XDG_RUNTIME_DIR/infilld.sock.",
        )
    _check_folder(path.parent)
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        # Nobody can connect before it listens.
        path.chmod(0o600)
        listening.listen()
    except OSError as error:
        listening.close()
        raise DaemonProblem(f"cannot listen on {path}: {error.strerror}") from error
    return listening


def url_of(listening: socket.socket) -> str:
    """The address clients on this machine use: `http://host:port`, or `unix:` and a path."""
    if listening.family == socket.AF_UNIX:
        return f"{UNIX}{listening.getsockname()}"
    host, port = listening.getsockname()[:2]
    if ip_address(host).is_unspecified:
        # Every address; no name of this machine for a client.
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _check_folder(folder: Path) -> None:
    remedy = "Choose a path in a folder of yours, such as $XDG_RUNTIME_DIR/infilld.sock."
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        told = folder.stat()
    except OSError as error:
        raise DaemonProblem(f"cannot use {folder}: {error.strerror}", remedy=remedy) from error
    # Whoever may write there could put another socket in place of ours.
    if told.st_uid != os.geteuid() or told.st_mode & (stat.S_IWOTH | stat.S_IWGRP):
        raise DaemonProblem(f"{folder} is open to other users", remedy=remedy)


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise DaemonProblem(
                f"{path} is there and is no socket",
                remedy="Remove it, or choose another path with --socket.",
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(1.0)
            asking.connect(str(path))
            owner = _peer(asking)
    except (FileNotFoundError, ConnectionRefusedError):
        path.unlink(missing_ok=True)
        return
    except TimeoutError:
        owner = None
    except OSError as error:
        raise DaemonProblem(f"cannot use {path}: {error.strerror}") from error
    raise DaemonProblem(
        f"{path} is taken by {owner or 'another program'}",
        remedy="End that program, or choose another path with --socket.",
        code="socket_taken",
    )


def _peer(connected: socket.socket) -> str | None:
    """The program at the other end of a Unix socket, as "name (pid N)".

    Source: unix(7), SO_PEERCRED.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    told = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", told)[0]
    with suppress(OSError):
        return f"{Path(f'/proc/{pid}/comm').read_text().strip()} (pid {pid})"
    return f"pid {pid}"


def owner_of(port: int) -> str | None:
    """The program that listens on a local port, as "name (pid N)"; None when it cannot be known.

    Source: proc(5), /proc/net/tcp and /proc/PID/fd.
    """
    sockets = _listening_inodes(port)
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end meanwhile, or belong to another user.
        with suppress(OSError):
            if any(_is_one_of(link, sockets) for link in (folder / "fd").iterdir()):
                return f"{(folder / 'comm').read_text().strip()} (pid {folder.name})"
    return None


def _is_one_of(link: Path, sockets: set[str]) -> bool:
    try:
        return link.readlink().name in sockets
    except OSError:
        return False  # closed meanwhile


def _listening_inodes(port: int) -> set[str]:
    names = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = table.read_text().splitlines()[1:] if table.exists() else []
        for row in rows:
            cells = row.split()
            is_listening = cells[3] == "0A"
            if is_listening and int(cells[1].rpartition(":")[2], 16) == port:
                names.add(f"socket:[{cells[9]}]")
    return names
