"""What no well-meaning client sends, over real sockets: a 4xx or an end, and no harm."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_worker import FakeWorker, Script
from live_server import LiveServer, live_server

from infilld.server.http import bodies, connection, guard

GOOD = json.dumps({"text": "", "spans": [{"start": 0, "end": 0}]}).encode()
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("bad") / "state") as running:
        yield running


@pytest.fixture(autouse=True)
def _goes_on_without_a_traceback(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> Iterator[None]:
    """After every test the same daemon serves, and has logged nothing that it did not expect."""
    caplog.set_level(logging.DEBUG)
    yield
    if "server" in request.fixturenames:
        running: LiveServer = request.getfixturevalue("server")
        with connected(running) as link:
            link.sendall(head(running) + GOOD)
            assert answer(link)[0] == 200
    bad = [r for r in caplog.get_records("call") if r.exc_info or r.levelno >= logging.ERROR]
    assert not bad, [record.getMessage() for record in bad]


@contextmanager
def connected(server: LiveServer) -> Iterator[socket.socket]:
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as link:
        yield link


def head(
    server: LiveServer,
    *more: str,
    line: str = "POST /v1/infill HTTP/1.1",
    length: int | None = len(GOOD),
) -> bytes:
    lines = [
        line,
        f"Host: {urlsplit(server.url).netloc}",
        f"Authorization: Bearer {server.token}",
        "Content-Type: application/json",
        *([] if length is None else [f"Content-Length: {length}"]),
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def answer(link: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer; status 0 when the connection was closed without one."""
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            chunk = link.recv(65536)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            assert not data, data
            return 0, b""
        data += chunk
    top, _, body = data.partition(b"\r\n\r\n")
    fields = dict(row.lower().split(b": ", 1) for row in top.split(b"\r\n")[1:])
    length_bytes = int(fields.get(b"content-length", 0))
    while len(body) < length_bytes:
        body += link.recv(65536)
    return int(top.split(b" ")[1]), body[:length_bytes]


def code_of(body: bytes) -> str:
    told = json.loads(body)["error"]
    assert told["remedy"], told
    return str(told["code"])


def is_closed(link: socket.socket) -> bool:
    try:
        return link.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_of_100_mb(server: LiveServer, is_chunked: bool) -> None:
    """It is refused, and a client that sends all of it first can still read why."""
    part = b" " * MIB
    with connected(server) as link:
        if is_chunked:
            link.sendall(head(server, "Transfer-Encoding: chunked", length=None))
            part = b"100000\r\n" + part + b"\r\n"
        else:
            link.sendall(head(server, length=100 * MIB))
        for _ in range(100):
            link.sendall(part)
        status, body = answer(link)
        assert (status, code_of(body)) == (413, "too_large")


@pytest.mark.parametrize("length", [str(10**19), "9" * 15])
def test_a_body_longer_than_any_number(server: LiveServer, length: str) -> None:
    with connected(server) as link:
        link.sendall(head(server, f"Content-Length: {length}", length=None))
        assert answer(link)[0] == 413


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: -1"],
        ["Content-Length: +5"],
        ["Content-Length: 0x10"],
        ["Content-Length: 1_0"],
        ["Content-Length: five"],
        ["Content-Length: "],
        ["Content-Length: \xb2"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5, 6"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: gzip"],
        ["Transfer-Encoding: chunked, chunked"],
        ["Transfer-Encoding: gzip, chunked"],
        ["Transfer-Encoding : chunked"],
        ["X: 1\r\n folded: 2", "Content-Length: 5, 5"],
        ["Content-Length: 5\x00"],
        ["Host: evil.example", "Content-Length: 5"],
    ],
)
def test_framing_that_two_programs_may_read_differently(
    server: LiveServer, lines: list[str]
) -> None:
    with connected(server) as link:
        link.sendall(head(server, *lines, length=None) + b"0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n")
        status, body = answer(link)
        assert 400 <= status < 500, body
        assert code_of(body)


@pytest.mark.parametrize(
    "chunks",
    [b"xyz\r\n{}\r\n0\r\n\r\n", b"5\r\n{}\r\n0\r\n\r\n", b"-1\r\n{}\r\n", b"2;" + b"x" * 70_000],
)
def test_chunks_of_a_wrong_size(server: LiveServer, chunks: bytes) -> None:
    with connected(server) as link:
        link.sendall(head(server, "Transfer-Encoding: chunked", length=None) + chunks)
        status, body = answer(link)
        assert 400 <= status < 500
        assert code_of(body)
        assert is_closed(link)


def test_chunks_of_a_wrong_size_behind_a_refusal(server: LiveServer) -> None:
    """The answer is out; there is nothing left to say."""
    with connected(server) as link:
        link.sendall(
            head(server, "Transfer-Encoding: chunked", "Origin: http://evil.example", length=None)
        )
        assert answer(link)[0] == 403
        link.sendall(b"xyz\r\n")
        assert is_closed(link)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"\r\n\r\n\r\n\r\n\r\n",
        bytes(range(256)) * 10,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
    ],
)
def test_garbage(server: LiveServer, garbage: bytes) -> None:
    with connected(server) as link:
        link.sendall(garbage)
        link.shutdown(socket.SHUT_WR)
        status, _ = answer(link)
        assert status == 0 or 400 <= status < 500


@pytest.mark.parametrize("more", ["X: " + "x" * 70_000, "\r\n".join(["XX: yyy"] * 20_000)])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_head_that_is_too_large(server: LiveServer, more: str, is_whole: bool) -> None:
    with connected(server) as link:
        link.sendall(head(server, more)[: None if is_whole else -2])
        status, body = answer(link)
        assert (status, code_of(body)) == (431, "head_too_large")


def test_an_address_of_50_kb(server: LiveServer) -> None:
    with connected(server) as link:
        link.sendall(head(server, line=f"GET /{'x' * 50_000} HTTP/1.1", length=None))
        status, body = answer(link)
        assert (status, code_of(body)) == (404, "not_found")
        assert len(body) < 1000


def test_http_1_0(server: LiveServer) -> None:
    with connected(server) as link:
        link.sendall(head(server, line="POST /v1/infill HTTP/1.0") + GOOD)
        assert answer(link)[0] == 200
        assert is_closed(link)
    with connected(server) as link:
        link.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        status, body = answer(link)
        assert (status, code_of(body)) == (403, "foreign_host")


def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    with connected(server) as link:
        link.sendall((head(server) + GOOD) * 3 + head(server, line="GET /x HTTP/1.1", length=None))
        data = b""
        while data.count(b"HTTP/1.1 ") < 4:
            data += link.recv(65536)
        assert [int(part[:3]) for part in data.split(b"HTTP/1.1 ")[1:]] == [200, 200, 200, 404]


def test_no_web_socket_is_opened(server: LiveServer) -> None:
    with connected(server) as link:
        more = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
        link.sendall(head(server, *more, line="GET /v1/infill HTTP/1.1", length=None))
        assert answer(link)[0] == 405


@pytest.mark.parametrize("line", ["TRACE / HTTP/1.1", "CONNECT a:1 HTTP/1.1", "BREW / HTTP/1.1"])
def test_methods_that_do_nothing_here(server: LiveServer, line: str) -> None:
    with connected(server) as link:
        link.sendall(head(server, line=line, length=0))
        assert answer(link)[0] in (400, 403, 404, 405)


def test_whoever_waits_for_a_go_ahead_gets_the_refusal(server: LiveServer) -> None:
    with connected(server) as link:
        link.sendall(head(server, "Expect: 100-continue", length=100 * MIB))
        assert answer(link)[0] == 413
    with connected(server) as link:
        link.sendall(head(server, "Expect: 100-continue"))
        assert link.recv(64).startswith(b"HTTP/1.1 100 ")
        link.sendall(GOOD)
        assert answer(link)[0] == 200


@pytest.mark.parametrize("sent", [b"", GOOD[:5], GOOD])
def test_a_client_that_closes_its_half(server: LiveServer, sent: bytes) -> None:
    with connected(server) as link:
        link.sendall(head(server) + sent)
        link.shutdown(socket.SHUT_WR)
        status, _ = answer(link)
        assert status in (0, 200, 400)


def test_a_client_that_resets_its_connection(server: LiveServer) -> None:
    for sent in (b"", head(server)[:20], head(server), head(server) + GOOD):
        with connected(server) as link:
            # Closing with a linger of 0 sends a reset.
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            link.sendall(sent)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 900 + b"]" * 900,
        b'{"text": "", "spans": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"text": "", "spans": [], "n": ' + b"9" * 5000 + b"}",
        b'{"text": "\\ud800", "spans": []}',
        b"\xff\xfe{\x00}\x00",
        b'{"text": "\xff"}',
        b"nul",
        b"",
        b'"text"',
        b'{"text": "", "spans": [], "text": 5}',
    ],
)
def test_json_that_is_a_trap(server: LiveServer, body: bytes) -> None:
    for path in ("/v1/infill", "/v1/feedback", "/v1/completions", "/infill", "/api/generate"):
        with connected(server) as link:
            line = f"POST {path} HTTP/1.1"
            link.sendall(head(server, line=line, length=len(body)) + body)
            status, told = answer(link)
            # What other dialects do not know, they are to ignore.
            least = 400 if path in ("/v1/infill", "/v1/feedback") else 200
            assert least <= status < 500, (path, told)
            assert status == 200 or len(told) < 1000


def test_a_slow_body(server: LiveServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = bodies.Limits(silence_s=0.2, body_s=0.5)
    monkeypatch.setattr(guard, "Limits", lambda: short)
    with live_server(tmp_path / "state") as patient:
        with connected(patient) as link:
            link.sendall(head(patient) + GOOD[:5])
            status, body = answer(link)
            assert (status, code_of(body)) == (408, "body_timeout")
            assert is_closed(link)
        with connected(patient) as link:
            # Never silent for long, and never done.
            link.sendall(head(patient, length=1000))
            until_s = time.monotonic() + 10
            link.settimeout(0.05)
            data = b""
            while not data and time.monotonic() < until_s:
                link.sendall(b" ")
                try:
                    data = link.recv(4096)
                except TimeoutError:
                    continue
            assert data.startswith(b"HTTP/1.1 408 ")


def test_a_head_that_never_ends(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.2)
    for sent in (b"", b"POST /v1/inf", head(server)[:-2]):
        with connected(server) as link:
            link.sendall(sent)
            assert is_closed(link)
    with connected(server) as link:
        # Between two requests a connection may rest for longer; within the second it may not.
        link.sendall(head(server) + GOOD)
        assert answer(link)[0] == 200
        link.sendall(b"POST /v1")
        assert is_closed(link)


def test_a_reader_that_stops_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.3)
    drafts = ["a" * 200_000, "b" * 200_000] * 1000
    worker = FakeWorker(Script(texts=["x"], drafts=drafts, pass_s=0.002))
    with live_server(tmp_path / "state", worker) as stalled, connected(stalled) as link:
        body = GOOD[:-1] + b', "stream": true}'
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        link.sendall(head(stalled, length=len(body)) + body)
        worker.wait_for(lambda: worker.stats()["cancelled"] == 1)


def test_more_requests_than_are_taken_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = bodies.Limits(requests=2)
    monkeypatch.setattr(guard, "Limits", lambda: few)
    worker = FakeWorker()
    worker.hold()
    with (
        live_server(tmp_path / "state", worker) as busy,
        connected(busy) as first,
        connected(busy) as second,
        connected(busy) as third,
    ):
        for link in (first, second):
            link.sendall(head(busy) + GOOD)
        worker.wait_for(lambda: len(worker.jobs) == 2)
        third.sendall(head(busy) + GOOD)
        status, body = answer(third)
        assert (status, code_of(body)) == (429, "too_many_requests")
        third.sendall(head(busy, line="GET /health HTTP/1.1", length=None))
        assert answer(third)[0] == 200, "whoever asks whether it lives is told"
        worker.release()
        assert [answer(link)[0] for link in (first, second)] == [200, 200]
        third.sendall(head(busy) + GOOD)
        assert answer(third)[0] == 200


def test_more_bytes_than_are_held_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = bodies.Limits(bodies_bytes=MIB)
    monkeypatch.setattr(guard, "Limits", lambda: few)
    large = json.dumps({"text": "x" * 700_000, "spans": [{"start": 0, "end": 0}]}).encode()
    worker = FakeWorker()
    worker.hold()
    with (
        live_server(tmp_path / "state", worker) as busy,
        connected(busy) as first,
        connected(busy) as second,
    ):
        for link in (first, second):
            link.sendall(head(busy, length=len(large)) + large)
            if link is first:
                worker.wait_for(lambda: len(worker.jobs) == 1)
        status, body = answer(second)
        assert (status, code_of(body)) == (429, "too_many_bytes")
        worker.release()
        assert answer(first)[0] == 200
        second.sendall(head(busy, length=len(large)) + large)
        assert answer(second)[0] == 200, "what is answered is held no more"


def test_more_connections_than_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with live_server(tmp_path / "state") as busy:
        monkeypatch.setattr(connection, "MOST_CONNECTIONS", 1)
        with connected(busy) as first:
            first.sendall(head(busy) + GOOD)
            assert answer(first)[0] == 200
            with connected(busy) as second:
                status, body = answer(second)
                assert (status, code_of(body)) == (429, "too_many_connections")
                assert is_closed(second)
            first.sendall(head(busy) + GOOD)
            assert answer(first)[0] == 200
        monkeypatch.undo()
