"""The life of the daemon's process, in real processes."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from daemon_process import WAIT_S, foreground

from infilld.server import cli, discovery
from infilld.server.client import Client
from infilld.server.discovery import DaemonProblem
from infilld.server.settings import Settings

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("_fake_daemon_is_found")]


def processes_of(settings: Settings) -> list[int]:
    """Every process that was started with this state folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(settings.state_dir).encode() in words:
            found.append(int(folder.name))
    return found


def test_ten_at_once_start_exactly_one(wanted: Settings) -> None:
    code = f"""
from pathlib import Path
from infilld.server import discovery
from infilld.server.settings import Settings
settings = Settings(state_dir=Path({str(wanted.state_dir)!r}), port=0, model={wanted.model!r})
print(discovery.ensure(settings, {WAIT_S}).pid)
"""
    words = [sys.executable, "-P", "-W", "error", "-c", code]
    children = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(10)]
    said = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0] * 10
    assert len(set(said)) == 1
    assert processes_of(wanted) == [int(said[0])]
    log = wanted.log_file.read_text()
    assert log.count("listening on") == 1
    assert "runs already" not in log, "only one may even try"
    environment = Path(f"/proc/{int(said[0])}/environ").read_bytes().split(b"\0")
    assert {b"OMP_WAIT_POLICY=passive", b"GOMP_SPINCOUNT=3000"} <= set(environment)


@pytest.mark.usefixtures("fake_command")
def test_the_second_finds_what_the_first_started(wanted: Settings) -> None:
    first = discovery.ensure(wanted, WAIT_S)
    assert discovery.ensure(wanted, WAIT_S) == first == discovery.find(wanted)
    with Client(first.url, first.token) as client:
        assert client.health().state == "ready"
    assert stat.S_IMODE(wanted.state_dir.stat().st_mode) == 0o700
    for file in wanted.state_dir.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    told = json.loads(discovery.address_file(wanted).read_text())
    assert set(told) == {"pid", "url", "api", "version", "started"}


@pytest.mark.usefixtures("fake_command")
def test_stop_ends_it_cleanly_and_the_token_stays(wanted: Settings) -> None:
    first = discovery.ensure(wanted, WAIT_S)
    assert discovery.stop(wanted, WAIT_S)
    assert not discovery.address_file(wanted).exists()
    assert discovery.find(wanted) is None
    assert not discovery.stop(wanted, WAIT_S)
    second = discovery.ensure(wanted, WAIT_S)
    assert second.pid != first.pid
    assert second.token == first.token


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(wanted: Settings, number: int) -> None:
    with foreground(wanted) as child:
        assert discovery.find(wanted) is not None
        child.send_signal(number)
        assert child.wait(WAIT_S) == 0
        assert not discovery.address_file(wanted).exists()
        assert discovery.running_pid(wanted) is None


def test_a_stale_address_is_not_believed(wanted: Settings) -> None:
    with foreground(wanted) as child:
        told = discovery.address_file(wanted).read_text()
        child.kill()
        child.wait()
    assert discovery.address_file(wanted).read_text() == told
    assert discovery.find(wanted) is None
    assert discovery.running_pid(wanted) is None
    with foreground(wanted) as child:
        found = discovery.find(wanted)
        assert found is not None
        assert found.pid == child.pid


@pytest.mark.usefixtures("fake_command")
def test_a_killed_daemon_is_started_again(wanted: Settings) -> None:
    first = discovery.ensure(wanted, WAIT_S)
    os.kill(first.pid, signal.SIGKILL)
    second = discovery.ensure(wanted, WAIT_S)
    assert second.pid != first.pid


def test_a_second_daemon_of_one_folder_is_refused(
    wanted: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    with foreground(wanted) as child:
        assert cli.main(["serve", *wanted.flags()]) == 1
        assert f"runs already for {wanted.state_dir} (pid {child.pid})" in capfd.readouterr().err
        assert discovery.find(wanted) is not None


@pytest.mark.usefixtures("fake_command")
def test_a_taken_port_names_its_owner(tmp_path: Path, wanted: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = Settings(state_dir=wanted.state_dir, port=port)
        with pytest.raises(DaemonProblem) as caught:
            discovery.ensure(taken, WAIT_S)
    assert f"port {port} is taken by" in str(caught.value)
    assert f"(pid {os.getpid()})" in str(caught.value)


@pytest.mark.usefixtures("fake_command")
def test_an_older_idle_daemon_is_replaced(wanted: Settings) -> None:
    first = discovery.ensure(wanted, WAIT_S)
    _tell_api(wanted, discovery.API - 1)
    second = discovery.ensure(wanted, WAIT_S)
    assert (second.api, second.pid == first.pid) == (discovery.API, False)


@pytest.mark.usefixtures("fake_command")
def test_a_newer_daemon_is_left_alone(wanted: Settings) -> None:
    first = discovery.ensure(wanted, WAIT_S)
    _tell_api(wanted, discovery.API + 1)
    with pytest.raises(DaemonProblem, match="newer"):
        discovery.ensure(wanted, WAIT_S)
    assert discovery.running_pid(wanted) == first.pid


def _tell_api(wanted: Settings, api: int) -> None:
    path = discovery.address_file(wanted)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"api": api}))


def test_one_that_hangs_is_named_and_not_doubled(wanted: Settings) -> None:
    with foreground(wanted) as child:
        child.send_signal(signal.SIGSTOP)
        with pytest.raises(DaemonProblem, match="did not answer"):
            discovery.ensure(wanted, 0.1)
        assert processes_of(wanted) == [child.pid]


def test_a_missing_model_is_said_by_fill(
    wanted: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real worker: the daemon lives, says why it cannot serve, and stops when told."""
    path = tmp_path / "a.py"
    path.write_text("x = ")
    assert cli.main(["fill", str(path), "--at", "1:5", *wanted.flags()]) == 1
    assert str(wanted.model) in capfd.readouterr().err
    assert cli.main(["status", "--json", *wanted.flags()]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["state"], told["loaded"]) == ("running", False)
    assert cli.main(["stop", *wanted.flags()]) == 0
