"""A remote engine as a worker: what goes out, what comes back, what becomes of trouble."""

import itertools
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_openai import FakeOpenAI, Reply
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from remote_at_work import fenced, gap, remote_worker, wait_until

from infilld.engine.conversation import ChatRequest, ChatResult, ChatUpdate, Message
from infilld.engine.errors import (
    BadGrammar,
    Busy,
    Cancelled,
    ContextTooLong,
    InfilldError,
    RequestError,
    Unavailable,
    UnknownId,
    UnknownOption,
    Unsupported,
)
from infilld.engine.request import (
    CanvasUpdate,
    Grammar,
    InfillRequest,
    InfillResult,
    Pin,
    Span,
)
from infilld.server.remote.worker import RemoteWorker

CODE = "def add(a, b):\n    return |\n\n\nprint(add(1, 2))\n"
SUM = fenced("    return a + b")


@pytest.fixture(scope="module")
def running() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


@pytest.fixture
def fake(running: FakeOpenAI) -> Iterator[FakeOpenAI]:
    running.reset(Reply(texts=[SUM]))
    yield running
    running.release()


@pytest.fixture
def worker(fake: FakeOpenAI) -> Iterator[RemoteWorker]:
    with remote_worker(fake.url) as running:
        yield running


def filled(worker: RemoteWorker, request: InfillRequest) -> InfillResult:
    result = worker.submit(request).future.result(20)
    assert isinstance(result, InfillResult)
    return result


def texts(result: InfillResult) -> list[str]:
    return [each.spans[0].text for each in result.alternatives]


def talk(**more: Any) -> ChatRequest:
    return ChatRequest(messages=(Message("system", "be brief"), Message("user", "hi")), **more)


class TestInfill:
    def test_a_gap_is_filled(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        request = gap(CODE, path="add.py")
        result = filled(worker, request)
        (span,) = result.alternatives[0].spans
        assert (span.text, span.start, span.end) == ("a + b", 26, 26)
        assert result.reason == "ok"
        assert result.usage.prompt_tokens == 100
        assert result.usage.cached_tokens == 40
        (asked,) = fake.asked
        assert asked["model"] == "diffusion"
        assert asked["stream"] is True
        assert asked["chat_template_kwargs"] == {"enable_thinking": False}
        assert "suffix" not in asked
        assert "<gap>" in asked["messages"][0]["content"]

    def test_what_returns_log_probabilities_is_ranked_by_them(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=[fenced("a - b"), fenced("a + b")], nats=[-0.5, -0.1])
        result = filled(worker, gap(CODE, alternatives=2))
        assert texts(result) == ["a + b", "a - b"]
        assert result.alternatives[0].score == pytest.approx(-0.1)
        assert result.alternatives[0].spans[0].confidence == pytest.approx(math.exp(-0.1))
        assert fake.asked[0]["n"] == 2
        assert "temperature" not in fake.asked[0]

    def test_what_returns_none_keeps_its_order_and_claims_nothing(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=[fenced("a - b"), SUM, fenced("a + b")])
        result = filled(worker, gap(CODE, alternatives=3, boldness=0.0))
        assert texts(result) == ["a - b", "a + b"]
        assert [each.score for each in result.alternatives] == [0, 0]
        assert result.alternatives[0].spans[0].confidence == 0

    def test_the_unsure_is_held_back_from_the_shy(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=[SUM], nats=[-0.7])
        assert texts(filled(worker, gap(CODE))) == ["a + b"]
        assert filled(worker, gap(CODE, boldness=0.1)).reason == "low_confidence"

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ("", "empty"),
            ("I am sorry, but", "filtered"),
            (fenced("    return"), "empty"),
            (fenced("    return (a + b"), "unbalanced"),
            (fenced("    return a b"), "does_not_parse"),
            (fenced("    return a +\n" + "b +\n" * 40), "repetition"),
        ],
    )
    def test_the_filters_of_local_fills_hold(
        self, fake: FakeOpenAI, worker: RemoteWorker, answer: str, reason: str
    ) -> None:
        fake.script = Reply(texts=[answer])
        result = filled(worker, gap(CODE, path="add.py"))
        assert result.alternatives == ()
        assert result.reason == reason
        assert result.why

    def test_what_stands_behind_the_gap_is_not_written_again(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=[fenced("x = total(1)\ny = 2")])
        assert filled(worker, gap("x = total(1)\n|\ny = 2\n", path="a.py")).reason == "empty"

    def test_line_ends_are_those_of_the_document(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=[fenced("    if a:\n        return b\n    return a + b")])
        text = CODE.replace("return |", "|").replace("\n", "\r\n")
        assert texts(filled(worker, gap(text))) == ["if a:\r\n        return b\r\n    return a + b"]
        assert "\r" not in fake.asked[0]["messages"][0]["content"]

    def test_pins_stay(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(texts=[fenced("    return (a + b)")])
        pins = (Pin(0, "start", "("), Pin(0, "end", ")"))
        assert texts(filled(worker, gap(CODE, pins=pins))) == ["(a + b)"]
        assert "return (<gap>)" in fake.asked[0]["messages"][0]["content"]

    def test_several_spans_are_asked_side_by_side(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        def script(body: dict[str, Any]) -> Reply:
            shown = body["messages"][0]["content"]
            return Reply(texts=[fenced("x = 1" if "x = <gap>" in shown else "y = 2")])

        fake.script = script
        fake.hold()
        job = worker.submit(gap("x = |\ny = |\n"))
        fake.wait_for(lambda: len(fake.asked) == 2)
        fake.release()
        result = job.future.result(20)
        spans = result.alternatives[0].spans
        assert [(span.start, span.text) for span in spans] == [(4, "1"), (9, "2")]

    def test_one_refusal_ends_the_others(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        def script(body: dict[str, Any]) -> Reply:
            if "x = <gap>" in body["messages"][0]["content"]:
                return Reply(status=400, error="no", asked_before=2)
            return Reply(holds_after=0)

        fake.script = script
        with pytest.raises(RequestError):
            filled(worker, gap("x = |\ny = |\n"))
        fake.wait_for(lambda: fake.dropped == 1)

    def test_blanks_at_the_end_are_trimmed(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(texts=[fenced("    return a + b   ")])
        assert texts(filled(worker, gap(CODE))) == ["a + b"]

    def test_a_rewrite_changes_its_lines(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(texts=[fenced("y = 3\nz = 4")])
        text = "x = 1\ny = 2\nz = 9\nw = 0\n"
        request = InfillRequest(text=text, spans=(Span(6, 18),), instruction="count")
        assert texts(filled(worker, request)) == ["y = 3\nz = 4\n"]
        assert "<selection>y = 2\nz = 9\n</selection>" in fake.asked[0]["messages"][0]["content"]

    def test_a_rewrite_that_was_cut_off_deletes_nothing(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=["```python\ny = 3\nz"], finish="length")
        request = InfillRequest(text="y = 2\nz = 9\n", spans=(Span(0, 12),), instruction="count")
        assert filled(worker, request).reason == "filtered"

    def test_a_gap_that_was_cut_off_keeps_whole_lines(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=["```python\nx = 1\ny = 2\nz = f("], finish="length")
        assert texts(filled(worker, gap("|\n"))) == ["x = 1\ny = 2"]

    def test_max_tokens_bounds_the_text(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(texts=[fenced("one = 1\ntwo = 22222")], nats=[-0.1])
        assert texts(filled(worker, gap("|\n", max_tokens=4))) == ["one = 1"]
        assert filled(worker, gap("|\n", max_tokens=1)).reason == "empty"
        assert filled(worker, gap("|\n", min_tokens=50)).reason == "empty"

    def test_a_repair_changes_what_is_named(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(texts=[fenced("x = 1 + 2")])
        request = InfillRequest(text="x = 1 * 2\n", spans=(Span(0, 9),), repair=(Span(6, 7),))
        assert texts(filled(worker, request)) == ["x = 1 + 2"]
        with pytest.raises(Unsupported) as raised:
            filled(worker, InfillRequest(text="x = 1\n", spans=(Span(0, 5),), repair=()))
        assert raised.value.remedy

    def test_warming_asks_for_one_token(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        result = filled(worker, gap(CODE, warm=True, alternatives=3))
        assert result.alternatives == ()
        assert fake.asked[0]["max_tokens"] == 1
        assert "n" not in fake.asked[0]

    def test_binary_text_is_not_sent(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        assert filled(worker, gap("a\0b|")).reason == "filtered"
        assert not fake.asked

    def test_thinking_is_switched_on(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(texts=[SUM], thoughts="```\nno\n```")
        assert texts(filled(worker, gap(CODE, think=True))) == ["a + b"]
        assert fake.asked[0]["chat_template_kwargs"] == {"enable_thinking": True}

    def test_drafts_are_shown_as_they_come(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(texts=[SUM], piece_chars=22)
        updates: list[CanvasUpdate] = []
        result = worker.submit(gap(CODE), updates.append).future.result(20)
        assert updates
        assert all(each.spans[0].settled == 0 for each in updates)
        assert result.alternatives[0].spans[0].text.startswith(updates[0].spans[0].text)

    def test_what_answers_without_a_stream_is_understood(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=[SUM], is_plain=True, nats=[-0.2])
        result = filled(worker, gap(CODE))
        assert texts(result) == ["a + b"]
        assert result.alternatives[0].score == pytest.approx(-0.2)


SPAN_TEXTS = st.text(st.sampled_from("ab=( \r\n)"), max_size=40).map(
    lambda text: text.replace("\r", "\r\n")
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), text=SPAN_TEXTS, said=st.text(max_size=40), has_pin=st.booleans())
def test_only_spans_change_and_pins_hold(
    fake: FakeOpenAI,
    worker: RemoteWorker,
    data: st.DataObject,
    text: str,
    said: str,
    has_pin: bool,
) -> None:
    places = [at for at in range(len(text) + 1) if text[max(0, at - 1) : at + 1] != "\r\n"]
    start, end = sorted((data.draw(st.sampled_from(places)), data.draw(st.sampled_from(places))))
    pins = (Pin(0, "start", "<<"), Pin(0, "end", ">>")) if has_pin else ()
    fake.script = Reply(texts=[fenced(said)])
    result = filled(worker, InfillRequest(text=text, spans=(Span(start, end),), pins=pins))
    for choice in result.alternatives:
        (span,) = choice.spans
        assert (span.start, span.end) == (start, end)
        if pins:
            assert span.text.startswith("<<")
            assert span.text.endswith(">>")
        if "\n" in text[:start] and text.count("\n") == text.count("\r\n"):
            assert "\n" not in span.text.replace("\r\n", "")


class TestConversation:
    def test_blocks_arrive_one_after_another(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(texts=["one two three"], thoughts="hm", piece_chars=4)
        updates: list[ChatUpdate] = []
        result = worker.submit(talk(max_tokens=9, seed=3, stop=("x",)), updates.append)
        answer = result.future.result(20).answers[0]
        assert (answer.text, answer.thoughts, answer.finish) == ("one two three", "hm", "stop")
        shown = [each.text for each in updates]
        assert all(later.startswith(one) for one, later in itertools.pairwise(shown))
        assert updates[-1].text == "one two three"
        assert [each.seq for each in updates] == list(range(len(updates)))
        (asked,) = fake.asked
        assert asked["messages"][0] == {"role": "system", "content": "be brief"}
        assert (asked["max_tokens"], asked["seed"], asked["stop"]) == (9, 3, ["x"])

    def test_an_answer_at_its_limit_says_so(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(texts=["one", "two"], finish="length")
        result = worker.submit(talk(alternatives=2)).future.result(20)
        assert [(each.text, each.finish) for each in result.answers] == [
            ("one", "length"),
            ("two", "length"),
        ]

    def test_a_deadline_ends_it_with_what_is_there(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=["one two three"], piece_chars=4, holds_after=3)
        answer = worker.submit(talk(deadline_ms=400)).future.result(20).answers[0]
        assert (answer.text, answer.finish) == ("one two ", "deadline")
        result = worker.submit(talk(deadline_ms=100)).future.result(20)
        assert (result.answers, result.reason) == ((), "deadline")

    def test_a_long_answer_may_take_its_time_and_silence_may_not(
        self, fake: FakeOpenAI, worker: RemoteWorker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("infilld.server.remote.asking.SILENCE_S", 0.3)
        fake.script = Reply(texts=["one two three four"], piece_chars=4, pause_s=0.05)
        began = time.monotonic()
        answer = worker.submit(talk()).future.result(20).answers[0]
        assert (answer.text, answer.finish) == ("one two three four", "stop")
        assert time.monotonic() - began > 0.3
        fake.script = Reply(texts=["one two three"], piece_chars=4, holds_after=3)
        for request in (talk(), gap(CODE)):
            with pytest.raises(Unavailable, match=r"nothing came for 0\.3 s"):
                worker.submit(request).future.result(20)
            # One request's trouble is not everybody's.
            assert worker.state == "ready"
        assert worker.submit(talk(deadline_ms=400)).future.result(20).reason == "deadline"

    def test_a_text_that_was_shown_is_not_begun_anew(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=["one two"], thoughts="hm", piece_chars=3, breaks_off=True)
        heard: list[ChatUpdate] = []

        def script(body: dict[str, Any]) -> Reply:
            return Reply(raw=b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n')

        fake.script = script
        with pytest.raises(Unavailable):
            worker.submit(talk(), heard.append).future.result(20)
        assert len(fake.asked) == 1
        # Where nobody watched, it is asked again.
        with pytest.raises(Unavailable):
            worker.submit(talk()).future.result(20)
        assert len(fake.asked) == 3


class TestGrammars:
    @pytest.mark.parametrize(
        ("grammar", "key", "value"),
        [
            (Grammar("json"), "response_format", {"type": "json_object"}),
            (Grammar("regex", "a+"), "structured_outputs", {"regex": "a+"}),
            (Grammar("gbnf", "root ::= x"), "structured_outputs", {"grammar": "root ::= x"}),
        ],
    )
    def test_they_are_passed_on(
        self, fake: FakeOpenAI, worker: RemoteWorker, grammar: Grammar, key: str, value: object
    ) -> None:
        worker.submit(talk(grammar=grammar)).future.result(20)
        assert fake.asked[0][key] == value

    def test_a_schema_is_passed_on(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        worker.submit(talk(grammar=Grammar("json_schema", '{"type": "object"}'))).future.result(20)
        told = fake.asked[0]["response_format"]["json_schema"]
        assert told["schema"] == {"type": "object"}

    def test_a_refusal_is_a_bad_grammar(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(status=400, error="Structured outputs are not supported for diffusion")
        with pytest.raises(BadGrammar, match="are not supported") as raised:
            worker.submit(talk(grammar=Grammar("regex", "a+"))).future.result(20)
        assert raised.value.remedy

    def test_an_infill_in_a_shape_has_no_fence(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(texts=['{"a": 1}'])
        result = filled(worker, gap("x = |\n", grammar=Grammar("json")))
        assert texts(result) == ['{"a": 1}']


class TestRefusals:
    def test_what_a_server_does_not_know_is_left_out_from_then_on(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        def script(body: dict[str, Any]) -> Reply:
            for name in ("chat_template_kwargs", "logprobs"):
                if name in body:
                    return Reply(status=400, error=f"Unrecognized request argument: {name}")
            return Reply(texts=[SUM])

        fake.script = script
        assert texts(filled(worker, gap(CODE))) == ["a + b"]
        assert len(fake.asked) == 3
        assert texts(filled(worker, gap(CODE))) == ["a + b"]
        assert len(fake.asked) == 4

    @pytest.mark.parametrize(
        "error",
        [
            "Bad character in 'np.random.seed(3)\\nlogprobs = temperature'",
            'in the body: {"temperature": 0, "seed": 3, "logprobs": true, "stream": true}',
            "random_seed, or `seeds`, are none of the temperatures",
        ],
    )
    def test_a_refusal_that_quotes_the_source_names_no_key(
        self, fake: FakeOpenAI, worker: RemoteWorker, error: str
    ) -> None:
        code = "np.random.seed(3)\nlogprobs = temperature\n|\n"
        fake.script = Reply(status=400, error=error)
        with pytest.raises(RequestError):
            filled(worker, gap(code, seed=3))
        assert len(fake.asked) == 1

    def test_what_is_refused_without_a_key_too_says_nothing_of_the_key(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(status=422, error="logprobs: the document is unreadable")
        with pytest.raises(RequestError):
            filled(worker, gap(CODE))
        assert ["logprobs" in each for each in fake.asked] == [True, False]
        fake.script = Reply(texts=[SUM])
        assert texts(filled(worker, gap(CODE))) == ["a + b"]
        assert "logprobs" in fake.asked[-1]

    def test_a_prompt_that_is_too_long_is_halved(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        def script(body: dict[str, Any]) -> Reply:
            if len(body["messages"][0]["content"]) > 20_000:
                return Reply(status=400, error="maximum context length is 4096 tokens")
            return Reply(texts=[SUM])

        fake.script = script
        assert texts(filled(worker, gap("# filler\n" * 9000 + CODE))) == ["a + b"]
        assert len(fake.asked) == 2

    def test_a_prompt_that_is_always_too_long_is_refused(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.script = Reply(status=400, error="maximum context length is 4096 tokens")
        with pytest.raises(ContextTooLong):
            filled(worker, gap("# filler\n" * 9000 + CODE))
        with pytest.raises(ContextTooLong):
            worker.submit(talk()).future.result(20)

    def test_the_window_follows_from_what_the_model_reads(self) -> None:
        with FakeOpenAI(Reply(texts=[SUM])) as fake:
            fake.models[0]["max_model_len"] = 512
            with remote_worker(fake.url) as worker:
                assert texts(filled(worker, gap("# filler\n" * 9000 + CODE))) == ["a + b"]
                assert worker.describe()["prompt_tokens"] == 512
            (asked,) = fake.asked
            assert len(asked["messages"][0]["content"]) + 4 * asked["max_tokens"] <= 512 * 4

    def test_no_error_quotes_the_request(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(status=400, error=f"cannot read {CODE.replace('|', '')!r}: broken")
        with pytest.raises(RequestError) as raised:
            filled(worker, gap(CODE))
        assert "print(add" not in str(raised.value)
        fake.script = Reply(status=400, error="the number of the beast\n" + "x" * 5000)
        with pytest.raises(RequestError, match="the number of the beast") as raised:
            filled(worker, gap(CODE))
        assert len(str(raised.value)) < 400

    def test_a_full_server_is_busy(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(status=429, error="slow down")
        with pytest.raises(Busy):
            filled(worker, gap(CODE))
        assert worker.state == "ready"

    def test_redirects_are_not_followed(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.script = Reply(status=307, error="", headers={"location": f"{fake.url}/elsewhere"})
        with pytest.raises(Unavailable, match="307"):
            filled(worker, gap(CODE))
        assert "/elsewhere" not in fake.paths

    @pytest.mark.parametrize(
        "raw", [b"data: {]\n\n", b"data: [1]\n\n", b"<html>", b"", b'data: {"choices": 3}\n\n']
    )
    def test_what_is_no_answer_is_an_error(
        self, fake: FakeOpenAI, worker: RemoteWorker, raw: bytes
    ) -> None:
        fake.script = Reply(raw=raw)
        with pytest.raises(Unavailable):
            filled(worker, gap(CODE))

    def test_an_endless_answer_is_cut(
        self, fake: FakeOpenAI, worker: RemoteWorker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("infilld.server.remote.service._MOST_BYTES", 1000)
        fake.script = Reply(texts=["x" * 2000])
        with pytest.raises(Unavailable, match="longer than"):
            filled(worker, gap(CODE))


class TestQueue:
    def test_a_cancelled_job_ends_at_the_server_at_once(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.hold()
        taken_s = []
        for number in range(1, 4):
            job = worker.submit(gap(CODE))
            fake.wait_for(lambda: len(fake.asked) == number)  # noqa: B023  # called at once
            began = time.monotonic()
            job.cancel()
            fake.wait_for(lambda: fake.dropped == number)  # noqa: B023
            taken_s.append(time.monotonic() - began)
            with pytest.raises(Cancelled):
                job.future.result(20)
        # A busy machine is slow now and then; what waits for something waits every time.
        assert min(taken_s) < 0.1

    def test_a_newer_request_of_a_document_takes_over(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.hold()
        old = worker.submit(gap(CODE, document="a"))
        other = worker.submit(gap(CODE, document="b"))
        fake.wait_for(lambda: len(fake.asked) == 2)
        new = worker.submit(gap(CODE, document="a"))
        assert old.future.result(20).reason == "superseded"
        fake.wait_for(lambda: fake.dropped == 1)
        fake.release()
        assert new.future.result(20).reason == other.future.result(20).reason == "ok"

    def test_a_deadline_holds_while_the_server_is_slow(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.hold()
        taken_s = []
        for _ in range(3):
            began = time.monotonic()
            result = worker.submit(gap(CODE, deadline_ms=150)).future.result(20)
            taken_s.append(time.monotonic() - began)
            assert result.reason == "deadline"
        assert min(taken_s) < 0.4

    def test_of_several_spans_those_in_time_are_shown(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        def script(body: dict[str, Any]) -> Reply:
            if "y = <gap>" in body["messages"][0]["content"]:
                fake.hold()
            return Reply(texts=[fenced("x = 1")], is_plain="x = <gap>" in str(body["messages"]))

        fake.script = script
        result = worker.submit(gap("x = |\ny = |\n", deadline_ms=400)).future.result(20)
        assert [span.text for span in result.alternatives[0].spans] == ["1", ""]
        assert "1 of 2 places" in result.why

    def test_a_deadline_strikes_in_the_queue(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        fake.hold()
        jobs = [worker.submit(gap(CODE)) for _ in range(8)]
        waiting = worker.submit(gap(CODE, deadline_ms=100))
        cancelled = worker.submit(gap(CODE))
        cancelled.cancel()
        assert waiting.future.result(20).reason == "deadline"
        with pytest.raises(Cancelled):
            cancelled.future.result(20)
        assert len(fake.asked) <= 8
        fake.release()
        assert all(job.future.result(20).reason == "ok" for job in jobs)

    def test_the_background_waits_and_the_queue_is_bounded(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        fake.hold()
        first = worker.submit(gap(CODE))
        fake.wait_for(lambda: len(fake.asked) == 1)
        later = worker.submit(gap(CODE, background=True))
        others = [worker.submit(gap(CODE)) for _ in range(7)]
        wait_until(lambda: worker.stats()["running"] == 8)
        queued = [worker.submit(gap(CODE)) for _ in range(256)]
        with pytest.raises(Busy):
            worker.submit(gap(CODE))
        for job in queued:
            job.cancel()
        assert not later.future.done()
        fake.release()
        for job in (first, *others, later):
            assert job.future.result(20).reason == "ok"

    def test_a_job_that_is_not_wanted_before_its_first_step_is_answered(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        began, ends = threading.Event(), threading.Event()
        worker._soon(lambda: began.wait(20))
        job = worker.submit(gap(CODE))
        worker._soon(lambda: ends.wait(20))
        # It comes in the same turn of the loop, and sweeps.
        other = worker.submit(gap(CODE))
        began.set()
        wait_until(lambda: worker.stats()["running"] == 2)
        job.cancel()
        ends.set()
        with pytest.raises(Cancelled):
            job.future.result(20)
        assert other.future.result(20).reason == "ok"
        assert worker.stats()["running"] == 0

    def test_closing_ends_what_is_open(self, fake: FakeOpenAI) -> None:
        with remote_worker(fake.url) as worker:
            fake.hold()
            jobs = [worker.submit(gap(CODE)) for _ in range(10)]
            fake.wait_for(lambda: len(fake.asked) == 8)
        for job in jobs:
            with pytest.raises(Cancelled):
                job.future.result(20)
        with pytest.raises(InfilldError):
            worker.submit(gap(CODE))
        assert not [each for each in threading.enumerate() if each.name == "infilld-remote"]


class TestRecords:
    def test_feedback_is_for_what_was_answered(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        result = filled(worker, gap(CODE))
        worker.feedback(result.id, "inserted")
        with pytest.raises(UnknownOption):
            worker.feedback(result.id, "shown", choice=1)
        with pytest.raises(UnknownId):
            worker.feedback("nobody", "shown")
        stats = worker.stats()
        assert stats["feedback"] == {"inserted": 1}
        assert stats["reasons"] == {"ok": 1}
        assert stats["answered"] == {"remote": 1, "local": 0}

    def test_times_are_none_that_nobody_waited(
        self, fake: FakeOpenAI, worker: RemoteWorker
    ) -> None:
        assert worker.stats()["p50_ms"] is worker.stats()["p95_ms"] is None
        waited = [filled(worker, gap(CODE)).timings.total_ms]
        assert worker.stats()["p50_ms"] == worker.stats()["p95_ms"] == waited[0]
        fake.script = Reply(texts=[SUM], pause_s=0.02)
        waited.append(filled(worker, gap(CODE)).timings.total_ms)
        told = worker.stats()
        assert told["p50_ms"] == pytest.approx(sum(waited) / 2)
        assert told["p95_ms"] == pytest.approx(0.05 * min(waited) + 0.95 * max(waited))

    def test_it_says_what_it_is(self, fake: FakeOpenAI, worker: RemoteWorker) -> None:
        told = worker.describe()
        assert (told["model"], told["device"], told["url"]) == ("diffusion", "remote", fake.url)
        assert (told["engine"], told["reachable"]) == ("remote", True)
        worker.unload()
        with pytest.raises(Unsupported, match="remote") as raised:
            worker.switch(None)
        assert "engine_model" in raised.value.remedy


def test_neither_torch_nor_a_tokenizer_is_loaded() -> None:
    code = (
        "import sys, infilld.server.remote\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=Path.home())


def test_results_are_of_the_kind_that_was_asked(fake: FakeOpenAI, worker: RemoteWorker) -> None:
    fake.hold()
    job = worker.submit(talk(document="a"))
    fake.wait_for(lambda: len(fake.asked) == 1)
    worker.submit(talk(document="a"))
    assert isinstance(job.future.result(20), ChatResult)
    fake.release()
