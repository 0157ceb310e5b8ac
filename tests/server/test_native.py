"""`POST /v1/infill` over a real socket: shapes, refusals, streams and cancelled jobs."""

import json
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake_worker import FakeWorker, Script
from live_server import LiveServer, live_server

from infilld.engine import errors
from infilld.engine.request import Context, Pin, Span
from infilld.server import app, wire
from infilld.server.client import ServerProblem

TEXT = "def f():\n    \n"
BODY: dict[str, Any] = {"text": TEXT, "spans": [{"start": 13, "end": 13}]}
EDGE = {"start": 0, "end": 0}
SELECTED = {"spans": [{"start": 0, "end": 8}]}
IN_LINE_END, MANY = "span_out_of_range", "bad_request"


def post(server: LiveServer, body: object, path: str = "/v1/infill") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        server.url + path,
        content=content,
        headers={"Authorization": f"Bearer {server.token}", "Content-Type": "application/json"},
        timeout=20,
    )


def error_of(got: httpx.Response) -> dict[str, str]:
    content = got.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"code", "message", "remedy", "type", "param"}
    error: dict[str, str] = content["error"]
    return error


def asked(**more: Any) -> wire.InfillRequest:
    return wire.InfillRequest.model_validate(BODY | more)


def test_the_reply_has_the_documented_shape(server: LiveServer) -> None:
    got = post(server, BODY | {"seed": 3})
    assert got.status_code == 200
    assert got.json() == {
        "id": "job-0",
        "model": "fake",
        "seed": 3,
        "choices": [
            {
                "spans": [{"start": 13, "end": 13, "text": "return 1", "confidence": 0.9}],
                "score": -0.1,
            }
        ],
        "reason": "ok",
        "why": "",
        "usage": {
            "prompt_tokens": 10,
            "cached_tokens": 0,
            "canvas_tokens": 16,
            "passes": 2,
            "text_tokens": 2,
        },
        "timings": {"queue_ms": 0.0, "encode_ms": 0.0, "denoise_ms": 1.0, "total_ms": 1.5},
    }


def test_every_field_reaches_the_engine(server: LiveServer) -> None:
    sent = {
        "document": "d",
        "path": "a.py",
        "language": "python",
        "instruction": "shorten",
        "n": 2,
        "min_tokens": 1,
        "max_tokens": 9,
        "deadline_ms": 500,
        "seed": 5,
        "boldness": 0.25,
        "think": True,
        "warm": True,
        "background": True,
    }
    assert post(server, BODY | sent).status_code == 200
    got = server.worker.jobs[0].request
    assert got.alternatives == sent.pop("n")
    assert {name: getattr(got, name) for name in sent} == sent
    assert got.text == TEXT


def test_what_belongs_to_spans_reaches_the_engine(server: LiveServer) -> None:
    sent = {
        "spans": [{"start": 9, "end": 13}, {"start": 4, "end": 5}],
        "context": [{"path": "b.py", "text": "B\n", "kind": "definition"}],
        "pins": [
            {"span": 1, "at": "start", "text": "g"},
            {"span": 1, "at": "end", "text": "h"},
        ],
        "draft": [None, "gh"],
        "repair": [{"start": 10, "end": 12}],
    }
    assert post(server, BODY | sent).status_code == 200
    got = server.worker.jobs[0].request
    assert got.spans == (Span(9, 13), Span(4, 5))
    assert got.context == (Context("b.py", "B\n", "definition"),)
    assert got.pins == (Pin(1, "start", "g"), Pin(1, "end", "h"))
    assert got.drafts == (None, "gh")
    assert got.repair == (Span(10, 12),)


@pytest.mark.parametrize("sent", [{}, {"repair": None}])
def test_no_repair_is_asked_for_by_default(server: LiveServer, sent: dict[str, object]) -> None:
    assert post(server, BODY | sent).status_code == 200
    assert server.worker.jobs[0].request.repair is None


def test_an_empty_list_of_repairs_lets_the_model_find_them(server: LiveServer) -> None:
    sent = {"spans": [{"start": 0, "end": 8}], "repair": []}
    assert post(server, BODY | sent).status_code == 200
    assert server.worker.jobs[0].request.repair == ()
    with server.client() as client:
        client.infill(asked(**sent))
    assert server.worker.jobs[1].request.repair == ()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_several_spans_answer_in_the_order_asked(server: LiveServer, is_streamed: bool) -> None:
    server.worker.script = Script(texts=[["late", "early"]], drafts=[["lxte", "early"]])
    spans = [{"start": 9, "end": 13}, {"start": 0, "end": 0}]
    with server.client() as client:
        request = asked(spans=spans)
        events = list(client.stream(request)) if is_streamed else [client.infill(request)]
    *canvases, reply = events
    assert isinstance(reply, wire.InfillReply)
    got = [(span.start, span.end, span.text) for span in reply.choices[0].spans]
    assert got == [(9, 13, "late"), (0, 0, "early")]
    for event in canvases:
        assert isinstance(event, wire.CanvasEvent)
        assert [(span.text, span.settled) for span in event.spans] == [("lxte", 1), ("early", 5)]


def test_silence_is_a_result_with_a_reason(server: LiveServer) -> None:
    server.worker.script = Script(reason="low_confidence", why="Nothing was certain.")
    got = post(server, BODY)
    assert got.status_code == 200
    assert (got.json()["choices"], got.json()["reason"]) == ([], "low_confidence")
    assert got.json()["why"] == "Nothing was certain."


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "bad_request"),
        (b"{", "malformed_json"),
        (b"\xff\xfe", "malformed_json"),
        (b"[" * 100_000, "malformed_json"),
        (b"[]", "bad_request"),
        (b"null", "bad_request"),
        ({}, "bad_request"),
        (BODY | {"txet": 1}, "unknown_key"),
        (BODY | {"spans": [{"start": 0, "end": 0, "ned": 1}]}, "unknown_key"),
        (BODY | {"text": 5}, "bad_request"),
        (BODY | {"n": "2"}, "bad_request"),
        (BODY | {"n": 2.0}, "bad_request"),
        (BODY | {"n": True}, "bad_request"),
        (BODY | {"stream": "yes"}, "bad_request"),
        (BODY | {"n": 9}, "unknown_option"),
        (BODY | {"seed": 2**63}, "unknown_option"),
        (BODY | {"deadline_ms": 0}, "unknown_option"),
        (BODY | {"spans": []}, "bad_request"),
        (BODY | {"spans": [{"start": 0, "end": 15}]}, "span_out_of_range"),
        (BODY | {"spans": [{"start": -1, "end": 0}]}, "span_out_of_range"),
        (BODY | {"spans": [{"start": 2, "end": 1}]}, "span_out_of_range"),
        (BODY | {"spans": [{"start": 0, "end": 2}, {"start": 1, "end": 3}]}, "spans_overlap"),
        (BODY | {"text": "\ud800" * 20}, "bad_text"),
        (BODY | {"instruction": "\udc00"}, "bad_text"),
        (BODY | {"spans": [{"start": 14, "end": 14}], "text": "def f():\n    \r\n"}, IN_LINE_END),
        (BODY | {"pins": [{"span": 1, "at": "start", "text": "a"}]}, "unknown_option"),
        (BODY | {"pins": [{"span": 0, "at": "end", "text": "a"}] * 2}, "unknown_option"),
        (BODY | {"pins": [{"span": 0, "at": "end", "text": "\ud800"}]}, "bad_text"),
        (BODY | {"pins": [{"span": 0, "at": "middle", "text": "a"}]}, "bad_request"),
        (BODY | {"draft": ["a", None]}, "unknown_option"),
        (BODY | {"draft": ["\udfff"]}, "bad_text"),
        (BODY | {"context": [{"path": "b", "text": "c", "kind": "closed"}]}, "bad_request"),
        (BODY | {"context": [{"path": "b", "text": "\ud800", "kind": "open"}]}, "bad_text"),
        (BODY | {"context": [{"path": "b", "text": "c"}]}, "bad_request"),
        (BODY | {"context": [{"path": "", "text": "", "kind": "open"}] * 257}, "bad_request"),
        (BODY | {"repair": []}, "unknown_option"),
        (BODY | SELECTED | {"repair": [{"start": 1, "end": 1}]}, "span_out_of_range"),
        (BODY | SELECTED | {"repair": [{"start": 1, "end": 9}]}, "span_out_of_range"),
        (BODY | SELECTED | {"repair": [{"start": 1, "end": 2}] * 257}, "bad_request"),
        (BODY | {"boldness": 1.1}, "unknown_option"),
        (BODY | {"boldness": -0.1}, "unknown_option"),
        (BODY | {"boldness": "0.5"}, "bad_request"),
        (BODY | {"boldness": True}, "bad_request"),
        (BODY | {"boldness": float("nan")}, "bad_request"),
        (BODY | {"think": 1}, "bad_request"),
        (BODY | {"background": "no"}, "bad_request"),
        (BODY | {"spans": [{"start": i, "end": i} for i in range(65)], "text": "x" * 65}, MANY),
    ],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_bad_request_is_a_400_with_a_code(
    shared: LiveServer, body: object, code: str, is_streamed: bool
) -> None:
    if isinstance(body, dict) and is_streamed:
        body = {"stream": True} | body
    got = post(shared, body)
    assert (got.status_code, error_of(got)["code"]) == (400, code)
    assert shared.worker.jobs == []


@pytest.mark.parametrize(
    ("key", "highest"),
    [
        ("deadline_ms", wire.MAX_DEADLINE_MS),
        ("seed", wire.MAX_SEED),
        ("min_tokens", wire.MAX_TOKENS),
        ("max_tokens", wire.MAX_TOKENS),
    ],
)
def test_numbers_have_bounds(server: LiveServer, key: str, highest: int) -> None:
    """The highest is one the engine's own record takes; beyond it nothing reaches the engine."""
    assert post(server, BODY | {key: highest}).status_code == 200
    for number in (highest + 1, 10**400, -1, -(10**400)):
        for is_streamed in (False, True):
            got = post(server, BODY | {key: number, "stream": is_streamed})
            assert (got.status_code, error_of(got)["code"]) == (400, "unknown_option")
            assert key in error_of(got)["message"]
            assert len(got.content) < 1_000
    assert len(server.worker.jobs) == 1


@pytest.mark.parametrize("number", ["1" + "0" * 10_000, "1e400", "NaN", "-Infinity", "1e3"])
@pytest.mark.parametrize(
    "key", ["deadline_ms", "seed", "min_tokens", "max_tokens", "n", "start", "end"]
)
def test_a_number_that_is_no_count_is_a_400(shared: LiveServer, key: str, number: str) -> None:
    span = {"start": "0", "end": "0"} | ({key: number} if key in ("start", "end") else {})
    more = "" if key in span else f', "{key}": {number}'
    spans = f'[{{"start": {span["start"]}, "end": {span["end"]}}}]'
    got = post(shared, f'{{"text": "a", "spans": {spans}{more}}}'.encode())
    assert got.status_code == 400
    error_of(got)
    assert shared.worker.jobs == []


def test_feedback_reaches_the_engine(server: LiveServer) -> None:
    with server.client() as client:
        reply = client.infill(asked())
    told: list[dict[str, object]] = [
        {"id": reply.id, "event": "shown"},
        {"id": reply.id, "event": "partly", "choice": 1, "chars": 3},
        {"id": reply.id, "event": "inserted", "choice": 0},
    ]
    for body in told:
        got = post(server, body, "/v1/feedback")
        assert (got.status_code, got.content) == (204, b"")
    assert server.worker.told == [
        (reply.id, "shown", 0, None),
        (reply.id, "partly", 1, 3),
        (reply.id, "inserted", 0, None),
    ]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"id": "nobody", "event": "shown"}, 404, "unknown_id"),
        ({"id": "nobody", "event": "accepted"}, 400, "bad_request"),
        ({"id": "nobody"}, 400, "bad_request"),
        ({"event": "shown"}, 400, "bad_request"),
        ({"id": "nobody", "event": "shown", "choice": -1}, 400, "unknown_option"),
        ({"id": "nobody", "event": "shown", "chars": -1}, 400, "unknown_option"),
        ({"id": "nobody", "event": "shown", "chars": 10**400}, 400, "unknown_option"),
        ({"id": "nobody", "event": "shown", "chars": 1.0}, 400, "bad_request"),
        ({"id": "nobody", "event": "shown", "text": "x"}, 400, "unknown_key"),
    ],
)
def test_feedback_that_belongs_to_nothing(
    shared: LiveServer, body: dict[str, object], status: int, code: str
) -> None:
    got = post(shared, body, "/v1/feedback")
    assert (got.status_code, error_of(got)["code"]) == (status, code)


def test_an_unloaded_model_counts_as_ready(server: LiveServer) -> None:
    server.worker.state = "unloaded"
    health = httpx.get(server.url + "/health")
    assert (health.status_code, health.json()["state"]) == (200, "ready")
    with server.client() as client:
        assert client.stats()["state"] == "unloaded"
        assert client.infill(asked()).reason == "ok"


def test_an_unknown_key_is_named(shared: LiveServer) -> None:
    got = error_of(post(shared, BODY | {"spans": [{"start": 0, "end": 0, "ned": 1}]}))
    assert "spans.0.ned" in got["message"]


def test_parts_that_ask_for_nothing_are_fine(server: LiveServer) -> None:
    empty: dict[str, object] = {"pins": [], "context": None, "draft": [], "think": False}
    assert post(server, BODY | empty | {"boldness": None}).status_code == 200
    got = server.worker.jobs[0].request
    assert (got.pins, got.context, got.drafts, got.think) == ((), (), (), False)


@pytest.mark.parametrize("number", [0, 1, 0.0, 0.5, 1.0])
def test_boldness_is_any_number_from_0_to_1(server: LiveServer, number: float) -> None:
    assert post(server, BODY | {"boldness": number}).status_code == 200
    assert server.worker.jobs[0].request.boldness == number


UNUSUAL: dict[str, dict[str, Any]] = {
    "an empty document": {"text": "", "spans": [{"start": 0, "end": 0}]},
    "the whole document": {"text": TEXT, "spans": [{"start": 0, "end": len(TEXT)}]},
    "both edges": {"text": TEXT, "spans": [{"start": len(TEXT), "end": len(TEXT)}, EDGE]},
    "spans side by side": {"spans": [{"start": 0, "end": 3}, {"start": 3, "end": 8}]},
    "NUL characters": {"text": "a\0b\0", "spans": [{"start": 1, "end": 2}]},
    "tabs and blanks": {"text": "\tif a:\n        b\n\t    c", "spans": [{"start": 8, "end": 8}]},
    "half a grapheme": {"text": "e\u0301", "spans": [{"start": 1, "end": 1}]},
    "an unknown language": {"language": "kling\u00f6nisch"},
    "20,000 lines": {"text": "x = 1\n" * 20_000, "spans": [{"start": 119_994, "end": 119_999}]},
    "a long instruction": {"instruction": '\U0001f600 "\\\n' * 1_700},
    "1 ms": {"deadline_ms": 1},
}


@pytest.mark.parametrize("unusual", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_unusual_reaches_the_engine_as_it_is(
    server: LiveServer, unusual: dict[str, Any]
) -> None:
    assert post(server, BODY | unusual).status_code == 200
    got = server.worker.jobs[0].request
    sent = dict(unusual)
    spans = [Span(**span) for span in sent.pop("spans", BODY["spans"])]
    assert list(got.spans) == spans
    assert {name: getattr(got, name) for name in sent} == sent


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/x", 404), ("GET", "/v1/infill", 405)]
)
def test_unknown_routes_answer_in_our_shape(
    shared: LiveServer, method: str, path: str, status: int
) -> None:
    headers = {"Authorization": f"Bearer {shared.token}"}
    got = httpx.request(method, shared.url + path, headers=headers)
    assert got.status_code == status
    error_of(got)


def test_the_open_api_page_knows_the_request(shared: LiveServer) -> None:
    headers = {"Authorization": f"Bearer {shared.token}"}
    got = httpx.get(shared.url + "/openapi.json", headers=headers).json()
    keys = set(got["components"]["schemas"]["InfillRequest"]["properties"])
    assert {"context", "pins", "draft", "repair", "boldness", "think", "background"} <= keys
    assert httpx.get(shared.url + "/docs", headers=headers).status_code == 404


def test_loading_is_a_503_that_says_when(tmp_path: Path) -> None:
    with live_server(tmp_path / "state", FakeWorker(is_loading=True)) as server:
        got = post(server, BODY)
        assert (got.status_code, error_of(got)["code"]) == (503, "loading")
        assert got.headers["retry-after"] == "1"
        health = httpx.get(server.url + "/health")
        assert (health.status_code, health.json()["state"]) == (503, "loading")
        with server.client() as client:
            with pytest.raises(ServerProblem, match="was not loaded"):
                client.wait_ready(0)
            server.worker.finish_loading()
            client.wait_ready(5)
        assert httpx.get(server.url + "/health").status_code == 200


def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with live_server(tmp_path / "state", FakeWorker(is_loading=True)) as server:
        server.worker.finish_loading(errors.CheckpointMissing("no model folder at /m"))
        got = post(server, BODY)
        assert (got.status_code, error_of(got)["code"]) == (500, "checkpoint_missing")
        with server.client() as client, pytest.raises(ServerProblem, match="no model folder"):
            client.wait_ready(5)


def test_a_full_queue_is_a_429(tmp_path: Path) -> None:
    with live_server(tmp_path / "state", FakeWorker(capacity=0)) as server:
        got = post(server, BODY)
        assert (got.status_code, error_of(got)["code"]) == (429, "busy")
        streamed = post(server, BODY | {"stream": True})
        assert (streamed.status_code, error_of(streamed)["code"]) == (429, "busy")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.NotEnoughMemory("full"), 500, "not_enough_memory"),
        (errors.Unsupported("no"), 400, "unsupported"),
        (ZeroDivisionError("source text"), 500, "internal"),
    ],
)
def test_an_error_of_the_engine(
    server: LiveServer, error: Exception, status: int, code: str
) -> None:
    server.worker.script = Script(error=error)  # type: ignore[arg-type]
    got = post(server, BODY)
    assert (got.status_code, error_of(got)["code"]) == (status, code)
    assert "source text" not in got.text
    with server.client() as client, pytest.raises(ServerProblem) as caught:
        list(client.stream(asked()))
    assert caught.value.code == code


def test_a_stream_is_canvases_and_one_reply(server: LiveServer) -> None:
    text = "x = '\u2028\r\n\N{GRINNING FACE}'"
    server.worker.script = Script(texts=[text], drafts=["x", text])
    got = post(server, BODY | {"stream": True})
    assert got.headers["content-type"].startswith("text/event-stream")
    frames = [
        dict(line.split(": ", 1) for line in f.split("\n")) for f in got.text.split("\n\n")[:-1]
    ]
    assert [frame["event"] for frame in frames] == ["canvas", "canvas", "done"]
    canvases = [json.loads(frame["data"]) for frame in frames[:2]]
    assert canvases == [
        {"id": "job-0", "seq": 0, "canvas": 0, "pass": 1, "spans": [{"text": "x", "settled": 1}]},
        {
            "id": "job-0",
            "seq": 1,
            "canvas": 0,
            "pass": 2,
            "spans": [{"text": text, "settled": len(text)}],
        },
    ]
    assert json.loads(frames[2]["data"])["choices"][0]["spans"][0]["text"] == text


def test_the_client_reads_a_stream(server: LiveServer) -> None:
    with server.client() as client:
        *canvases, reply = client.stream(asked())
        assert isinstance(reply, wire.InfillReply)
        assert [event.seq for event in canvases if isinstance(event, wire.CanvasEvent)] == [0, 1]
        assert client.infill(asked()).choices == reply.choices


def test_a_newer_request_of_the_document_supersedes(server: LiveServer) -> None:
    server.worker.hold()
    replies: list[wire.InfillReply] = []

    def first() -> None:
        with server.client() as client:
            replies.append(client.infill(asked(document="d")))

    thread = threading.Thread(target=first)
    thread.start()
    server.worker.wait_for(lambda: len(server.worker.jobs) == 1)
    with server.client() as client:
        stream = client.stream(asked(document="d"))
        second = threading.Thread(target=lambda: replies.extend(list(stream)[-1:]))  # type: ignore[arg-type]
        second.start()
        thread.join()
        assert (replies[0].reason, replies[0].choices) == ("superseded", [])
        server.worker.release()
        second.join()
    assert replies[1].reason == "ok"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_client_that_goes_away_cancels_its_job(server: LiveServer, is_streamed: bool) -> None:
    """Long before the first byte of an answer, and with nothing being sent meanwhile."""
    server.worker.hold()
    where = urlsplit(server.url)
    body = json.dumps(BODY | {"stream": is_streamed})
    with socket.create_connection((where.hostname, where.port), timeout=20) as link:
        link.sendall(
            f"POST /v1/infill HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(body)}\r\n"
            f"Authorization: Bearer {server.token}\r\nContent-Type: application/json\r\n\r\n"
            f"{body}".encode()
        )
        server.worker.wait_for(lambda: len(server.worker.jobs) == 1)
        assert not server.worker.jobs[0].is_cancelled.is_set()
    server.worker.wait_for(lambda: server.worker.stats()["cancelled"] == 1)
    with server.client() as client:
        server.worker.release()
        assert client.infill(asked()).reason == "ok"


def test_closing_a_stream_half_way_cancels_its_job(server: LiveServer) -> None:
    server.worker.script = Script(pass_s=0.02, drafts=["a"] * 500)
    with server.client() as client:
        stream = client.stream(asked())
        assert isinstance(next(stream), wire.CanvasEvent)
        stream.close()  # type: ignore[attr-defined]
    server.worker.wait_for(lambda: server.worker.stats()["cancelled"] == 1)


def test_a_stopping_daemon_tells_its_clients(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.hold()
    caught: list[ServerProblem] = []
    waiting: list[threading.Thread] = []
    with live_server(tmp_path / "state", worker) as server:

        def ask(call: Any) -> None:
            try:
                call()
            except ServerProblem as problem:
                caught.append(problem)

        clients = [server.client(), server.client()]
        calls = [lambda: clients[0].infill(asked()), lambda: list(clients[1].stream(asked()))]
        waiting = [threading.Thread(target=ask, args=(call,)) for call in calls]
        for thread in waiting:
            thread.start()
        worker.wait_for(lambda: len(worker.jobs) == 2)
    for thread in waiting:
        thread.join()
    for client in clients:
        client.close()
    assert [problem.code for problem in caught] == ["cancelled", "cancelled"]


def test_stats_count_live_jobs(server: LiveServer) -> None:
    server.worker.hold()
    with server.client() as client:
        assert client.stats()["live_jobs"] == 0
        thread = threading.Thread(target=lambda: client.infill(asked()))
        thread.start()
        server.worker.wait_for(lambda: len(server.worker.jobs) == 1)
        assert client.stats()["live_jobs"] == 1
        server.worker.release()
        thread.join()
        assert client.stats()["live_jobs"] == 0
        assert client.models()[0]["id"] == "fake"


def test_a_load_that_takes_long_does_not_keep_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "CLOSE_WAIT_S", 0.05)
    worker, still_loading = FakeWorker(), threading.Event()
    monkeypatch.setattr(worker, "close", still_loading.wait)
    with live_server(tmp_path / "state", worker):
        pass
    still_loading.set()


@pytest.mark.parametrize("head", ["Content-Length: 500", "Transfer-Encoding: chunked"])
def test_half_a_body_starts_nothing(server: LiveServer, head: str) -> None:
    where = urlsplit(server.url)
    body = json.dumps(BODY)
    content = body if "Length" in head else f"{len(body):x}\r\n{body}\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=20) as link:
        link.sendall(
            f"POST /v1/infill HTTP/1.1\r\nHost: {where.netloc}\r\n{head}\r\n"
            f"Authorization: Bearer {server.token}\r\nContent-Type: application/json\r\n\r\n"
            f"{content}".encode()
        )
    with server.client() as client:
        assert client.infill(asked()).id == "job-0"
