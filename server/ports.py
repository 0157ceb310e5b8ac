"""The listening socket, and who has the port when we cannot."""

import errno
import socket
from contextlib import suppress
from pathlib import Path

from infilld.server.discovery import DaemonProblem


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


def url_of(listening: socket.socket) -> str:
    """The address clients use."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
