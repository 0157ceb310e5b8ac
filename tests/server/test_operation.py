"""Running the daemon: in the background, killed at any time, stopped while it streams, switched."""

import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from daemon_process import FAKE, WAIT_S, foreground, nursery
from ended_jobs import GAP
from fake_worker import FakeWorker
from live_server import LiveServer, live_server

from infilld.engine.errors import Unavailable, Unsupported
from infilld.server import cli, discovery, wire
from infilld.server.client import Client, ServerProblem
from infilld.server.jobs import Jobs
from infilld.server.settings import Settings
from infilld.server.verbs import model_choice

BODY = {"text": "x = ", "spans": [{"start": 4, "end": 4}], "document": None}
ASKED = wire.InfillRequest(text="x = ", spans=[wire.Span(start=4, end=4)])


def run(wanted: Settings, *words: str) -> int:
    return cli.main([*words, *wanted.flags()])


def head(url: str, token: str, body: bytes, path: str = "/v1/infill") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Length: {len(body)}\r\n"
        f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\n\r\n"
    ).encode()


def connect(url: str) -> socket.socket:
    where = urlsplit(url)
    return socket.create_connection((where.hostname, where.port), timeout=WAIT_S)


@contextmanager
def half_a_request(found: discovery.Daemon) -> Iterator[None]:
    """A client that the daemon has to wait for, or to give up."""
    with connect(found.url) as link:
        link.sendall(head(found.url, found.token, b"x" * 100) + b"{")
        # It is read in the order it was sent, and so is seen by who asks later.
        with Client(found.url, found.token) as client:
            client.health()
        yield


@pytest.mark.e2e
@pytest.mark.usefixtures("_fake_daemon_is_found", "fake_command")
def test_in_the_background(wanted: Settings, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(wanted, "serve", "--detach", "--wait") == 0
    found = discovery.find(wanted)
    assert found is not None
    said = f"{found.url} (pid {found.pid})"
    assert capfd.readouterr().out == f"started: {said}\nfake is loaded\n"
    assert run(wanted, "serve", "--detach") == 0
    assert capfd.readouterr().out == f"a daemon runs already: {said}\n"
    assert os.getsid(found.pid) == found.pid, "it must outlive the terminal"
    assert run(wanted, "status") == 0
    told = dict(line.split(maxsplit=1) for line in capfd.readouterr().out.splitlines())
    assert told["page"] == f"{found.url}/#token={found.token}"
    assert told["loaded"] == "yes"
    assert run(wanted, "status", "--json") == 0
    out = capfd.readouterr().out
    assert found.token not in out
    assert json.loads(out)["page"] == f"{found.url}/"
    assert "listening on" in wanted.log_file.read_text()


@pytest.mark.e2e
@pytest.mark.slow
def test_a_daemon_whose_first_model_fails_stands_in_nobody_s_way(
    wanted: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--detach", "--wait", "--state-dir", str(wanted.state_dir), "--port", "0"]
    assert cli.main([*words, "--model", str(tmp_path / "none")]) == 1
    said = capfd.readouterr().err
    assert "no model folder" in said
    assert "ended again" in said
    assert discovery.find(wanted) is None
    assert cli.main([*words, "--device", "cpu"]) == 0
    assert "starter is loaded" in capfd.readouterr().out
    assert cli.main([*words, "--device", "cpu"]) == 0
    assert "--device, --port count when the daemon starts" in capfd.readouterr().err


@pytest.mark.usefixtures("own_home")
def test_waiting_needs_the_background(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--wait"]) == 2
    assert "--wait needs --detach" in capfd.readouterr().err


@pytest.mark.e2e
@pytest.mark.usefixtures("_fake_daemon_is_found")
def test_killed_at_any_time_it_starts_clean_and_keeps_every_row(wanted: Settings) -> None:
    with nursery(wanted) as bear:
        _kill_often(wanted, bear)


def _kill_often(wanted: Settings, bear: Callable[[], discovery.Daemon]) -> None:
    dice = random.Random(6)
    known, token = 0, ""
    failures: list[object] = []
    for number in range(12):
        found = bear()
        assert token in ("", found.token), "the token is kept"
        token = found.token
        stopping = threading.Event()
        askers = [threading.Thread(target=_ask, args=(found, stopping, failures)) for _ in range(4)]
        for asker in askers:
            asker.start()
        _wait_for_rows(wanted, known + 5)
        time.sleep(dice.random() * 0.05)
        known = max(known, _rows(wanted))
        os.kill(found.pid, signal.SIGKILL)
        stopping.set()
        for asker in askers:
            asker.join()
        # Half a write of each file that a kill may leave.
        (wanted.state_dir / f".daemon.json.half{number}").write_bytes(b'{"pid": 1, "ur')
    assert failures == []
    found = bear()
    assert _rows(wanted) >= known
    with Client(found.url, found.token) as client:
        assert client.infill(ASKED).reason == "ok"
        told = client.stats()
    assert told["statistics"]["state"] == "kept"
    assert told["total"]["answers"] >= known
    assert not list(wanted.state_dir.glob(".daemon.json.*"))
    assert not list(wanted.state_dir.glob("stats.sqlite.damaged*"))
    with closing(sqlite3.connect(wanted.state_dir / "stats.sqlite")) as link:
        assert link.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def _ask(found: discovery.Daemon, stopping: threading.Event, failures: list[object]) -> None:
    """Ask and tell until the daemon is gone."""
    with Client(found.url, found.token) as client:
        while not stopping.is_set():
            try:
                job = client.infill(ASKED).id
                client.feedback(wire.Feedback(id=job, event="shown"))
            except ServerProblem as problem:
                if problem.status:
                    failures.append(problem)
                return


def _rows(wanted: Settings) -> int:
    address = f"{(wanted.state_dir / 'stats.sqlite').as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True)) as link:
            return int(link.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # not made yet


def _wait_for_rows(wanted: Settings, count: int) -> None:
    until = time.monotonic() + WAIT_S
    while _rows(wanted) < count:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.e2e
@pytest.mark.usefixtures("_fake_daemon_is_found")
def test_what_is_left_of_others_is_no_obstacle(wanted: Settings) -> None:
    """A lock file that names a living process, half an address, a torn database."""
    wanted.state_dir.mkdir(mode=0o700)
    discovery.lock_file(wanted).write_text(f"{os.getpid()}\ngarbage")
    discovery.address_file(wanted).write_bytes(b'{"pid": 12, "url": "http://127.')
    (wanted.state_dir / "stats.sqlite").write_bytes(b"SQLite format 3\0torn")
    (wanted.state_dir / "start.lock").write_bytes(b"")
    assert discovery.running_pid(wanted) is None
    with foreground(wanted) as child:
        found = discovery.find(wanted)
        assert found is not None
        assert found.pid == discovery.running_pid(wanted) == child.pid
        with Client(found.url, found.token) as client:
            assert "damaged_file" in client.stats()["statistics"]


@pytest.mark.e2e
@pytest.mark.usefixtures("_fake_daemon_is_found")
def test_a_full_disk_is_said_at_the_start(wanted: Settings) -> None:
    """No file may grow: writes fail as on a full disk, whatever the rights of this user."""
    words = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh", sys.executable, str(FAKE)]
    done = subprocess.run(
        [*words, *wanted.flags()], capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert (done.returncode, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert first.startswith(f"infilld: cannot write in {wanted.state_dir}: ")
    assert "--state-dir" in second
    with foreground(wanted) as child:
        assert discovery.running_pid(wanted) == child.pid


@pytest.mark.skipif(sys.platform == "win32", reason="ulimit is a shell's")
def test_a_deep_grammar_has_room_whatever_the_shell_allows() -> None:
    """Compiled in a thread, as the daemon does; without that room this process would be ended."""
    code = (
        "import json, threading\n"
        "from infilld.engine.grammar import refuse_bad\n"
        "from infilld.engine.request import Grammar\n"
        "from infilld.server.verbs.operate import give_threads_room\n"
        "give_threads_room()\n"
        "links = {f'a{n}': {'$ref': f'#/$defs/a{n + 1}'} for n in range(300)}\n"
        "schema = {'$defs': links | {'a300': {'type': 'null'}}, '$ref': '#/$defs/a0'}\n"
        "check = lambda: print(refuse_bad(Grammar('json_schema', json.dumps(schema))))\n"
        "thread = threading.Thread(target=check)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    words = ["sh", "-c", 'ulimit -s 512; exec "$@"', "sh", sys.executable, "-P", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


STREAMED: dict[str, dict[str, object]] = {
    "/v1/infill": {"text": "x = ", "spans": [{"start": 4, "end": 4}]},
    "/v1/completions": {"model": "m", "prompt": "x = ", "suffix": "\n"},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    "/infill": {"input_prefix": "x = ", "input_suffix": "\n"},
    "/api/generate": {"model": "m", "prompt": "x = ", "suffix": "\n"},
}
STREAMS = 50
# Two seconds are given to clients; the rest is a busy machine's.
STOP_S = 5.0


def test_a_stop_ends_fifty_streams_properly(tmp_path: Path) -> None:
    """Each is told in its own words why it ends, and its connection is closed, not cut."""
    worker = FakeWorker(capacity=STREAMS)
    worker.hold()
    links: list[tuple[str, socket.socket]] = []
    with live_server(tmp_path / "state", worker) as server:
        for number in range(STREAMS):
            route = list(STREAMED)[number % len(STREAMED)]
            data = json.dumps(STREAMED[route] | {"stream": True}).encode()
            link = connect(server.url)
            link.sendall(head(server.url, server.token, data, route) + data)
            links.append((route, link))
        worker.wait_for(lambda: len(worker.jobs) == STREAMS)
        begun = time.monotonic()
    assert time.monotonic() - begun < STOP_S
    for route, link in links:
        said = b"".join(iter(lambda link=link: link.recv(1 << 16), b""))  # type: ignore[misc]
        link.close()
        assert said.startswith(b"HTTP/1.1 200 "), said
        assert said.endswith(b"0\r\n\r\n"), f"{route} was cut off"
        assert b"error" in said, said
        assert b"cancelled" in said, said
        assert (b"event: error\n" in said) == (route == "/v1/infill")


def test_a_stopping_daemon_takes_no_more() -> None:
    jobs = Jobs(FakeWorker())
    jobs.cancel_all()
    with pytest.raises(Unavailable, match="stopping"):
        jobs.submit(GAP, route="/v1/infill", with_updates=False)


@pytest.mark.e2e
@pytest.mark.usefixtures("_fake_daemon_is_found")
def test_a_client_that_stalls_does_not_hold_a_stop_up(wanted: Settings) -> None:
    with foreground(wanted) as child:
        found = discovery.find(wanted)
        assert found is not None
        with half_a_request(found):
            begun = time.monotonic()
            child.terminate()
            assert child.wait(WAIT_S) == 0
            assert time.monotonic() - begun < STOP_S
        assert not discovery.address_file(wanted).exists()


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("_fake_daemon_is_found")
def test_a_second_signal_ends_it_at_once(wanted: Settings, number: int) -> None:
    with foreground(wanted) as child:
        found = discovery.find(wanted)
        assert found is not None
        with half_a_request(found):
            child.send_signal(number)
            # Once it has stopped listening the first signal was taken.
            with suppress(OSError):
                while True:
                    connect(found.url).close()
            child.send_signal(number)
            # A daemon that took its time would end with 0.
            assert child.wait(WAIT_S) == 128 + number
        assert not discovery.address_file(wanted).exists()


@pytest.mark.e2e
@pytest.mark.usefixtures("_fake_daemon_is_found")
def test_a_service_manager_is_told(wanted: Settings, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(WAIT_S)
        environ = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with foreground(wanted, environ=environ) as child:
            assert manager.recv(100) == b"READY=1"
            child.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert child.wait(WAIT_S) == 0


def test_without_auth_the_link_has_no_token(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with live_server(tmp_path / "state", auth=False) as server:
        server.settings.token_file.write_text("a-token-of-earlier-days\n")
        assert run(server.settings, "status") == 0
    assert f"{server.url}/\n" in capfd.readouterr().out


# Another model.


def post(server: LiveServer, body: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.token}"}
    return httpx.post(server.url + "/v1/model", json=body, headers=headers)


def test_the_route_for_another_model(server: LiveServer, tmp_path: Path) -> None:
    got = post(server, {"model": str(tmp_path)})
    assert (got.status_code, got.json()) == (202, {"model": "fake", "state": "ready"})
    assert post(server, {"model": "starter"}).status_code == 202
    assert server.worker.switched == [tmp_path, None]


@pytest.mark.parametrize(
    "body",
    [
        *(
            {"model": model}
            for model in ("relative", "/a\0b", "", "/no/where", "/" + "x" * 9999, 3)
        ),
        {},
        {"x": 1},
    ],
)
def test_what_is_no_model_is_a_400(shared: LiveServer, body: object) -> None:
    got = post(shared, body)
    assert got.status_code == 400
    assert got.json()["error"]["remedy"]
    assert shared.worker.switched == []


class Switching(FakeWorker):
    """Takes a while to switch; `complaint` says why it could not."""

    def __init__(self, complaint: str | None = None) -> None:
        super().__init__()
        self.complaint = complaint
        self.looks = 0

    def describe(self) -> dict[str, object]:
        told = super().describe()
        if not self.switched:
            return told
        self.looks += 1
        if self.looks < 4:
            return told | {"state": "switching"}
        return told if self.complaint is None else told | {"switch_failure": self.complaint}


@pytest.fixture
def config(own_home: Path) -> Path:
    path = own_home / "config" / "infilld" / "config.toml"
    path.parent.mkdir(parents=True)
    path.write_text('model = "starter"\n')
    return path


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A folder that may be a model."""
    folder = tmp_path / "models" / "one"
    folder.mkdir(parents=True)
    return folder


def choose(model: Path, server: LiveServer, *, is_live: bool = True) -> None:
    model_choice.choose(str(model), server.settings, is_live=is_live)


def test_a_daemon_that_runs_switches_and_the_configuration_follows(
    tmp_path: Path, config: Path, one: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with live_server(tmp_path / "state", Switching()) as server:
        choose(one, server)
        assert server.worker.switched == [one]
    assert config.read_text() == f'model = "{one}"\n'
    out, err = capfd.readouterr()
    assert "has loaded it" in out
    assert err == f"loading {one}\n"


def test_a_model_that_cannot_be_loaded_changes_nothing(
    tmp_path: Path, config: Path, one: Path
) -> None:
    worker = Switching("it does not fit. Choose a smaller model.")
    with (
        live_server(tmp_path / "state", worker) as server,
        pytest.raises(Exception, match="Choose a smaller model") as caught,
    ):
        choose(one, server)
    assert "The old model stays" in caught.value.remedy  # type: ignore[attr-defined]
    assert config.read_text() == 'model = "starter"\n'


@pytest.mark.parametrize("is_live", [False, True])
def test_a_daemon_that_keeps_its_model(
    tmp_path: Path,
    config: Path,
    one: Path,
    is_live: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refuse(self: FakeWorker, folder: Path | None) -> None:
        raise Unsupported("the engine is remote")

    monkeypatch.setattr(FakeWorker, "switch", refuse)
    with live_server(tmp_path / "state") as server:
        choose(one, server, is_live=is_live)
    assert config.read_text() == f'model = "{one}"\n'
    assert "keeps its model until" in capfd.readouterr().out


def test_stats_as_a_table_with_and_without_a_daemon(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["stats", "--state-dir", str(tmp_path / "state")]
    assert cli.main(words) == 0
    assert "nothing was asked yet" in capfd.readouterr().out
    with live_server(tmp_path / "state") as server:
        with server.client() as client:
            client.infill(ASKED)
        assert cli.main(words) == 0
        live = capfd.readouterr().out
    assert [line.split() for line in live.splitlines()[:2]] == [
        ["today", "7", "days", "90", "days"],
        ["answers", "1", "1", "1"],
    ]
    assert cli.main(words) == 0
    assert capfd.readouterr().out == live
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["total"]["answers"] == 1


@pytest.mark.e2e
@pytest.mark.slow
def test_the_real_engine_is_switched_and_stopped(wanted: Settings, tmp_path: Path) -> None:
    """Both ways, and to what is no model; a stop while it loads takes no longer than others."""
    real = Settings(state_dir=wanted.state_dir, port=0, device="cpu")
    found = discovery.ensure(real, WAIT_S)
    with Client(found.url, found.token) as client:
        client.wait_ready(WAIT_S)
        assert client.models()[0]["last_load_s"] > 0
        empty = tmp_path / "empty"
        empty.mkdir()
        with pytest.raises(Exception, match="could not load") as caught:
            model_choice.choose(str(empty), real, is_live=True)
        assert str(empty) in str(caught.value)
        assert client.infill(ASKED).model == "starter"
        model_choice.choose("starter", real, is_live=True)
        assert client.models()[0]["state"] == "ready"
        assert client.stats()["loads"] == 2
        client.switch("starter")
        begun = time.monotonic()
        assert discovery.stop(real, WAIT_S)
        assert time.monotonic() - begun < STOP_S
