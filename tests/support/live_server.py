"""The real daemon, on a real socket and a free port, in a thread of the test.

Lock, token and `daemon.json` are the real ones, so `discovery.find(settings)` finds it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fake_worker import FakeWorker

from infilld.server import discovery
from infilld.server.client import Client
from infilld.server.jobs import Worker
from infilld.server.process import daemon
from infilld.server.settings import Settings


@dataclass(frozen=True)
class LiveServer:
    settings: Settings
    worker: FakeWorker
    url: str
    token: str

    def client(self, *, token: str | None = None, timeout_s: float = 20.0) -> Client:
        return Client(self.url, self.token if token is None else token, timeout_s=timeout_s)


_ANSWER_S = 60.0


@contextmanager
def live_server(
    state_dir: Path,
    worker: FakeWorker | None = None,
    *,
    auth: bool = True,
    socket: Path | None = None,
) -> Iterator[LiveServer]:
    """Serve a fake worker until the block ends."""
    fake = worker or FakeWorker()
    settings = Settings(state_dir=state_dir, port=0, auth=auth, socket=socket)
    with serving(settings, fake) as found:
        yield LiveServer(settings, fake, found.url, found.token)


@contextmanager
def serving(settings: Settings, worker: Worker) -> Iterator[discovery.Daemon]:
    """Serve any worker until the block ends."""
    listening = threading.Event()
    listeners: list[daemon.Listener] = []
    problems: list[BaseException] = []

    def announce(listener: daemon.Listener) -> None:
        listeners.append(listener)
        listening.set()

    def run() -> None:
        try:
            daemon.serve(settings, lambda _: worker, on_listening=announce)
        except BaseException as problem:
            problems.append(problem)
            listening.set()

    thread = threading.Thread(target=run)
    thread.start()
    listening.wait()
    if problems:
        thread.join()
        raise problems[0]
    try:
        until = time.monotonic() + _ANSWER_S
        # It listens; on a starved machine its first answer may outlast the probe's patience.
        while (found := discovery.find(settings)) is None:
            assert time.monotonic() < until, "it listens and does not answer"
        yield found
    finally:
        listeners[0].stop()
        thread.join()
    if problems:
        raise problems[0]
