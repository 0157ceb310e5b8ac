"""What every test gets: no settings of this machine, no folders of this user, no network."""

import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before torch starts its threads: two that spin beside another busy process cost milliseconds.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# transformers is only ever given local folders; this makes a mistake an error, not a download.
os.environ["HF_HUB_OFFLINE"] = "1"
# Triton 3.9 warns that its default will change; this is what every version up to it does.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

_XDG = ("CONFIG_HOME", "CACHE_HOME", "DATA_HOME", "STATE_HOME", "RUNTIME_DIR")
_LOCAL_NAMES = ("", "localhost", "ip6-localhost")


def _is_local(host: object) -> bool:
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name in _LOCAL_NAMES:
        return True
    try:
        return ipaddress.ip_address(name.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _refuse_foreign(sock: socket.socket, address: Any) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
        raise RuntimeError(f"a test may use the loopback only, not {address!r}")


@pytest.fixture(autouse=True)
def _own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Drop INFILLD_* variables; point the XDG folders, and so our own, into a fresh folder."""
    for name in [name for name in os.environ if name.startswith("INFILLD_")]:
        monkeypatch.delenv(name)
    home: Path = tmp_path_factory.mktemp("xdg")
    for name in _XDG:
        folder = home / name.lower()
        folder.mkdir(mode=0o700)
        monkeypatch.setenv(f"XDG_{name}", str(folder))


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """Take away what a verb adds to the log: its stream is closed when the test is over."""
    root, level = logging.root, logging.root.level
    before = list(root.handlers)
    yield
    root.setLevel(level)
    for handler in set(root.handlers) - set(before):
        if not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any connection, binding or name lookup beyond this machine an error."""

    def guarded(name: str) -> Callable[[socket.socket, Any], Any]:
        real = getattr(socket.socket, name)

        def call(sock: socket.socket, address: Any) -> Any:
            _refuse_foreign(sock, address)
            return real(sock, address)

        return call

    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, guarded(name))
    real_lookup = socket.getaddrinfo

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_local(host):
            raise RuntimeError(f"a test may not look up {host!r}")
        return real_lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
