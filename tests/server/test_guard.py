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
from infilld.server.http.bodies import Limits
from infilld.server.http.guard import is_own_host
from infilld.server.settings import Settings

BODY_LIMIT_BYTES = Limits().body_bytes
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
    assert set(error) == {"code", "message", "remedy", "type", "param"}
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
    assert set(content) <= {"api", "version", "state", "status"}, "nothing of the user's"


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


@pytest.mark.parametrize(
    ("site", "more"),
    [
        ("cross-site", {}),
        # Another port of this machine: some other program's page.
        ("same-site", {}),
        ("cross-site", {"sec_fetch_mode": "no-cors", "sec_fetch_dest": "image"}),
        # Only the page may be the target of a link, and only as a page.
        ("cross-site", {"sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}),
        ("cross-site", {"path": "/", "sec_fetch_mode": "navigate", "sec_fetch_dest": "iframe"}),
        ("cross-site", {"path": "/", "sec_fetch_mode": "no-cors", "sec_fetch_dest": "document"}),
    ],
)
def test_what_a_browser_asks_for_another_site_is_refused(
    server: LiveServer, site: str, more: dict[str, str]
) -> None:
    wanted = {"path": "/health", "method": "GET"} | more
    status, content, _ = ask(server, body=None, sec_fetch_site=site, **wanted)
    assert (status, code_of(content)) == (403, "foreign_origin")


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_what_a_browser_asks_for_our_page_is_served(server: LiveServer, site: str) -> None:
    assert ask(server, sec_fetch_site=site, sec_fetch_mode="cors")[0] == 200


def test_no_preflight_is_answered(server: LiveServer) -> None:
    for sent in ({"origin": "https://evil.example"}, {}):
        status, _, headers = ask(
            server,
            method="OPTIONS",
            body=None,
            access_control_request_method="POST",
            access_control_request_headers="authorization,content-type",
            **sent,
        )
        assert status in (403, 405)
        assert not [name for name in headers if name.lower().startswith("access-control")]


def test_every_answer_says_what_browsers_must_not_do(server: LiveServer) -> None:
    for path in ("/health", "/nothing", "/v1/models"):
        headers = ask(server, method="GET", path=path, body=None)[2]
        assert headers.get_all("x-content-type-options") == ["nosniff"]
        assert headers.get_all("cross-origin-resource-policy") == ["same-origin"]


def test_the_token_may_not_stand_in_the_address(server: LiveServer) -> None:
    for name in ("token", "api_key", "access_token"):
        path = f"/v1/models?{name}={server.token}"
        status, _, _ = ask(server, method="GET", path=path, body=None, drop=("authorization",))
        assert status == 401


def test_the_word_bearer_may_be_written_in_any_case(server: LiveServer) -> None:
    assert ask(server, authorization=f"bearer {server.token}")[0] == 200


def test_refusals_below_api_read_as_ollama_s(server: LiveServer) -> None:
    status, content, _ = ask(server, path="/api/generate", drop=("authorization",))
    assert status == 401
    assert isinstance(content["error"], str)
    assert "infilld status" in content["error"]


class TestWhereItIsReached:
    """Connections that no test may make: the scope of each as the server would tell it."""

    @staticmethod
    def is_own(host: str, server: tuple[str, int | None], *allowed: str) -> bool:
        return is_own_host(host, {"type": "http", "server": server}, allowed)

    @pytest.mark.parametrize(
        ("host", "address"),
        [
            ("192.168.1.5:8741", "192.168.1.5"),
            ("localhost:8741", "192.168.1.5"),
            ("[fe80::1]:8741", "fe80::1%eth0"),
            ("[FE80:0::1]:8741", "fe80::1"),
            # A socket of both families.
            ("192.168.1.5:8741", "::ffff:192.168.1.5"),
        ],
    )
    def test_the_address_itself_is_served(self, host: str, address: str) -> None:
        assert self.is_own(host, (address, 8741))

    @pytest.mark.parametrize(
        "host",
        [
            # Whatever name a foreign name server points at us.
            "rebound.evil.example:8741",
            "192.168.1.5.evil.example:8741",
            "box.lan:8741",
            "192.168.1.6:8741",
            "0.0.0.0:8741",
            "3232235781:8741",
            "192.168.1.5:80",
            "192.168.1.5",
            "[::1%25evil]:8741",
            "127.0.0.1:8741@evil.example",
            "",
            ":8741",
        ],
    )
    def test_no_other_name_is(self, host: str) -> None:
        assert not self.is_own(host, ("192.168.1.5", 8741))

    def test_the_port_of_http_need_not_be_said(self) -> None:
        assert self.is_own("localhost", ("127.0.0.1", 80))
        assert not self.is_own("localhost", ("127.0.0.1", 8741))

    def test_names_that_are_allowed_are_served(self) -> None:
        assert self.is_own("Box.lan:8741", ("192.168.1.5", 8741), "box.lan:8741")
        assert not self.is_own("box.lan:9999", ("192.168.1.5", 8741), "box.lan:8741")
        assert self.is_own("box.lan:9999", ("192.168.1.5", 8741), "box.lan")
        assert not self.is_own("evil.box.lan", ("192.168.1.5", 8741), "box.lan")

    @pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1", "[::1]:80"])
    def test_a_unix_socket_has_the_names_of_loopback(self, host: str) -> None:
        assert self.is_own(host, ("/run/infilld.sock", None))
        assert not self.is_own("evil.example", ("/run/infilld.sock", None))


def test_a_name_that_is_allowed_may_be_an_origin(tmp_path: Path) -> None:
    wanted = Settings(state_dir=tmp_path / "state", port=0, allowed_hosts=("box.lan",))
    with serving(wanted, FakeWorker()) as found:
        bound = LiveServer(wanted, FakeWorker(), found.url, found.token)
        for scheme in ("http", "https"):
            assert ask(bound, host="box.lan", origin=f"{scheme}://box.lan")[0] == 200
        # Another program at that name, and somebody else's page.
        for origin in ("http://box.lan:3000", "https://evil.example"):
            assert ask(bound, host="box.lan", origin=origin)[0] == 403


def test_refusals_cost_the_engine_nothing(tmp_path: Path) -> None:
    worker = FakeWorker()
    with live_server(tmp_path / "state", worker) as server:
        ask(server, drop=("authorization",))
        ask(server, origin="https://evil.example")
        ask(server, content_type="text/plain")
    assert worker.jobs == []
