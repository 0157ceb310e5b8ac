"""Jobs: one live a document, cancelled within one pass, nothing left hanging."""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_infill import tiny_config, tiny_infiller, tiny_model
from worker_at_work import WAIT_S, Gate, request, texts_of

from infilld.engine import resident
from infilld.engine.errors import (
    Busy,
    Cancelled,
    CheckpointMismatch,
    CheckpointMissing,
    Loading,
    ModelError,
    NotEnoughMemory,
    UnknownId,
    UnknownOption,
    UnsupportedDevice,
)
from infilld.engine.infill import Infiller
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Reading
from infilld.engine.request import CanvasUpdate, InfillRequest, InfillResult, Span
from infilld.engine.training.export import export_model
from infilld.engine.training.vocabulary import save_vocabulary, train_vocabulary
from infilld.engine.worker import MAX_QUEUED, Worker, load_infiller, pick_device


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr(resident, "load_infiller", lambda *wishes: tiny_infiller())
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

    monkeypatch.setattr(worker._rounds, "_step", broken)
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


# Several jobs at once.


def engine_of(worker: Worker) -> Infiller:
    engine = worker._resident.engine
    assert engine is not None
    return engine


class Passes:
    """Every shared pass as the cache lengths of its canvases; may be told to fail."""

    def __init__(self, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[list[int]] = []
        self.fails: Callable[[list[int]], bool] = lambda tokens: False
        self._real = engine_of(worker).model.run
        monkeypatch.setattr(engine_of(worker).model, "run", self)

    def __call__(self, passes: Sequence[CanvasPass]) -> list[Reading]:
        tokens = [each.cache.tokens for each in passes]
        self.done.append(tokens)
        if self.fails(tokens):
            raise torch.OutOfMemoryError("full")
        return self._real(passes)


def other_texts(count: int) -> list[str]:
    """Documents whose prompts have different lengths."""
    return [f"{'b' * (number + 1)} = \n" for number in range(count)]


def gap_behind(text: str, document: str | None = None, **more: object) -> InfillRequest:
    at = text.index("=") + 2
    return request(document, text=text, spans=(Span(at, at),), **more)


def held(worker: Worker, *requests: InfillRequest) -> list[InfillResult]:
    """Answers of requests that are all there before the first of them begins."""
    gate = Gate()
    first = worker.submit(gap_behind("held = \n"), gate)
    assert gate.reached.wait(WAIT_S)
    jobs = [worker.submit(each) for each in requests]
    first.cancel()
    gate.open.set()
    return [job.future.result(WAIT_S) for job in jobs]


def test_live_jobs_share_their_passes_and_get_what_they_would_alone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [gap_behind(text) for text in other_texts(3)]
    alone = [texts_of(tiny_infiller().infill(each)) for each in requests]
    passes = Passes(worker, monkeypatch)
    assert [texts_of(each) for each in held(worker, *requests)] == alone
    assert max(map(len, passes.done)) == 3
    stats = worker.stats()
    rounds, mean = stats["rounds"], stats["jobs_per_round"]
    assert isinstance(rounds, int)
    assert rounds == len(passes.done)
    assert isinstance(mean, float)
    assert mean > 1


def test_what_does_not_fit_waits_a_round(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infilld.engine.rounds.MAX_CPU_ROUND_TOKENS", 1)
    requests = [gap_behind(text) for text in other_texts(3)]
    passes = Passes(worker, monkeypatch)
    assert all(each.reason in ("ok", "empty") for each in held(worker, *requests))
    assert max(map(len, passes.done)) == 1
    # In turn, as soon as all are there.
    order = [tokens[0] for tokens in passes.done]
    there = max(order.index(tokens) for tokens in set(order))
    assert len(set(order[there : there + 3])) == 3


def test_a_long_prompt_holds_up_nobody(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its pieces are encoded, the passes of others go on."""
    engine, events = engine_of(worker), list[str]()
    encode, together = engine.model.encode, engine.model.run

    def encoding(tokens: torch.Tensor, *more: Any) -> torch.Tensor:
        events.append(f"encode {len(tokens)}")
        return encode(tokens, *more)

    def denoising(passes: Sequence[CanvasPass]) -> list[Reading]:
        events.append("pass")
        return together(passes)

    gate = Gate()
    first = worker.submit(gap_behind("a = \n"), gate)
    assert gate.reached.wait(WAIT_S)
    monkeypatch.setattr(engine.model, "encode", encoding)
    monkeypatch.setattr(engine.model, "run", denoising)
    long = worker.submit(gap_behind(f"{'# long' * 40}\nb = \n"))
    gate.open.set()
    for job in (first, long):
        job.future.result(WAIT_S)
    pieces = [at for at, event in enumerate(events) if event.startswith("encode")]
    assert len(pieces) >= 2
    between = events[pieces[0] : pieces[1]]
    assert "pass" in between


def test_the_background_stops_between_passes_for_others(worker: Worker) -> None:
    gate, order = Gate(), list[str]()
    behind = worker.submit(request(background=True), gate)
    assert gate.reached.wait(WAIT_S)
    real = worker.submit(gap_behind("b = \n"), lambda update: order.append(f"b {gate.passes}"))
    real.future.add_done_callback(lambda _: order.append("answered"))
    behind.future.add_done_callback(lambda _: order.append("background"))
    gate.open.set()
    assert behind.future.result(WAIT_S).reason in ("ok", "empty")
    assert order[-2:] == ["answered", "background"]
    assert set(order[:-2]) == {"b 1"}
    assert worker.stats()["background_jobs"] == 1


def test_the_background_gives_back_the_only_prefix_that_another_waits_for(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU with little memory holds one: whoever is suspended with it must go on."""
    monkeypatch.setattr("infilld.engine.model.MOST_PREFIXES", 1)
    gate = Gate()
    behind = worker.submit(request(background=True), gate)
    assert gate.reached.wait(WAIT_S)
    real = worker.submit(gap_behind("b = \n"))
    gate.open.set()
    for job in (real, behind):
        assert job.future.result(WAIT_S).reason in ("ok", "empty")


def test_a_real_request_drops_the_background_one_of_its_document(worker: Worker) -> None:
    gate = Gate()
    behind = worker.submit(request("a", background=True), gate)
    assert gate.reached.wait(WAIT_S)
    real = worker.submit(request("a"))
    gate.open.set()
    assert behind.future.result(WAIT_S).reason == "superseded"
    assert real.future.result(WAIT_S).reason in ("ok", "empty")
    assert gate.passes == 1


def test_a_request_is_never_superseded_by_a_background_one(worker: Worker) -> None:
    gate = Gate()
    real = worker.submit(request("a"), gate)
    assert gate.reached.wait(WAIT_S)
    behind = worker.submit(request("a", background=True))
    gate.open.set()
    assert real.future.result(WAIT_S).reason in ("ok", "empty")
    assert behind.future.result(WAIT_S).reason in ("ok", "empty")


def test_a_broken_job_does_not_harm_those_beside_it(worker: Worker) -> None:
    requests = [gap_behind(text) for text in other_texts(2)]
    alone = [texts_of(tiny_infiller().infill(each)) for each in requests]

    def broken(update: CanvasUpdate) -> None:
        raise ZeroDivisionError

    gate = Gate()
    first = worker.submit(gap_behind("held = \n"), gate)
    assert gate.reached.wait(WAIT_S)
    bad = worker.submit(gap_behind("bad = \n"), broken)
    jobs = [worker.submit(each) for each in requests]
    first.cancel()
    gate.open.set()
    assert [texts_of(job.future.result(WAIT_S)) for job in jobs] == alone
    with pytest.raises(ZeroDivisionError):
        bad.future.result(WAIT_S)


def test_a_shared_pass_that_fails_is_run_again_for_each_alone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [gap_behind(text) for text in other_texts(3)]
    alone = [texts_of(tiny_infiller().infill(each)) for each in requests]
    passes = Passes(worker, monkeypatch)
    passes.fails = lambda tokens: len(tokens) > 1
    assert [texts_of(each) for each in held(worker, *requests)] == alone
    assert any(len(tokens) > 1 for tokens in passes.done)


def test_of_a_failing_pass_only_the_job_that_fails_alone_too_fails(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [gap_behind(text) for text in other_texts(3)]
    results = [tiny_infiller().infill(each) for each in requests]
    passes, gate = Passes(worker, monkeypatch), Gate()
    first = worker.submit(gap_behind("held = \n"), gate)
    assert gate.reached.wait(WAIT_S)
    jobs = [worker.submit(each) for each in requests]
    passes.fails = lambda tokens: results[2].usage.prompt_tokens in tokens
    first.cancel()
    gate.open.set()
    assert [texts_of(job.future.result(WAIT_S)) for job in jobs[:2]] == [
        texts_of(each) for each in results[:2]
    ]
    with pytest.raises(NotEnoughMemory):
        jobs[2].future.result(WAIT_S)
    assert worker.stats()["running"] == 0


# Deadlines strike whatever runs.


def test_a_deadline_strikes_in_the_queue_while_a_turn_takes_long(worker: Worker) -> None:
    gate = Gate()
    worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    job = worker.submit(request(deadline_ms=20))
    assert job.future.result(WAIT_S).reason == "deadline"
    assert not gate.open.is_set()
    gate.open.set()


def test_a_deadline_strikes_while_a_piece_is_encoded(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = engine_of(worker), threading.Event()
    encode, begun = engine.model.encode, threading.Event()

    def slow(*all_given: Any) -> torch.Tensor:
        begun.set()
        assert gate.wait(WAIT_S)
        return encode(*all_given)

    monkeypatch.setattr(engine.model, "encode", slow)
    job = worker.submit(request(deadline_ms=30))
    assert begun.wait(WAIT_S)
    result = job.future.result(WAIT_S)
    assert (result.reason, result.id, gate.is_set()) == ("deadline", job.id, False)
    gate.set()
    assert worker.submit(request()).future.result(WAIT_S).reason in ("ok", "empty")
    # Counted once.
    stats = worker.stats()
    reasons = stats["reasons"]
    assert isinstance(reasons, dict)
    assert (reasons["deadline"], stats["jobs"]) == (1, 2)


def test_a_job_with_a_canvas_ends_with_what_it_has(worker: Worker) -> None:
    gate = Gate()
    job = worker.submit(request(deadline_ms=400), gate)
    assert gate.reached.wait(WAIT_S)
    # Its deadline is later than that of the first, so the clock has seen both.
    other = worker.submit(request(deadline_ms=500))
    assert other.future.result(WAIT_S).reason == "deadline"
    assert not job.future.done()
    gate.open.set()
    assert job.future.result(WAIT_S).usage.passes == 1


# After a suggestion was inserted.


def test_what_is_asked_next_is_prepared_for(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, engine = list[InfillRequest](), engine_of(worker)
    work, prepared = engine.work, threading.Event()

    def noted(request: InfillRequest, hooks: Any) -> Any:
        asked.append(request)
        result = yield from work(request, hooks)
        if request.background:
            prepared.set()
        return result

    monkeypatch.setattr(engine, "work", noted)
    job = worker.submit(request("d", path="a.py"))
    (text, *_) = texts_of(job.future.result(WAIT_S))
    worker.feedback(job.id, "shown")
    worker.feedback(job.id, "partly", chars=1)
    assert len(asked) == 1
    worker.feedback(job.id, "inserted")
    assert prepared.wait(WAIT_S)
    behind = asked[1]
    assert (behind.text, behind.path, behind.document) == (f"a = {text}\n", "a.py", "d")
    assert behind.spans == (Span(4 + len(text), 4 + len(text)),)
    following = worker.submit(request("d", text=behind.text, spans=behind.spans, path="a.py"))
    usage = following.future.result(WAIT_S).usage
    assert usage.cached_tokens >= usage.prompt_tokens - 1
    stats = worker.stats()
    assert stats["feedback"] == {"shown": 1, "partly": 1, "inserted": 1}
    assert (stats["prefetches"], stats["background_jobs"]) == (1, 1)


def test_what_was_answered_is_answered_again_at_once(worker: Worker) -> None:
    first = worker.submit(request("d")).future.result(WAIT_S)
    again = worker.submit(request("d")).future.result(WAIT_S)
    assert (first.usage.passes > 0, again.usage.passes) == (True, 0)
    assert texts_of(again)[0] == texts_of(first)[0]
    assert worker.stats()["answered_at_once"] == 1


def test_nothing_is_prepared_for_a_document_with_a_newer_job(worker: Worker) -> None:
    job = worker.submit(request("d"))
    job.future.result(WAIT_S)
    gate = Gate()
    newer = worker.submit(gap_behind("b = \n", document="d"), gate)
    assert gate.reached.wait(WAIT_S)
    worker.feedback(job.id, "inserted")
    gate.open.set()
    assert newer.future.result(WAIT_S).reason in ("ok", "empty")
    assert worker.stats()["prefetches"] == 0


def test_feedback_for_nothing_is_refused_and_not_counted(worker: Worker) -> None:
    job = worker.submit(request("d"))
    choices = len(job.future.result(WAIT_S).alternatives)
    with pytest.raises(UnknownId):
        worker.feedback("nobody", "inserted")
    with pytest.raises(UnknownOption):
        worker.feedback(job.id, "inserted", choice=max(1, choices))
    assert worker.stats()["feedback"] == {}
    # What is only told to be inserted, and is not known, is nothing.
    worker.accepted("nobody", 0, None)
