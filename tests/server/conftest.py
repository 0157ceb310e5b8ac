import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_process import FAKE, WAIT_S
from live_server import LiveServer, live_server

from infilld.server import discovery
from infilld.server.settings import Settings


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose configuration and state a test can look into."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path / "state") as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for the tests of a file that leave no job behind."""
    with live_server(tmp_path_factory.mktemp("shared") / "state") as running:
        yield running


@pytest.fixture
def _fake_daemon_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake daemon finds its worker although its own folder is kept off the path."""
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", str(FAKE.parent))


@pytest.fixture
def wanted(tmp_path: Path) -> Iterator[Settings]:
    """Settings of a daemon that is stopped after the test, whoever started it."""
    settings = Settings(state_dir=tmp_path / "state", port=0, model=str(tmp_path / "no model"))
    yield settings
    pid = discovery.running_pid(settings)
    if pid is not None:
        os.kill(pid, signal.SIGCONT)
        discovery.stop(settings, WAIT_S)


@pytest.fixture
def fake_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `ensure` starts serves a fake worker."""
    monkeypatch.setattr(discovery, "COMMAND", (sys.executable, str(FAKE)))
