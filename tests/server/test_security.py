"""The list of security promises, one test each; the details of each have tests of their own.

Host, Origin, bodies: test_guard. Sockets: test_bad_sockets, test_unix_socket. Token: test_token.
"""

import ast
import hmac
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fake_worker import FakeWorker
from live_server import LiveServer, live_server

from infilld.engine.request import InfillRequest
from infilld.server import cli, discovery, wire
from infilld.server.client import Client
from infilld.server.http import guard
from infilld.server.http.bodies import Limits
from infilld.server.settings import STARTER, Settings, SettingsProblem, load
from infilld.server.verbs import models

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
GOOD = {"text": "", "spans": [{"start": 0, "end": 0}]}
# A busy machine takes many seconds to import what a daemon needs.
WAIT_S = 120.0


def ask(server: LiveServer, body: Any = GOOD, **headers: str) -> httpx.Response:
    """A request as a program would send it, but for these headers."""
    sent = httpx.Headers(_token(server))
    sent.update({name.replace("_", "-"): value for name, value in headers.items()})
    return httpx.post(server.url + "/v1/infill", json=body, headers=sent)


# Who can reach it.


def test_only_this_machine_reaches_it_unless_told_otherwise(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "2001:db8::1"):
        with pytest.raises(SettingsProblem, match="reached from other machines"):
            load({"host": host}, environ={})
        with pytest.raises(SettingsProblem, match="without a token"):
            load({"host": host, "allow_remote": "true", "auth": "false"}, environ={})
        assert load({"host": host, "allow_remote": "true"}, environ={}).auth
    with live_server(tmp_path / "state") as server:
        port = urlsplit(server.url).port
        rows = Path("/proc/net/tcp").read_text().splitlines()[1:]
        at = [row.split()[1] for row in rows if row.split()[1].endswith(f":{port:04X}")]
        assert at == [f"0100007F:{port:04X}"], "127.0.0.1 alone"


def test_other_machines_reach_it_only_with_the_token_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a network of its own, where every address is this process's."""
    if not _can_have_its_own_network():
        pytest.skip("this machine gives no process a network of its own")
    code = f"""
import http.client, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
from pathlib import Path
from fake_worker import FakeWorker
from live_server import serving
from infilld.server import discovery
from infilld.server.settings import Settings
import logging
logging.basicConfig(stream=sys.stdout)
wanted = Settings(state_dir=Path({str(tmp_path)!r}), host="0.0.0.0", port=0, allow_remote=True)
with serving(wanted, FakeWorker()) as found:
    print("told", found.url.rpartition(":")[0])
    for host, token in (("127.0.0.1", True), ("127.0.0.1", False), ("evil.example", True)):
        port = int(found.url.rpartition(":")[2])
        link = http.client.HTTPConnection("127.0.0.1", port)
        headers = {{"Host": f"{{host}}:{{port}}"}}
        headers |= {{"Authorization": "Bearer " + found.token}} if token else {{}}
        link.request("GET", "/v1/models", headers=headers)
        print("told", link.getresponse().status)
        link.close()
"""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    words = ["unshare", "-rn", "--", sys.executable, "-P", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WAIT_S, check=False)
    if "Network is unreachable" in done.stderr:
        pytest.skip("its loopback cannot be brought up")
    assert "OTHER MACHINES CAN REACH THIS DAEMON" in done.stdout, done.stderr
    told = [line[5:] for line in done.stdout.splitlines() if line.startswith("told ")]
    assert told == ["http://127.0.0.1", "200", "401", "403"]


def test_a_unix_socket_is_its_owner_s(tmp_path: Path) -> None:
    with live_server(tmp_path / "state", socket=tmp_path / "s") as server:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
        with server.client() as client:
            assert client.health().state == "ready"
        with server.client(token="wrong") as client, pytest.raises(Exception, match="token"):
            client.stats()


# The token.


def test_the_token_is_on_by_default(server: LiveServer) -> None:
    assert Settings().auth
    assert httpx.post(server.url + "/v1/infill", json=GOOD).status_code == 401
    assert ask(server).status_code == 200
    paths = json.loads(httpx.get(server.url + "/openapi.json", headers=_token(server)).text)
    for path, methods in paths["paths"].items():
        for method in set(methods) & {"get", "post"}:
            got = httpx.request(method, server.url + path, json=GOOD if method == "post" else None)
            assert (got.status_code == 401) == (path not in guard.OPEN_PATHS), path


def test_the_token_is_compared_in_constant_time(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    assert ask(server, authorization="Bearer wrong").status_code == 401
    assert compared == [(b"wrong", server.token.encode())]


def test_the_token_s_file_is_its_owner_s(server: LiveServer) -> None:
    assert stat.S_IMODE(server.settings.token_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(server.settings.state_dir.stat().st_mode) == 0o700


def test_the_token_is_changed_by_a_verb(
    server: LiveServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["token", "rotate", *server.settings.flags()]) == 0
    assert server.token not in capfd.readouterr().out
    assert ask(server).status_code == 401
    new = server.settings.token_file.read_text().strip()
    assert ask(server, authorization=f"Bearer {new}").status_code == 200


# Web pages.


def test_a_name_that_somebody_else_points_here_is_refused(server: LiveServer) -> None:
    got = ask(server, host=f"evil.example:{urlsplit(server.url).port}")
    assert got.status_code == 403


def test_a_page_of_another_site_is_refused_even_on_simple_requests(server: LiveServer) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        for path in ("/health", "/v1/models"):
            got = httpx.get(server.url + path, headers=_token(server) | headers)
            assert got.status_code == 403
        form = httpx.post(server.url + "/v1/infill", data={"text": "x"}, headers=headers)
        assert form.status_code == 403


def test_bodies_are_json_alone(server: LiveServer) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert ask(server, content_type=kind).status_code == 415


def test_no_other_origin_is_let_in(server: LiveServer) -> None:
    preflight = {
        "Origin": "https://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
        "Access-Control-Request-Private-Network": "true",
    }
    for got in (
        httpx.options(server.url + "/v1/infill", headers=preflight),
        httpx.options(server.url + "/v1/infill", headers=_token(server)),
        ask(server),
        ask(server, origin=server.url),
        httpx.get(server.url + "/", headers={"Origin": server.url}),
    ):
        assert not [name for name in got.headers if name.startswith("access-control")]


# Limits.


def test_body_requests_and_queue_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Limits(body_bytes=1000, requests=2)
    monkeypatch.setattr(guard, "Limits", lambda: few)
    worker = FakeWorker(capacity=2)
    worker.hold()
    with live_server(tmp_path / "requests", worker) as server:
        large = ask(server, GOOD | {"text": "x" * 1000})
        assert (large.status_code, _code(large)) == (413, "too_large")
        with _waiting(server), _waiting(server):
            worker.wait_for(lambda: len(worker.jobs) == 2)
            full = ask(server)
            assert (full.status_code, _code(full)) == (429, "too_many_requests")
            assert full.headers["retry-after"] == "1"
    worker = FakeWorker(capacity=1)
    worker.hold()
    with live_server(tmp_path / "queue", worker) as server, _waiting(server):
        worker.wait_for(lambda: len(worker.jobs) == 1)
        full = ask(server)
        assert (full.status_code, _code(full)) == (429, "busy")


# Weights.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl"])
def test_pickles_are_refused_by_name(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.folder_of(STARTER), folder, ignore=lambda *_: {"model.safetensors"})
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR.")
    for source in (folder, folder / name):
        assert cli.main(["models", "inspect", str(source)]) == 1
        said = capfd.readouterr().err
        assert name in said
        assert "safetensors or GGUF" in said
    from infilld.engine.errors import CheckpointMismatch
    from infilld.engine.loading import load_infiller

    with pytest.raises(CheckpointMismatch, match=name):
        load_infiller(folder, "cpu")
    assert not (tmp_path / "ran").exists()


def test_nothing_reads_pickles() -> None:
    """What training saved of its own state is read as plain tensors, which torch then enforces."""
    banned = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    found = []
    for layer in ("kernels", "engine", "server", "lsp"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names = {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names = {(node.module or "").partition(".")[0]}
                else:
                    names = set()
                found += [f"{where} imports {name}" for name in names & banned]
                if isinstance(node, ast.Call) and _reads_pickles(node):
                    found.append(f"{where}:{node.lineno} {ast.unparse(node)}")
    assert found == []


def _reads_pickles(call: ast.Call) -> bool:
    told = {word.arg: ast.unparse(word.value) for word in call.keywords}
    name = ast.unparse(call.func)
    if name in ("torch.load", "jit.load", "torch.jit.load", "torch.hub.load"):
        return told.get("weights_only") != "True"
    return told.get("allow_pickle") == "True" or name.endswith("read_pickle")


# The log.

CANARY = "kanarienvogel"
# A worker whose jobs fail as the texts say: with messages that quote what was sent.
FAILING = """
import sys
from fake_worker import FakeWorker, Script
from infilld.server import cli
from infilld.server.verbs import operate

def script(request):
    text = getattr(request, "text", None) or request.messages[-1].content
    for kind in (ValueError, KeyError, UnicodeError, AssertionError):
        if kind.__name__ in text:
            try:
                {}[text]
            except KeyError as cause:
                error = kind(text)
                error.__cause__ = cause
                return Script(error=error)
    return Script(texts=[text], drafts=[text])

operate.make_worker = lambda wanted: FakeWorker(script)
sys.exit(cli.main(["serve", *sys.argv[1:]]))
"""


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("level", "style"),
    [
        ("debug", "json"),
        ("debug", "text"),
        ("info", "text"),
        ("warning", "json"),
        ("error", "text"),
    ],
)
def test_no_source_text_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, style: Any
) -> None:
    kept = _what_is_kept(tmp_path, monkeypatch, log_level=level, log_format=style)
    assert not [name for name, data in kept.items() if CANARY.encode() in data]
    log = kept["daemon.log"].decode()
    assert "ValueError" in log, "what failed is told"
    assert ("listening on" in log) == (level in ("debug", "info"))


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/home/me/project/.env", "TOKEN=1"),
        ("C:\\Users\\me\\.ssh\\config", "Host a"),
        ("file:///home/me/.aws/credentials", "[default]"),
        ("notes.md", "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3Blb"),
    ],
)
def test_secrets_are_never_context(shared: LiveServer, path: str, text: str) -> None:
    """Whichever way they come: editors send what is open."""
    harmless = {"path": "a.py", "text": "a = 1", "kind": "open"}
    asked = {**GOOD, "context": [{"path": path, "text": text, "kind": "open"}, harmless]}
    extra = [{"filename": path, "text": text}, {"filename": "a.py", "text": "a = 1"}]
    bodies: dict[str, Any] = {
        "/v1/infill": asked,
        "/infill": {"input_prefix": "", "input_suffix": "", "input_extra": extra},
        "/v1/completions": {
            "segments": {"prefix": "", "declarations": [{"filepath": path, "body": text}]}
        },
    }
    for route, body in bodies.items():
        assert httpx.post(shared.url + route, json=body, headers=_token(shared)).status_code == 200
        request = shared.worker.jobs[-1].request
        assert isinstance(request, InfillRequest)
        assert {each.path for each in request.context} <= {"a.py"}, route


def test_source_text_is_logged_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = _what_is_kept(tmp_path, monkeypatch, log_prompts=True)
    assert [name for name, data in kept.items() if CANARY.encode() in data] == ["daemon.log"]
    log = kept["daemon.log"].decode()
    assert "asks" in log
    assert f"ValueError: {CANARY}" in log


def _what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **told: Any) -> dict[str, bytes]:
    """Every file of a daemon that was sent the canary in every place there is."""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    monkeypatch.setattr(discovery, "COMMAND", (sys.executable, "-P", "-c", FAILING))
    wanted = Settings(state_dir=tmp_path / "state", port=0, **told)
    found = discovery.ensure(wanted, WAIT_S)
    try:
        with httpx.Client(base_url=found.url, timeout=WAIT_S) as client:
            client.headers["Authorization"] = f"Bearer {found.token}"
            for send in _canaries():
                with suppress(httpx.HTTPError):
                    send(client)
        _send_raw(found.url, f"GET /{CANARY}\x00 HTTP/1.1\r\n{CANARY}\r\n\r\n".encode())
    finally:
        discovery.stop(wanted, WAIT_S)
    return {
        path.relative_to(wanted.state_dir).as_posix(): path.read_bytes()
        for path in wanted.state_dir.rglob("*")
        if path.is_file()
    }


def _canaries() -> Iterator[Callable[[httpx.Client], object]]:
    infill = {
        "text": CANARY,
        "spans": [{"start": 0, "end": 0}],
        "document": CANARY,
        "path": f"{CANARY}.py",
        # One word is the name of a language, which is counted.
        "language": f"{CANARY} {CANARY}",
        "instruction": CANARY,
        "context": [{"path": CANARY, "text": CANARY, "kind": "open"}],
        "pins": [{"span": 0, "at": "start", "text": CANARY}],
        "draft": [CANARY],
    }
    bodies = [
        infill,
        infill | {"stream": True},
        *(
            infill | {"text": f"{CANARY} {kind}", "stream": is_streamed}
            for kind in ("ValueError", "KeyError", "UnicodeError", "AssertionError")
            for is_streamed in (False, True)
        ),
        infill | {CANARY: 1},
        infill | {"spans": CANARY},
        infill | {"n": CANARY},
        infill | {"text": CANARY + "\ud800"},
        infill | {"context": [{"path": "a", "text": "b", "kind": CANARY}]},
        infill | {"pins": [{"span": 9, "at": "start", "text": CANARY}]},
        infill | {"deadline_ms": 10**9},
    ]
    for body in bodies:
        yield lambda client, body=body: _post(client, "/v1/infill", json.dumps(body))
    for text in (f'{{"text": "{CANARY}', f"{CANARY}", f'["{CANARY}"]', f'{{"{CANARY}": \xff'):
        yield lambda client, text=text: _post(client, "/v1/infill", text)
    told = {"id": CANARY, "event": "inserted"}
    yield lambda client: client.post("/v1/feedback", json=told)
    yield lambda client: client.post("/v1/feedback", json={"id": "x", "event": CANARY})
    shared = {
        "model": CANARY,
        "prompt": CANARY,
        "suffix": CANARY,
        "input_prefix": CANARY,
        "input_suffix": CANARY,
        "input_extra": [{"filename": CANARY, "text": CANARY}],
        "messages": [{"role": "user", "content": CANARY}],
        "user": CANARY,
    }
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/fim/completions",
        "/v1/edit/completions",
        "/infill",
        "/api/generate",
        "/api/chat",
        "/api/show",
        "/v1/model",
    ):
        for body in (
            shared,
            shared | {"stream": True},
            shared | {"prompt": f"{CANARY} ValueError", "input_prefix": f"{CANARY} ValueError"},
            shared | {"messages": [{"role": "user", "content": f"{CANARY} ValueError"}]},
            shared | {"messages": CANARY, "prompt": 5, "max_tokens": CANARY},
            shared | {"grammar": CANARY, "response_format": {"type": CANARY}},
        ):
            yield lambda client, path=path, body=body: client.post(path, json=body)
    yield lambda client: client.get(f"/{CANARY}?{CANARY}={CANARY}")
    yield lambda client: client.get(f"/v1/recent?limit={CANARY}")
    for name in ("Host", "Origin", "Authorization", "Content-Type", "Cookie", "User-Agent"):
        yield lambda client, name=name: client.post(
            "/v1/infill", json=infill, headers={name: CANARY}
        )


def _post(client: httpx.Client, path: str, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    client.post(path, content=content, headers={"Content-Type": "application/json"})


def _send_raw(url: str, data: bytes) -> None:
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as link:
        link.sendall(data)
        link.recv(1024)


# The network.


@pytest.mark.e2e
@pytest.mark.slow
def test_it_reaches_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon with the starter answers on every route and asks for nobody.

    Where the system gives it a network of its own, there is nobody to be reached.
    """
    seen = tmp_path / "seen"
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT / "watch_network"))
    monkeypatch.setenv("WATCH_NETWORK", str(seen))
    alone = ("unshare", "-rn", "--") if _can_have_its_own_network() else ()
    monkeypatch.setattr(discovery, "COMMAND", (*alone, *discovery.COMMAND))
    wanted = Settings(state_dir=tmp_path / "state", socket=tmp_path / "socket", device="cpu")
    found = discovery.ensure(wanted, WAIT_S)
    try:
        with Client(found.url, found.token) as client:
            client.wait_ready(WAIT_S)
            request = wire.InfillRequest(
                text="def add(a, b):\n    return \n", spans=[wire.Span(start=26, end=26)]
            )
            assert client.infill(request).usage.passes > 0
            assert isinstance(list(client.stream(request))[-1], wire.InfillReply)
        transport = httpx.HTTPTransport(uds=str(wanted.socket))
        with httpx.Client(
            transport=transport, base_url="http://localhost", timeout=WAIT_S
        ) as everything:
            assert everything.get("/").status_code in (200, 404)
            everything.headers["Authorization"] = f"Bearer {found.token}"
            paths = everything.get("/openapi.json").json()["paths"]
            statuses = {
                f"{method} {path}": _used(everything, method, path)
                for path, methods in paths.items()
                for method in set(methods) & {"get", "post"}
            }
        assert not {name: told for name, told in statuses.items() if told >= 500}
        assert sum(status == 200 for status in statuses.values()) >= 5
        reached = [
            row
            for table in ("tcp", "tcp6", "udp", "udp6")
            for row in Path(f"/proc/{found.pid}/net/{table}").read_text().splitlines()[1:]
        ]
        assert not alone or reached == []
    finally:
        discovery.stop(wanted, WAIT_S)
    assert set(seen.read_text().splitlines()) == {"watching"}


def test_whoever_reached_out_would_be_seen(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = """
import socket
for act in (
    lambda: socket.getaddrinfo("example.org", 80),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"", ("192.0.2.1", 9)),
    lambda: socket.create_connection(("127.0.0.1", 1), 0.1),
    lambda: __import__("requests"),
):
    try:
        act()
    except (OSError, ImportError):
        pass
"""
    environment = os.environ | {
        "PYTHONPATH": str(SUPPORT / "watch_network"),
        "WATCH_NETWORK": str(seen),
    }
    subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=True)
    assert [line.split()[0] for line in seen.read_text().splitlines()] == [
        "watching",
        "socket.getaddrinfo",
        "socket.sendto",
        "import",
    ]


def _used(client: httpx.Client, method: str, path: str) -> int:
    if method == "get":
        return client.get(path).status_code
    body = {
        "prompt": "x = ",
        "suffix": "\n",
        "input_prefix": "x = ",
        "input_suffix": "\n",
        "messages": [{"role": "user", "content": "x = "}],
        "max_tokens": 4,
        "n_predict": 4,
        "options": {"num_predict": 4},
        "stream": False,
    }
    return client.post(path, json=body).status_code


def _can_have_its_own_network() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(["unshare", "-rn", "--", "true"], capture_output=True, check=False)
    return tried.returncode == 0


def _token(server: LiveServer) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.token}"}


def _code(got: httpx.Response) -> str:
    return str(got.json()["error"]["code"])


@contextmanager
def _waiting(server: LiveServer, body: Any = GOOD) -> Iterator[None]:
    """A request that is open until the block ends."""
    where = urlsplit(server.url)
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/infill HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.token}\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection((where.hostname, where.port), timeout=20) as link:
        link.sendall(head.encode() + data)
        yield
