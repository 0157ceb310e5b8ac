"""R9: what a web page, a stranger or a careless client can send, and what it gets."""

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_worker import FakeWorker
from live_server import LiveServer, live_server, serving

from infilld.server.client import Client
from infilld.server.guard import BODY_LIMIT_BYTES
from infilld.server.settings import Settings

GOOD = json.dumps({"text": "", "spans": [{"start": 0, "end": 0}]}).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("guard") / "state") as running:
        yield running


def ask(
    server: LiveServer,
    *,
    method: str = "POST",
    path: str = "/v1/infill",
    body: bytes | None = GOOD,
    drop: tuple[str, ...] = (),
    **headers: str,
) -> tuple[int, dict[str, object], http.client.HTTPMessage]:
    """One request with good headers, some of them replaced or dropped."""
    where = urlsplit(server.url)
    sent = {"host": where.netloc, "authorization": f"Bearer {server.token}"}
    if body is not None:
        sent |= {"content-type": "application/json", "content-length": str(len(body))}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    link = http.client.HTTPConnection(where.hostname or "", where.port or 0, timeout=20)
    try:
        link.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            if name not in drop:
                link.putheader(name, value)
        link.endheaders(body)
        got = link.getresponse()
        return got.status, json.loads(got.read()), got.headers
    finally:
        link.close()


def code_of(content: dict[str, object]) -> str:
    error = content["error"]
    assert isinstance(error, dict)
    assert set(error) == {"code", "message", "remedy"}
    return str(error["code"])


def test_a_good_request_passes_and_carries_no_cors_header(server: LiveServer) -> None:
    status, _, headers = ask(server)
    assert status == 200
    assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.:{port}", ""],
)
def test_a_foreign_host_is_refused(server: LiveServer, host: str) -> None:
    status, content, _ = ask(server, host=host.format(port=urlsplit(server.url).port))
    assert (status, code_of(content)) == (403, "foreign_host")


def test_a_foreign_host_is_refused_even_by_health(server: LiveServer) -> None:
    status, content, _ = ask(server, method="GET", path="/health", body=None, host="evil.example")
    assert (status, code_of(content)) == (403, "foreign_host")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_every_name_of_loopback_is_served(server: LiveServer, name: str) -> None:
    assert ask(server, host=f"{name}:{urlsplit(server.url).port}")[0] == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "", "http://127.0.0.1:1", "https://127.0.0.1:{port}"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_foreign_origin_is_refused(server: LiveServer, origin: str, method: str) -> None:
    origin = origin.format(port=urlsplit(server.url).port)
    status, content, _ = ask(server, method=method, origin=origin)
    assert (status, code_of(content)) == (403, "foreign_origin")


def test_our_own_origin_is_served(server: LiveServer) -> None:
    assert ask(server, origin=server.url)[0] == 200


@pytest.mark.parametrize(
    "sent",
    ["", "Bearer", "Bearer wrong", "Basic {token}", "{token}", "Bearer {token}x", "Bearer \xff"],
)
def test_a_wrong_token_is_refused(server: LiveServer, sent: str) -> None:
    status, content, headers = ask(server, authorization=sent.format(token=server.token))
    assert (status, code_of(content)) == (401, "bad_token")
    assert headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/v1/infill", "/stats", "/v1/models", "/openapi.json", "/nothing"]
)
def test_no_token_is_refused_everywhere(server: LiveServer, path: str) -> None:
    method, body = ("POST", GOOD) if path == "/v1/infill" else ("GET", None)
    status, content, _ = ask(server, method=method, path=path, body=body, drop=("authorization",))
    assert (status, code_of(content)) == (401, "bad_token")


def test_health_needs_no_token(server: LiveServer) -> None:
    status, content, _ = ask(
        server, method="GET", path="/health", body=None, drop=("authorization",)
    )
    assert status == 200
    assert set(content) == {"api", "version", "state"}


def test_without_auth_no_token_is_needed(tmp_path: Path) -> None:
    with live_server(tmp_path / "open", auth=False) as open_server:
        assert ask(open_server, drop=("authorization",))[0] == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"]
)
def test_anything_but_json_is_refused(server: LiveServer, kind: str) -> None:
    status, content, _ = ask(server, content_type=kind)
    assert (status, code_of(content)) == (415, "not_json")


def test_json_with_a_charset_is_served(server: LiveServer) -> None:
    assert ask(server, content_type="Application/JSON; charset=utf-8")[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.2", "127.255.255.254", "::1"])
def test_the_address_it_listens_on_is_served(tmp_path: Path, host: str) -> None:
    wanted = Settings(state_dir=tmp_path / "state", host=host, port=0)
    with serving(wanted, FakeWorker()) as found:
        with Client(found.url, found.token) as client:
            assert client.stats()["live_jobs"] == 0
        bound = LiveServer(wanted, FakeWorker(), found.url, found.token)
        assert ask(bound, origin=found.url)[0] == 200
        port = urlsplit(found.url).port
        for foreign in (f"evil.example:{port}", f"127.0.0.3:{port}"):
            status, content, _ = ask(bound, host=foreign)
            assert (status, code_of(content)) == (403, "foreign_host")
            assert f"Use {urlsplit(found.url).netloc}." in str(content)


def test_another_loopback_address_is_refused(server: LiveServer) -> None:
    status, content, _ = ask(server, host=f"127.0.0.2:{urlsplit(server.url).port}")
    assert (status, code_of(content)) == (403, "foreign_host")


def test_a_body_that_says_it_is_too_large_is_refused_unread(server: LiveServer) -> None:
    status, content, _ = ask(server, content_length=str(BODY_LIMIT_BYTES + 1))
    assert (status, code_of(content)) == (413, "too_large")


def test_a_body_that_grows_too_large_is_refused(server: LiveServer) -> None:
    where = urlsplit(server.url)
    head = (
        f"POST /v1/infill HTTP/1.1\r\nHost: {where.netloc}\r\nTransfer-Encoding: chunked\r\n"
        f"Authorization: Bearer {server.token}\r\nContent-Type: application/json\r\n\r\n"
    )
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=20) as link:
        link.sendall(head.encode())
        try:
            for _ in range(BODY_LIMIT_BYTES // 0x100000 + 1):
                link.sendall(chunk)
        except OSError:
            pass  # refused before the end was sent
        assert link.recv(64).startswith(b"HTTP/1.1 413 ")


def test_refusals_cost_the_engine_nothing(tmp_path: Path) -> None:
    worker = FakeWorker()
    with live_server(tmp_path / "state", worker) as server:
        ask(server, drop=("authorization",))
        ask(server, origin="https://evil.example")
        ask(server, content_type="text/plain")
    assert worker.jobs == []
