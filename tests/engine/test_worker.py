"""Jobs: one live a document, cancelled within one pass, nothing left hanging."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_infill import tiny_infiller

from infilld.engine import worker as worker_module
from infilld.engine.errors import Busy, Cancelled, CheckpointMissing, Loading, UnsupportedDevice
from infilld.engine.request import CanvasUpdate, InfillRequest, Span
from infilld.engine.worker import MAX_QUEUED, Worker, pick_device

WAIT_S = 20


class Gate:
    """Holds the worker after a pass until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open, self.passes = threading.Event(), threading.Event(), 0

    def __call__(self, update: CanvasUpdate) -> None:
        self.passes += 1
        self.reached.set()
        assert self.open.wait(WAIT_S)


def request(document: str | None = None, **fields: object) -> InfillRequest:
    known = {"text": "a = \n", "spans": (Span(4, 4),), "seed": 1, "max_tokens": 8}
    return InfillRequest(document=document, **{**known, **fields})  # type: ignore[arg-type]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr(worker_module, "load_infiller", lambda folder, device: tiny_infiller())
    made = Worker(Path("tiny"))
    made.start()
    made.wait_ready(WAIT_S)
    yield made
    made.close()


def test_a_job_is_answered_under_its_own_id(worker: Worker) -> None:
    job = worker.submit(request())
    result = job.future.result(WAIT_S)
    assert result.id == job.id
    assert result.timings.total_ms >= result.timings.denoise_ms > 0
    assert worker.stats()["jobs"] == 1


def test_a_newer_request_supersedes_the_running_one_within_a_pass(worker: Worker) -> None:
    gate = Gate()
    old = worker.submit(request("a"), gate)
    assert gate.reached.wait(WAIT_S)
    new = worker.submit(request("a"))
    gate.open.set()
    assert old.future.result(WAIT_S).reason == "superseded"
    assert gate.passes == 1
    assert new.future.result(WAIT_S).reason in ("ok", "empty")


def test_queued_jobs_are_superseded_too_but_not_other_documents(worker: Worker) -> None:
    gate = Gate()
    running = worker.submit(request("a"), gate)
    assert gate.reached.wait(WAIT_S)
    queued, other = worker.submit(request("b")), worker.submit(request("c"))
    newest = worker.submit(request("b"))
    gate.open.set()
    assert queued.future.result(WAIT_S).reason == "superseded"
    for job in (running, other, newest):
        assert job.future.result(WAIT_S).reason != "superseded"


def test_requests_without_a_document_supersede_nothing(worker: Worker) -> None:
    gate = Gate()
    first = worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    second = worker.submit(request())
    gate.open.set()
    assert {job.future.result(WAIT_S).reason for job in (first, second)} <= {"ok", "empty"}


def test_cancel_takes_effect_within_a_pass(worker: Worker) -> None:
    gate = Gate()
    job = worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    job.cancel()
    gate.open.set()
    with pytest.raises(Cancelled):
        job.future.result(WAIT_S)
    assert gate.passes == 1
    # The worker goes on.
    assert worker.submit(request()).future.result(WAIT_S)


def test_a_full_queue_is_busy(worker: Worker) -> None:
    gate = Gate()
    worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    waiting = [worker.submit(request()) for _ in range(MAX_QUEUED)]
    with pytest.raises(Busy):
        worker.submit(request())
    for job in waiting:
        job.cancel()
    gate.open.set()


def test_closing_leaves_no_future_open(worker: Worker) -> None:
    gate = Gate()
    jobs = [worker.submit(request(), gate), worker.submit(request())]
    assert gate.reached.wait(WAIT_S)
    closing = threading.Thread(target=worker.close)
    closing.start()
    gate.open.set()
    closing.join(WAIT_S)
    for job in jobs:
        with pytest.raises(Cancelled):
            job.future.result(0)
    with pytest.raises(Busy):
        worker.submit(request())


def test_a_broken_watcher_fails_its_job_alone(worker: Worker) -> None:
    def broken(update: CanvasUpdate) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        worker.submit(request(), broken).future.result(WAIT_S)
    assert worker.submit(request()).future.result(WAIT_S)


def test_a_missing_model_is_said_at_every_turn(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "nowhere")
    with pytest.raises(Loading):
        worker.submit(request())
    worker.start()
    with pytest.raises(CheckpointMissing):
        worker.wait_ready(WAIT_S)
    assert worker.state == "failed"
    with pytest.raises(CheckpointMissing):
        worker.submit(request())
    worker.close()


def test_devices_are_checked() -> None:
    assert pick_device("cpu").type == "cpu"
    for wish in ("toaster", "cuda:99", "meta"):
        with pytest.raises(UnsupportedDevice):
            pick_device(wish)
