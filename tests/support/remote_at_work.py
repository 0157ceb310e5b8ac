"""A remote worker over a service of the test, started and looked at."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fake_worker import FakeWorker

from infilld.engine.request import InfillRequest, Span
from infilld.server.jobs import Worker
from infilld.server.remote.health import Pace
from infilld.server.remote.worker import RemoteWorker
from infilld.server.settings import Settings

QUICK = Pace(well_s=0.1, first_s=0.02, most_s=0.05, patience_s=5.0)
WAIT_S = 20.0


@contextmanager
def remote_worker(
    url: str,
    make_local: Callable[[], Worker] = FakeWorker,
    *,
    pace: Pace = QUICK,
    **settings: Any,
) -> Iterator[RemoteWorker]:
    """A worker for the service at `url`, once it was looked at."""
    wanted = Settings(engine=f"openai:{url}", state_dir=Path("/nowhere"), **settings)
    worker = RemoteWorker(wanted, make_local, pace)
    worker.start()
    try:
        wait_until(lambda: worker.state != "loading")
        yield worker
    finally:
        worker.close()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.002)


def gap(text: str, **more: Any) -> InfillRequest:
    """An infill at every `|` of a text."""
    parts = text.split("|")
    spans, at = [], 0
    for part in parts[:-1]:
        at += len(part)
        spans.append(Span(at, at))
    return InfillRequest(text="".join(parts), spans=tuple(spans), **more)


def fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"
