"""Jobs: one live a document, cancelled within one pass, nothing left hanging."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_infill import tiny_config, tiny_infiller, tiny_model

from infilld.engine import worker as worker_module
from infilld.engine.errors import (
    Busy,
    Cancelled,
    CheckpointMismatch,
    CheckpointMissing,
    Loading,
    ModelError,
    UnsupportedDevice,
)
from infilld.engine.request import CanvasUpdate, InfillRequest, Span
from infilld.engine.training.export import export_model
from infilld.engine.training.vocabulary import save_vocabulary, train_vocabulary
from infilld.engine.worker import MAX_QUEUED, Worker, load_infiller, pick_device

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
    # At once, not when the running job ends.
    assert queued.future.result(0).reason == "superseded"
    gate.open.set()
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


def test_a_job_cancelled_while_it_waits_ends_at_once(worker: Worker) -> None:
    gate = Gate()
    worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    waiting = worker.submit(request())
    waiting.cancel()
    waiting.cancel()
    with pytest.raises(Cancelled):
        waiting.future.result(0)
    gate.open.set()


def test_keystrokes_of_one_document_fill_no_queue(worker: Worker) -> None:
    gate = Gate()
    worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    jobs = [worker.submit(request("a")) for _ in range(3 * MAX_QUEUED)]
    gate.open.set()
    assert jobs[-1].future.result(WAIT_S).reason != "superseded"


def test_a_refused_request_supersedes_nothing(worker: Worker) -> None:
    gate = Gate()
    running = worker.submit(request("a"), gate)
    assert gate.reached.wait(WAIT_S)
    waiting = [worker.submit(request()) for _ in range(MAX_QUEUED)]
    with pytest.raises(Busy):
        worker.submit(request("a"))
    for job in waiting:
        job.cancel()
    gate.open.set()
    assert running.future.result(WAIT_S).reason != "superseded"


def test_a_deadline_that_strikes_in_the_queue_starts_nothing(worker: Worker) -> None:
    gate = Gate()
    worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    job = worker.submit(request(deadline_ms=1))
    threading.Event().wait(0.01)
    gate.open.set()
    result = job.future.result(WAIT_S)
    assert (result.reason, result.usage.passes) == ("deadline", 0)


def test_no_job_waits_for_a_thread_that_is_gone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise SystemError("no more")

    monkeypatch.setattr(worker, "_step", broken)
    job = worker.submit(request())
    with pytest.raises(ModelError, match="broke"):
        job.future.result(WAIT_S)
    assert worker.state == "failed"
    with pytest.raises(ModelError, match="broke"):
        worker.submit(request())


def test_a_failure_raised_often_holds_no_requests(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "nowhere")
    worker.start()
    depths = set()
    for _ in range(5):
        with pytest.raises(CheckpointMissing) as caught:
            worker.wait_ready(WAIT_S)
        depths.add(len(caught.traceback))
    assert len(depths) == 1
    worker.close()


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    export_model(tiny_model(tiny_config(vocab_tokens=100)), tmp_path)
    save_vocabulary(train_vocabulary(["def f(): pass"], 300), tmp_path, 512)
    with pytest.raises(CheckpointMismatch, match=r"tokenizer\.json has \d+ tokens, the model 100"):
        load_infiller(tmp_path, "cpu")


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
