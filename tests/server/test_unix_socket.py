"""The daemon on a Unix socket: who may use it, what may stand in its place, and its clients."""

import http.client
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_worker import FakeWorker
from live_server import serving

from infilld.lsp.daemon import DaemonLink
from infilld.server import cli, discovery, wire
from infilld.server.client import AsyncClient, Client
from infilld.server.discovery import Daemon, DaemonProblem
from infilld.server.process import ports
from infilld.server.settings import Settings

FAKE = Path(__file__).parents[1] / "support" / "fake_daemon.py"
REQUEST = wire.InfillRequest(text="x = ", spans=[wire.Span(start=4, end=4)])


@pytest.fixture
def wanted(tmp_path: Path) -> Settings:
    return Settings(state_dir=tmp_path / "state", socket=tmp_path / "run" / "infilld #1%.sock")


@pytest.fixture
def found(wanted: Settings) -> Iterator[Daemon]:
    with serving(wanted, FakeWorker()) as daemon:
        yield daemon


def path_of(settings: Settings) -> Path:
    assert settings.socket is not None
    return settings.socket


def test_it_is_its_owner_s_alone_and_goes_with_the_daemon(wanted: Settings) -> None:
    path = path_of(wanted)
    with serving(wanted, FakeWorker()) as found:
        assert found.url == f"unix:{path}"
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


@pytest.mark.asyncio
async def test_both_clients_speak_over_it(found: Daemon) -> None:
    with Client(found.url, found.token) as client:
        assert client.infill(REQUEST).choices[0].spans[0].text == "return 1"
        assert isinstance(list(client.stream(REQUEST))[-1], wire.InfillReply)
    async with AsyncClient(found.url, found.token) as client:
        assert (await client.infill(REQUEST)).reason == "ok"
        assert (await client.health()).state == "ready"


@pytest.mark.parametrize(
    ("host", "token", "status"),
    [
        ("localhost", True, 200),
        ("127.0.0.1:9999", True, 200),
        ("localhost", False, 401),
        ("evil.example", True, 403),
    ],
)
def test_the_guard_stands_before_it(found: Daemon, host: str, token: bool, status: int) -> None:
    link = discovery._link(found.url)
    headers = {"Host": host} | ({"Authorization": f"Bearer {found.token}"} if token else {})
    link.request("GET", "/v1/models", headers=headers)
    got = link.getresponse()
    assert got.status == status
    assert json.loads(got.read())
    link.close()


def test_a_page_behind_a_forwarded_port_is_ours(found: Daemon) -> None:
    def asked_from(origin: str) -> int:
        link: http.client.HTTPConnection = discovery._link(found.url)
        headers = {"Authorization": f"Bearer {found.token}", "Origin": origin}
        link.request("GET", "/v1/models", headers=headers | {"Host": "localhost:9000"})
        status = link.getresponse().status
        link.close()
        return status

    assert asked_from("http://localhost:9000") == 200
    assert asked_from("http://localhost:3000") == 403


def test_what_a_dead_daemon_left_is_replaced(wanted: Settings) -> None:
    path = path_of(wanted)
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(wanted, FakeWorker()) as found, Client(found.url, found.token) as client:
        assert client.health().state == "ready"


def test_a_socket_in_use_names_its_owner(wanted: Settings) -> None:
    with (
        ports.listen_unix(path_of(wanted)),
        pytest.raises(DaemonProblem, match=rf"is taken by .*pid {os.getpid()}") as caught,
    ):
        ports.listen_unix(path_of(wanted))
    assert caught.value.code == "socket_taken"
    assert path_of(wanted).exists(), "who listens keeps it"


def test_no_other_file_is_removed(wanted: Settings) -> None:
    path = path_of(wanted)
    path.parent.mkdir(mode=0o700)
    path.write_text("mine")
    with pytest.raises(DaemonProblem, match="is no socket"):
        ports.listen_unix(path)
    assert path.read_text() == "mine"


def test_a_path_that_is_too_long_says_so(tmp_path: Path) -> None:
    with pytest.raises(DaemonProblem, match=r"has \d+ bytes, a socket's path may have"):
        ports.listen_unix(tmp_path / ("x" * 100))


@pytest.mark.parametrize("mode", [0o1777, 0o770])
def test_a_folder_of_others_is_refused(tmp_path: Path, mode: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    with pytest.raises(DaemonProblem, match="open to other users") as caught:
        ports.listen_unix(shared / "s")
    assert "XDG_RUNTIME_DIR" in caught.value.remedy


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DaemonProblem, match="cannot use"):
        ports.listen_unix(tmp_path / "file" / "below" / "s")


@pytest.mark.e2e
def test_status_and_fill_speak_over_it(
    wanted: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A real process, which dies without its end and is started again."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", str(FAKE.parent))
    monkeypatch.setattr(discovery, "COMMAND", (sys.executable, str(FAKE)))
    path = tmp_path / "a.py"
    path.write_text("x = ")
    try:
        for _ in range(2):
            assert cli.main(["fill", str(path), "--at", "1:5", *wanted.flags()]) == 0
            assert "return 1" in capfd.readouterr().out
            assert cli.main(["status", "--json", *wanted.flags()]) == 0
            told = json.loads(capfd.readouterr().out)
            assert (told["state"], told["url"]) == ("running", f"unix:{path_of(wanted)}")
            os.kill(told["pid"], signal.SIGKILL)
            assert path_of(wanted).exists()
    finally:
        discovery.stop(wanted, 60)


@pytest.mark.asyncio
async def test_the_bridge_s_link_speaks_over_it(
    found: Daemon, wanted: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFILLD_STATE_DIR", str(wanted.state_dir))
    monkeypatch.setenv("INFILLD_SOCKET", str(wanted.socket))
    link = DaemonLink(lambda state, why: None)
    link.may_start = False
    client = await link.client(20)
    assert client is not None, link.why
    assert (await client.infill(REQUEST)).reason == "ok"
    assert link.daemon is not None
    assert link.daemon.url == found.url
    await link.close()
