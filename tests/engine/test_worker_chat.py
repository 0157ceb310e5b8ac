"""Conversations beside infills: the same queue, the same clock, the same counts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_infill import tiny_infiller
from worker_at_work import WAIT_S, Gate, request

from infilld.engine import resident
from infilld.engine.conversation import ChatAnswer, ChatRequest, ChatResult, Message
from infilld.engine.errors import Cancelled, UnknownOption
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.worker import Worker


def conversing(self: Infiller, asked: ChatRequest, hooks: Hooks) -> Any:
    """An answer that takes what an infill takes."""
    result = yield from self.work(request(seed=asked.seed), hooks)
    answer = ChatAnswer(asked.messages[-1].content, "", "stop")
    return ChatResult(
        id="own", seed=result.seed, answers=(answer,), usage=result.usage, timings=result.timings
    )


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr(resident, "load_infiller", lambda *wishes: tiny_infiller())
    monkeypatch.setattr(Infiller, "conversing", conversing)
    made = Worker(Path("tiny"))
    made.start()
    made.wait_ready(WAIT_S)
    yield made
    made.close()


def chat(text: str = "hello", **more: Any) -> ChatRequest:
    return ChatRequest(messages=(Message("user", text),), **{"seed": 1, **more})


def test_a_conversation_is_answered_and_counted(worker: Worker) -> None:
    job = worker.submit(chat())
    result = job.future.result(WAIT_S)
    assert (result.id, result.answers[0].text, result.reason) == (job.id, "hello", "ok")
    assert result.timings.total_ms >= result.timings.queue_ms >= 0
    worker.feedback(job.id, "inserted")
    with pytest.raises(UnknownOption):
        worker.feedback(job.id, "shown", choice=1)
    stats = worker.stats()
    assert (stats["jobs"], stats["reasons"], stats["feedback"]) == (1, {"ok": 1}, {"inserted": 1})
    # Nothing is prepared behind it.
    assert stats["prefetches"] == 0
    assert stats["passes"] == result.usage.passes > 0


def test_a_conversation_that_is_struck_in_the_queue_is_one_still(worker: Worker) -> None:
    gate = Gate()
    first = worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    result = worker.submit(chat(deadline_ms=1)).future.result(WAIT_S)
    assert isinstance(result, ChatResult)
    assert (result.reason, result.answers) == ("deadline", ())
    gate.open.set()
    first.future.result(WAIT_S)


def test_newer_requests_of_a_document_supersede_whatever_kind_they_are(worker: Worker) -> None:
    gate = Gate()
    live = worker.submit(chat(document="d"), gate)
    assert gate.reached.wait(WAIT_S)
    waiting = worker.submit(request(document="d"))
    newest = worker.submit(chat(document="d"))
    assert waiting.future.result(0).reason == "superseded"
    gate.open.set()
    ended = live.future.result(WAIT_S)
    assert isinstance(ended, ChatResult)
    assert ended.reason == "superseded"
    assert newest.future.result(WAIT_S).reason == "ok"


def test_a_conversation_is_cancelled_within_a_pass(worker: Worker) -> None:
    gate = Gate()
    job = worker.submit(chat(), gate)
    assert gate.reached.wait(WAIT_S)
    job.cancel()
    gate.open.set()
    with pytest.raises(Cancelled):
        job.future.result(WAIT_S)
    assert gate.passes == 1


def test_both_kinds_share_their_passes(worker: Worker) -> None:
    gate = Gate()
    first = worker.submit(request(), gate)
    assert gate.reached.wait(WAIT_S)
    jobs = [worker.submit(chat()), worker.submit(request(text="b = \n"))]
    gate.open.set()
    for job in (first, *jobs):
        assert job.future.result(WAIT_S).reason in ("ok", "empty")
    mean = worker.stats()["jobs_per_round"]
    assert isinstance(mean, float)
    assert mean > 1
