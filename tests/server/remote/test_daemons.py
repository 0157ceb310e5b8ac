"""Two real daemons, one behind the other."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from fake_worker import FakeWorker, Script
from live_server import serving
from remote_at_work import QUICK, fenced, wait_until

from infilld.engine.conversation import ChatRequest
from infilld.server import cli, wire
from infilld.server.client import Client, ServerProblem
from infilld.server.discovery import Daemon
from infilld.server.jobs import Worker
from infilld.server.remote.worker import RemoteWorker
from infilld.server.settings import Settings

CODE = "def add(a, b):\n    return \n"


def team_worker() -> FakeWorker:
    """Answers questions about files, and tells how they were asked."""
    return FakeWorker(Script(texts=[fenced("    return a + b")]))


@pytest.fixture
def team(tmp_path: Path) -> Iterator[tuple[Daemon, FakeWorker]]:
    """The daemon of the team's server."""
    worker = team_worker()
    with serving(Settings(state_dir=tmp_path / "team", port=0), worker) as found:
        yield found, worker


def mine(team_url: str, tmp_path: Path, **more: object) -> Settings:
    """Settings of the daemon at the desk."""
    return replace(
        Settings(state_dir=tmp_path / "mine", port=0),
        engine=f"openai:{team_url}",
        engine_key_file=tmp_path / "team" / "token",
        **more,
    )


def local_worker() -> Worker:
    return FakeWorker(Script(texts=["local"]))


def infill(found: Daemon) -> wire.InfillReply:
    with Client(found.url, found.token, timeout_s=20.0) as client:
        client.wait_ready(20)
        asked = wire.InfillRequest(text=CODE, spans=[wire.Span(start=26, end=26)], path="add.py")
        return client.infill(asked)


def test_the_shell_is_answered_by_the_other_daemon(
    team: tuple[Daemon, FakeWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, worker = team
    settings = mine(found.url, tmp_path)
    file = tmp_path / "add.py"
    file.write_text(CODE)
    with serving(settings, RemoteWorker(settings, local_worker, QUICK)) as own:
        with Client(own.url, own.token) as client:
            client.wait_ready(20)
        words = ["fill", str(file), "--at", "2:12", "--state-dir", str(settings.state_dir)]
        assert cli.main([*words, "--write"]) == 0
        assert cli.main(["status", "--state-dir", str(settings.state_dir)]) == 0
    assert file.read_text() == "def add(a, b):\n    return a + b\n"
    assert isinstance(worker.jobs[0].request, ChatRequest)
    assert "<gap>" in worker.jobs[0].request.messages[0].content
    assert "remote" in capsys.readouterr().out


def test_the_local_model_answers_while_the_other_daemon_is_gone(tmp_path: Path) -> None:
    there = Settings(state_dir=tmp_path / "team", port=0)
    with ExitStack() as at_the_desk:
        with serving(there, team_worker()) as found:
            there = replace(there, port=int(found.url.rpartition(":")[2]))
            settings = mine(found.url, tmp_path, fail_over=True)
            remote = RemoteWorker(settings, local_worker, QUICK)
            own = at_the_desk.enter_context(serving(settings, remote))
            reply = infill(own)
            assert (reply.choices[0].spans[0].text, reply.model) == ("a + b", "fake")
        reply = infill(own)
        assert reply.choices[0].spans[0].text == "local"
        with serving(there, team_worker()):
            wait_until(lambda: remote.describe()["engine"] == "remote")
            assert infill(own).choices[0].spans[0].text == "a + b"


def test_a_client_that_leaves_here_is_gone_there(
    team: tuple[Daemon, FakeWorker], tmp_path: Path
) -> None:
    import httpx

    found, worker = team
    settings = mine(found.url, tmp_path)
    worker.hold()
    with serving(settings, RemoteWorker(settings, local_worker, QUICK)) as own:
        with Client(own.url, own.token) as client:
            client.wait_ready(20)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{own.url}/v1/infill",
                json={"text": CODE, "spans": [{"start": 26, "end": 26}]},
                headers={"Authorization": f"Bearer {own.token}"},
                timeout=0.5,
                trust_env=False,
            )
        worker.wait_for(lambda: worker.stats()["cancelled"] == 1)


def test_errors_of_the_other_daemon_are_plain(tmp_path: Path) -> None:
    settings = mine("http://127.0.0.1:9", tmp_path)
    (tmp_path / "team").mkdir()
    (tmp_path / "team" / "token").write_text("k")
    with (
        serving(settings, RemoteWorker(settings, local_worker, QUICK)) as own,
        Client(own.url, own.token) as client,
        pytest.raises(ServerProblem, match="not answer"),
    ):
        client.wait_ready(20)
