"""When the remote engine does not answer: errors, the local model, and the way back."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_openai import FakeOpenAI, Reply
from fake_worker import FakeWorker, Script
from remote_at_work import fenced, gap, remote_worker, wait_until

from infilld.engine.conversation import ChatRequest, Message
from infilld.engine.errors import CheckpointMissing, Loading, Unavailable, Unsupported
from infilld.server.jobs import Worker
from infilld.server.remote.health import Pace
from infilld.server.remote.worker import RemoteWorker

CODE = "def add(a, b):\n    return |\n"
SUM = fenced("    return a + b")


@pytest.fixture
def fake() -> Iterator[FakeOpenAI]:
    with FakeOpenAI(Reply(texts=[SUM])) as running:
        yield running


def text_of(worker: RemoteWorker, **more: Any) -> str:
    result = worker.submit(gap(CODE, **more)).future.result(20)
    text: str = result.alternatives[0].spans[0].text
    return text


class TestWithoutFailOver:
    def test_what_does_not_answer_is_said_with_a_remedy(self, fake: FakeOpenAI) -> None:
        fake.stop()
        with remote_worker(fake.url) as worker:
            assert worker.state == "failed"
            with pytest.raises(Unavailable, match=f"at {fake.url} does not answer") as raised:
                worker.submit(gap(CODE))
            assert "fail_over" in raised.value.remedy
            assert worker.describe()["reachable"] is False
            fake.start()
            wait_until(lambda: worker.state == "ready")
            assert text_of(worker) == "a + b"

    def test_before_it_was_looked_at_it_is_loading(self, fake: FakeOpenAI) -> None:
        from infilld.server.settings import Settings

        worker = RemoteWorker(Settings(engine=f"openai:{fake.url}"), FakeWorker)
        assert worker.state == "loading"
        with pytest.raises(Loading):
            worker.submit(gap(CODE))
        assert worker.describe()["model"] == "auto"
        assert worker.stats()["jobs"] == 0
        worker.close()

    def test_a_request_finds_out_that_it_went_down(self, fake: FakeOpenAI) -> None:
        with remote_worker(fake.url, pace=Pace(well_s=60, first_s=0.02)) as worker:
            fake.stop()
            with pytest.raises(Unavailable):
                worker.submit(gap(CODE)).future.result(20)
            assert worker.state == "failed"
            assert worker.stats()["retries"] == 1
            # It is looked at from then on, not in a minute.
            fake.start()
            wait_until(lambda: worker.state == "ready")

    def test_a_broken_connection_is_tried_again(self, fake: FakeOpenAI) -> None:
        replies = [Reply(texts=[SUM], breaks_off=True), Reply(status=500, error="oops")]

        def script(body: dict[str, Any]) -> Reply:
            return replies.pop() if len(fake.asked) in (1, 3) else Reply(texts=[SUM])

        fake.script = script
        with remote_worker(fake.url) as worker:
            assert text_of(worker) == "a + b"
            assert text_of(worker) == "a + b"
            assert worker.stats()["retries"] == 2
            fake.script = Reply(status=500, error="CUDA error")
            with pytest.raises(Unavailable, match=r"answers 500.*CUDA error"):
                text_of(worker)
            # One request's trouble is not everybody's.
            assert worker.state == "ready"

    def test_the_model_is_the_one_that_is_wanted(self, fake: FakeOpenAI) -> None:
        with remote_worker(fake.url, engine_model="other") as worker:
            with pytest.raises(Unavailable, match="no model 'other', but diffusion") as raised:
                worker.submit(gap(CODE))
            assert "engine_model" in raised.value.remedy
            fake.models.append({"id": "other"})
            wait_until(lambda: worker.state == "ready")
            text_of(worker)
            assert fake.asked[-1]["model"] == "other"

    def test_a_server_that_names_no_models_needs_a_name(self, fake: FakeOpenAI) -> None:
        fake.models_reply = Reply(status=404)
        with remote_worker(fake.url) as worker, pytest.raises(Unavailable, match="no model"):
            worker.submit(gap(CODE))
        with remote_worker(fake.url, engine_model="mine") as worker:
            assert text_of(worker) == "a + b"
        assert fake.asked[-1]["model"] == "mine"

    @pytest.mark.parametrize("models", [[{"id": "x", "state": "loading"}], ["x"], [], None])
    def test_what_has_no_model_is_down(self, fake: FakeOpenAI, models: Any) -> None:
        fake.models = models
        with remote_worker(fake.url) as worker:
            assert worker.state == "failed"

    def test_a_base_address_with_v1_is_understood(self, fake: FakeOpenAI) -> None:
        with remote_worker(f"{fake.url}/v1") as worker:
            assert text_of(worker) == "a + b"


class TestKey:
    def test_a_key_that_changes_is_read_again(self, fake: FakeOpenAI, tmp_path: Path) -> None:
        key = tmp_path / "key"
        fake.key = "second"
        with remote_worker(fake.url, engine_key_file=key) as worker:
            with pytest.raises(Unavailable, match="cannot read the key"):
                worker.submit(gap(CODE))
            key.write_text("first\n")
            wait_until(lambda: "refuses the key" in str(worker.failure))
            assert worker.failure is not None
            assert "engine_key_file" in worker.failure.remedy
            assert "first" not in f"{worker.failure}{worker.describe()}{worker.stats()}"
            key.write_text("second\n")
            wait_until(lambda: worker.state == "ready")
            assert text_of(worker) == "a + b"

    def test_a_key_is_never_logged(
        self, fake: FakeOpenAI, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("DEBUG")
        key = tmp_path / "key"
        key.write_text("s3cret-key")
        fake.key = "s3cret-key"
        with remote_worker(fake.url, engine_key_file=key) as worker:
            text_of(worker)
            fake.key = "other"
            with pytest.raises(Unavailable):
                text_of(worker)
        assert "s3cret-key" not in caplog.text
        assert "a + b" not in caplog.text
        assert "def add" not in caplog.text
        assert "source text is sent to the remote engine" in caplog.text

    @pytest.mark.parametrize("content", [b"", b"two words", b"\xff\xfe", b"a\nb"])
    def test_what_is_no_key_is_not_sent(
        self, fake: FakeOpenAI, tmp_path: Path, content: bytes
    ) -> None:
        key = tmp_path / "key"
        key.write_bytes(content)
        with remote_worker(fake.url, engine_key_file=key) as worker:
            assert worker.state == "failed"
        assert not fake.paths


class TestFailOver:
    def test_the_local_model_answers_meanwhile(self, fake: FakeOpenAI) -> None:
        local = FakeWorker(Script(texts=["local"]))
        with remote_worker(fake.url, lambda: local, fail_over=True) as worker:
            assert text_of(worker) == "a + b"
            assert worker.describe()["engine"] == "remote"
            fake.stop()
            assert text_of(worker) == "local"
            assert worker.state == "ready"
            told = worker.describe()
            assert (told["engine"], told["model"], told["reachable"]) == ("local", "fake", False)
            fake.start()
            wait_until(lambda: worker.describe()["engine"] == "remote")
            assert text_of(worker) == "a + b"
            stats = worker.stats()
            assert stats["answered"] == {"remote": 2, "local": 1}
            assert (stats["fail_overs"], stats["recoveries"]) == (1, 1)
            # The memory is given back, some time later.
            wait_until(lambda: local.state == "unloaded")

    def test_what_is_known_to_be_down_is_not_asked(self, fake: FakeOpenAI) -> None:
        fake.models = []
        local = FakeWorker(Script(texts=["local"]))
        with remote_worker(fake.url, lambda: local, fail_over=True) as worker:
            assert text_of(worker) == "local"
        assert not fake.asked

    def test_requests_wait_until_it_is_loaded(self, fake: FakeOpenAI) -> None:
        fake.stop()
        local = FakeWorker(Script(texts=["local"]), is_loading=True)
        made = threading.Event()

        def make() -> Worker:
            made.set()
            return local

        with remote_worker(fake.url, make, fail_over=True) as worker:
            assert worker.state == "ready"
            assert not made.is_set()
            job = worker.submit(gap(CODE))
            late = worker.submit(gap(CODE, deadline_ms=50))
            gone = worker.submit(gap(CODE))
            gone.cancel()
            assert late.future.result(20).reason == "deadline"
            assert made.is_set()
            assert not job.future.done()
            local.finish_loading()
            assert job.future.result(20).alternatives[0].spans[0].text == "local"
            assert job.future.result().id == job.id

    def test_a_job_that_is_cancelled_is_cancelled_there(self, fake: FakeOpenAI) -> None:
        fake.stop()
        local = FakeWorker()
        local.hold()
        with remote_worker(fake.url, lambda: local, fail_over=True) as worker:
            job = worker.submit(gap(CODE, document="a"))
            wait_until(lambda: len(local.jobs) == 1)
            new = worker.submit(gap(CODE, document="a"))
            assert job.future.result(20).reason == "superseded"
            wait_until(lambda: local.jobs[0].is_cancelled.is_set())
            local.release()
            assert new.future.result(20).reason == "ok"

    def test_what_fails_on_the_way_is_not_lost(self, fake: FakeOpenAI) -> None:
        local = FakeWorker(Script(texts=["local"]))
        with remote_worker(fake.url, lambda: local, fail_over=True) as worker:
            fake.hold()
            jobs = [worker.submit(gap(CODE)) for _ in range(12)]
            fake.wait_for(lambda: len(fake.asked) == 8)
            fake.script = Reply(status=503, error="shutting down")
            fake.stop()
            found = {job.future.result(20).alternatives[0].spans[0].text for job in jobs}
        assert found <= {"local", "a + b"}
        assert "local" in found

    def test_a_server_that_hangs_is_found_out_while_a_request_waits(self, fake: FakeOpenAI) -> None:
        local = FakeWorker(Script(texts=["local"]))
        # It is not looked at but where somebody waits.
        pace = Pace(well_s=60, first_s=0.02, patience_s=0.3, doubt_s=0.05)
        with remote_worker(fake.url, lambda: local, pace=pace, fail_over=True) as worker:
            fake.hold()
            job = worker.submit(gap(CODE))
            fake.wait_for(lambda: len(fake.asked) == 1)
            looks = fake.paths.count("/v1/models")
            wait_until(lambda: fake.paths.count("/v1/models") > looks)
            # A server that is merely slow is waited for.
            assert not job.future.done()
            fake.models_reply = Reply(status=503, error="nobody is here")
            assert job.future.result(20).alternatives[0].spans[0].text == "local"
            wait_until(lambda: fake.dropped == 1)

    def test_feedback_reaches_whoever_answered(self, fake: FakeOpenAI) -> None:
        local = FakeWorker()
        with remote_worker(fake.url, lambda: local, fail_over=True) as worker:
            there = worker.submit(gap(CODE)).future.result(20)
            fake.stop()
            here = worker.submit(gap(CODE)).future.result(20)
            worker.feedback(there.id, "shown")
            worker.feedback(here.id, "inserted", chars=3)
            assert local.told == [(local.jobs[0].id, "inserted", 0, 3)]

    def test_conversations_fail_over_too(self, fake: FakeOpenAI) -> None:
        fake.stop()
        local = FakeWorker(Script(texts=["hello you"]))
        with remote_worker(fake.url, lambda: local, fail_over=True) as worker:
            request = ChatRequest(messages=(Message("user", "hi"),))
            updates: list[Any] = []
            result = worker.submit(request, updates.append).future.result(20)
            assert result.answers[0].text == "hello you"
            assert updates

    def test_trouble_with_the_local_model_is_told(self, fake: FakeOpenAI) -> None:
        fake.stop()

        def make() -> Worker:
            raise CheckpointMissing("no weights")

        with (
            remote_worker(fake.url, make, fail_over=True) as worker,
            pytest.raises(CheckpointMissing),
        ):
            text_of(worker)
        local = FakeWorker(Script(error=Unsupported("not this")))
        with (
            remote_worker(fake.url, lambda: local, fail_over=True) as worker,
            pytest.raises(Unsupported),
        ):
            text_of(worker)

    def test_closing_does_not_wait_for_a_model_that_loads(self, fake: FakeOpenAI) -> None:
        fake.stop()
        local = FakeWorker(is_loading=True)
        began = time.monotonic()
        with remote_worker(fake.url, lambda: local, fail_over=True) as worker:
            job = worker.submit(gap(CODE))
        assert job.future.exception(20) is not None
        assert time.monotonic() - began < 4


class TestDoctor:
    def test_it_says_who_answers(self, fake: FakeOpenAI, tmp_path: Path) -> None:
        from infilld.server.remote.checking import checked
        from infilld.server.settings import Settings

        key = tmp_path / "key"
        key.write_text("k")
        key.chmod(0o644)
        wanted = Settings(engine=f"openai:{fake.url}", engine_key_file=key, fail_over=True)
        said = checked(wanted)
        assert f"diffusion at {fake.url}" in said
        assert f"chmod 600 {key}" in said
        fake.key = "other"
        with pytest.raises(Unavailable, match="refuses the key"):
            checked(wanted)
        fake.stop()
        with pytest.raises(Unavailable, match="does not answer"):
            checked(wanted)
