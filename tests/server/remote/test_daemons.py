"""Two real daemons, one behind the other."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_openai import FakeOpenAI, Reply
from fake_worker import FakeWorker, Script
from live_server import serving
from remote_at_work import QUICK, remote_worker, wait_until

from infilld.engine.conversation import ChatRequest
from infilld.engine.errors import ContextTooLong, InfilldError, Unavailable, Unsupported
from infilld.engine.request import CanvasUpdate, InfillRequest, Span
from infilld.server import cli, wire
from infilld.server.client import Client, ServerProblem
from infilld.server.discovery import Daemon
from infilld.server.jobs import Worker
from infilld.server.remote.worker import RemoteWorker
from infilld.server.routes import records
from infilld.server.settings import Settings

CODE = "def add(a, b):\n    return \n"


def team_worker() -> FakeWorker:
    return FakeWorker(Script(texts=["a + b"]))


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


def asked(**more: Any) -> wire.InfillRequest:
    return wire.InfillRequest(text=CODE, spans=[wire.Span(start=26, end=26)], path="add.py", **more)


def infill(found: Daemon, **more: Any) -> wire.InfillReply:
    with Client(found.url, found.token, timeout_s=60.0) as client:
        client.wait_ready(60)
        return client.infill(asked(**more))


def fill_from_the_shell(settings: Settings, file: Path) -> None:
    """`infilld fill --write` through the daemon at the desk."""
    file.write_text(CODE)
    with serving(settings, RemoteWorker(settings, local_worker, QUICK)) as own:
        with Client(own.url, own.token) as client:
            client.wait_ready(20)
        words = ["fill", str(file), "--at", "2:12", "--state-dir", str(settings.state_dir)]
        assert cli.main([*words, "--write"]) == 0
        assert cli.main(["status", "--state-dir", str(settings.state_dir)]) == 0
    assert file.read_text() == "def add(a, b):\n    return a + b\n"


def test_the_shell_is_answered_by_another_infilld(
    team: tuple[Daemon, FakeWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, worker = team
    fill_from_the_shell(mine(found.url, tmp_path), tmp_path / "add.py")
    got = worker.jobs[0].request
    assert isinstance(got, InfillRequest)
    assert got.text == CODE
    assert "remote" in capsys.readouterr().out


def test_the_shell_is_answered_by_a_chat_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = tmp_path / "team" / "token"
    key.parent.mkdir()
    key.write_text("k")
    with FakeOpenAI(Reply(texts=["```python\n    return a + b\n```"])) as fake:
        fake.key = "k"
        fill_from_the_shell(mine(fake.url, tmp_path), tmp_path / "add.py")
        assert "<gap>" in fake.asked[0]["messages"][0]["content"]
    assert "remote" in capsys.readouterr().out


def test_all_of_a_request_reaches_another_infilld(
    team: tuple[Daemon, FakeWorker], tmp_path: Path
) -> None:
    found, worker = team
    settings = mine(found.url, tmp_path)
    more: dict[str, Any] = {
        "document": "add.py",
        "language": "python",
        "context": [wire.ContextItem(path="b.py", text="b = 1", kind="open")],
        "pins": [wire.Pin(span=0, at="start", text="a"), wire.Pin(span=0, at="end", text="b")],
        "draft": ["a"],
        "n": 2,
        "min_tokens": 1,
        "max_tokens": 9,
        "boldness": 0.75,
        "deadline_ms": 5000,
        "seed": 3,
        "background": True,
    }
    with serving(settings, RemoteWorker(settings, local_worker, QUICK)) as own:
        reply = infill(own, **more)
        with Client(own.url, own.token) as client:
            events = list(client.stream(asked(show_tokens=True)))
    got = worker.jobs[0].request
    assert isinstance(got, InfillRequest)
    assert got.deadline_ms is not None
    assert 4000 < got.deadline_ms < 5000
    # Somebody else's document may have the same name.
    assert got.document != "add.py"
    direct = records.to_engine(asked(**more))
    assert replace(got, document="add.py", deadline_ms=5000) == direct
    (choice,) = reply.choices
    assert (choice.spans[0].text, choice.spans[0].confidence, choice.score) == ("a + b", 0.9, -0.1)
    assert reply.usage.passes == 2
    canvases = [event for event in events if isinstance(event, wire.CanvasEvent)]
    assert [event.spans[0].text for event in canvases] == ["rxturn q", "return q"]
    assert all(event.tokens for event in canvases)


@pytest.mark.parametrize("error", [Unsupported("not this"), ContextTooLong("it is long")])
def test_what_another_infilld_refuses_is_refused_alike(
    team: tuple[Daemon, FakeWorker], tmp_path: Path, error: InfilldError
) -> None:
    found, worker = team
    worker.script = Script(error=error)
    settings = mine(found.url, tmp_path)
    with (
        serving(settings, RemoteWorker(settings, local_worker, QUICK)) as own,
        pytest.raises(ServerProblem) as raised,
    ):
        infill(own)
    assert (raised.value.code, raised.value.status) == (error.code, 400)


def test_pins_are_looked_after(team: tuple[Daemon, FakeWorker], tmp_path: Path) -> None:
    found, worker = team
    worker.script = Script(texts=["a + b", "b"])
    settings = mine(found.url, tmp_path)
    with serving(settings, RemoteWorker(settings, local_worker, QUICK)) as own:
        reply = infill(own, n=2, pins=[wire.Pin(span=0, at="start", text="a")])
    assert [choice.spans[0].text for choice in reply.choices] == ["a + b"]


def test_a_conversation_is_held_there(team: tuple[Daemon, FakeWorker], tmp_path: Path) -> None:
    found, worker = team
    worker.script = Script(texts=["hello you there"], thoughts="hm")
    settings = mine(found.url, tmp_path)
    with serving(settings, RemoteWorker(settings, local_worker, QUICK)) as own:
        with Client(own.url, own.token) as client:
            client.wait_ready(20)
        got = httpx.post(
            f"{own.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}]},
            headers={"Authorization": f"Bearer {own.token}"},
            timeout=20,
            trust_env=False,
        )
    assert got.json()["choices"][0]["message"]["content"] == "hello you there"
    assert isinstance(worker.jobs[0].request, ChatRequest)


@pytest.mark.slow
def test_the_starter_answers_as_it_does_next_door(tmp_path: Path) -> None:
    from infilld.engine.worker import Worker as Engine

    there = Settings(state_dir=tmp_path / "team", port=0)
    with serving(there, Engine(device="cpu")) as found:
        settings = mine(found.url, tmp_path)
        direct = infill(found, seed=1)
        with serving(settings, RemoteWorker(settings, local_worker, QUICK)) as own:
            through = infill(own, seed=1)
    assert through.choices == direct.choices
    assert through.model == direct.model == "starter"
    assert through.reason == direct.reason


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


def test_updates_of_several_attempts_are_one_row(
    team: tuple[Daemon, FakeWorker], tmp_path: Path
) -> None:
    found, worker = team
    worker.script = Script(error=Unavailable("the device is gone"))
    key = tmp_path / "team" / "token"
    updates: list[CanvasUpdate] = []
    with remote_worker(found.url, local_worker, engine_key_file=key, fail_over=True) as own:
        span = Span(26, 26)
        result = own.submit(InfillRequest(text=CODE, spans=(span,)), updates.append).future
        assert result.result(20).alternatives[0].spans[0].text == "local"
    assert len(worker.jobs) == 2
    assert [each.seq for each in updates] == list(range(6))
    assert all(each.spans[0].settled for each in updates[::2])
    assert [each.revised for each in updates] == [False, False, True, False, True, False]


def test_a_client_that_leaves_here_is_gone_there(
    team: tuple[Daemon, FakeWorker], tmp_path: Path
) -> None:
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


def test_models_and_doctor_say_remote(
    team: tuple[Daemon, FakeWorker], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _ = team
    engine = ["--engine", f"openai:{found.url}", "--state-dir", str(tmp_path / "mine")]
    assert cli.main(["models", *engine]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"* auto  of the remote engine at {found.url}"
    assert lines[1].startswith("  starter")
    key = str(tmp_path / "team" / "token")
    cli.main(["doctor", *engine, "--engine-key-file", key, "--port", "0"])
    assert f"ok    engine: fake at {found.url}" in capsys.readouterr().out
    cli.main(["doctor", *engine, "--port", "0"])
    said = capsys.readouterr().out
    assert "FAIL  engine" in said
    assert "engine_key_file" in said
