"""The life of the daemon's process: lock, socket, token, address, clean end."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from infilld.server.discovery import (
    API,
    DaemonProblem,
    address_file,
    lock_file,
    make_private_folder,
    open_lock,
    running_pid,
    try_lock,
    writing_in,
)
from infilld.server.http.connection import Connection
from infilld.server.process import files, ports, token
from infilld.server.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from infilld.server.jobs import Worker

log = logging.getLogger(__name__)

_LOCK_WAIT_S = 1.0
_GRACE_S = 2
# Longer than httpx keeps an idle connection (5 s): when both ends let go at one moment, a request
# is lost.
_KEEP_ALIVE_S = 75


def serve(
    settings: Settings,
    make_worker: Callable[[Settings], "Worker"],
    *,
    on_held: Callable[[], None] = lambda: None,
    on_listening: Callable[["Listener"], None] = lambda _: None,
) -> None:
    """Run the daemon until it is told to stop.

    The lock comes first and the heavy imports after it, so that a second daemon ends at once. A
    signal ends it within seconds, a second one at once.

    Args:
        settings: of the daemon. make_worker: makes the engine.
        on_held: called once this is the daemon of its state folder.
        on_listening: called once it listens.

    Raises:
        DaemonProblem: one runs already, the port is taken, or the state folder cannot be written.
    """
    make_private_folder(settings.state_dir)
    with open_lock(lock_file(settings)) as lock:
        _hold(lock, settings)
        on_held()
        address = address_file(settings)
        _clear(address)
        with ports.door(settings) as listening:
            from infilld.server.app import create_app
            from infilld.server.keeping.statistics import FILE_NAME, Statistics

            app = create_app(
                make_worker(settings),
                statistics=Statistics(settings.state_dir / FILE_NAME),
                token=token.prepare(settings.token_file) if settings.auth else None,
                allowed_hosts=settings.allowed_hosts,
                log_prompts=settings.log_prompts,
            )

            def publish(listener: Listener) -> None:
                _publish(address, ports.url_of(listening))
                on_listening(listener)

            listener = Listener(app, settings, publish, on_killed=lambda: _forget(address))
            try:
                asyncio.run(listener.serve(sockets=[listening]))
            finally:
                _forget(address)


class Listener(uvicorn.Server):
    """Serves the application; says when it listens, and ends without raising the signal again.

    `on_killed` is called before a second signal ends the process at once.
    """

    def __init__(
        self,
        app: "FastAPI",
        settings: Settings,
        on_listening: Callable[["Listener"], None],
        on_killed: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level=settings.log_level,
                http=Connection,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=_GRACE_S,
                timeout_keep_alive=_KEEP_ALIVE_S,
            )
        )
        self._app, self._on_listening, self._on_killed = app, on_listening, on_killed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_listening(self)

    def stop(self) -> None:
        """End soon: live jobs are cancelled and their clients told. Safe from any thread."""
        assert self._loop is not None, "only what listens can be stopped"
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self.should_exit = True
        _tell_manager("STOPPING=1")
        self._app.state.jobs.cancel_all()

    def _on_signal(self, number: int, frame: object) -> None:
        if self._is_told:
            # Not through the event loop, which may be what hangs.
            self._on_killed()
            os._exit(128 + number)
        self._is_told = True
        # A loop that has closed ends by itself.
        with contextlib.suppress(RuntimeError):
            self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop cleanly on SIGTERM and SIGINT, at once on a second; in a thread, only on `stop`."""
        import threading

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._loop = asyncio.get_running_loop()
        # For good: what comes while the last things are closed must not end in a traceback.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        yield


def _hold(lock: int, settings: Settings) -> None:
    """Take the daemon's lock for life and write our pid into it."""
    until = time.monotonic() + _LOCK_WAIT_S
    # More than once: whoever looks whether a daemon runs holds it for a moment.
    while not try_lock(lock):
        if time.monotonic() > until:
            raise DaemonProblem(
                f"a daemon runs already for {settings.state_dir} (pid {running_pid(settings)})",
                remedy="Use it, or run: infilld stop",
                code="already_running",
            )
        time.sleep(0.02)
    with writing_in(settings.state_dir):
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)


def _publish(address: Path, url: str) -> None:
    """Say where we listen; readers see the whole file or none."""
    told = {
        "pid": os.getpid(),
        "url": url,
        "api": API,
        "version": version("infilld"),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with writing_in(address.parent):
        files.put(address, json.dumps(told).encode(), mode=0o600)
    log.info("listening on %s", url)
    _tell_manager("READY=1")


def _clear(address: Path) -> None:
    """Remove what a daemon left that did not end cleanly; the lock is held."""
    with writing_in(address.parent):
        address.unlink(missing_ok=True)
        for draft in address.parent.glob(f".{address.name}.*"):
            draft.unlink(missing_ok=True)


def _forget(address: Path) -> None:
    # The folder may be gone, or its disk read-only by now.
    with contextlib.suppress(OSError):
        address.unlink(missing_ok=True)


def _tell_manager(state: str) -> None:
    """Tell a service manager that asks for it. Source: sd_notify(3)."""
    where = os.environ.get("NOTIFY_SOCKET")
    if where:
        # A leading @ stands for the NUL of an abstract address.
        address = "\0" + where[1:] if where.startswith("@") else where
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as link:
            link.sendto(state.encode(), address)
