"""The daemon comes, goes, loads and fails; the editor never waits for it without asking to."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_editor import AUTOMATIC, INVOKED, FakeEditor
from fake_worker import FakeWorker, Script
from live_server import live_server

from infilld.engine.errors import CheckpointMissing
from infilld.lsp.options import Options, parse_options

URI = "file:///a.py"
FILLED = [
    {
        "insertText": "return 1",
        "range": {"start": {"line": 0, "character": 4}, "end": {"line": 0, "character": 4}},
    }
]


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Starts bridges on one state folder, with a document open; ends them after the test."""
    with ExitStack() as stack:

        def begin(environ: dict[str, str] | None = None, **options: object) -> FakeEditor:
            editor = FakeEditor(
                tmp_path,
                state_dir=tmp_path / "state",
                options={"startDaemon": False, "daemonWaitMs": 20_000, **options},
                environ=environ,
            )
            stack.enter_context(editor)
            editor.initialize()
            editor.open(URI, "x = \n")
            return editor

        yield begin


Start = Callable[..., FakeEditor]


def test_a_daemon_that_asks_for_no_token_is_used_without_one(start: Start, tmp_path: Path) -> None:
    with live_server(tmp_path / "state", auth=False) as server:
        assert server.token == ""
        editor = start({"INFILLD_AUTH": "false"})
        assert editor.items(URI, 0, 4, INVOKED) == FILLED
        assert editor.status()["model"] == "fake"


def test_without_a_daemon_the_answer_is_empty_and_says_why(start: Start) -> None:
    editor = start(daemonWaitMs=0)
    status = editor.wait_state("failed")
    assert status["why"] == "No daemon runs. Start it with: infilld serve"
    assert status["url"] is None
    assert status["model"] is None
    assert editor.items(URI, 0, 4) == []
    assert editor.items(URI, 0, 4, INVOKED) == []
    assert editor.status()["last"]["reason"] == "no_daemon"
    said = [params["message"] for params in editor.received("window/logMessage")]
    assert said.count("infilld: No daemon runs. Start it with: infilld serve") == 1
    assert editor.received("window/showMessage") == []


def test_a_daemon_that_comes_later_is_found(start: Start, tmp_path: Path) -> None:
    editor = start()
    editor.wait_state("failed")
    with live_server(tmp_path / "state") as live:
        # Asked for by hand, so the pause after a failed search does not hold.
        assert editor.items(URI, 0, 4, INVOKED) == FILLED
        status = editor.status()
        assert (status["state"], status["url"], status["model"]) == ("ready", live.url, "fake")


def test_a_restarted_daemon_is_found_within_one_request(start: Start, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with live_server(state):
        editor = start(automaticDeadlineMs=20_000)
        editor.wait_state("ready")
        assert editor.items(URI, 0, 4) == FILLED
    with live_server(state) as second:
        assert editor.items(URI, 0, 4) == FILLED
        assert editor.status()["url"] == second.url


def test_a_daemon_that_went_away_is_noticed(start: Start, tmp_path: Path) -> None:
    with live_server(tmp_path / "state"):
        editor = start()
        editor.wait_state("ready")
    assert editor.items(URI, 0, 4) == []
    status = editor.wait_state("failed")
    assert status["last"]["reason"] == "no_daemon"
    assert status["url"] is None


def test_while_the_model_loads(start: Start, tmp_path: Path) -> None:
    worker = FakeWorker(is_loading=True)
    with live_server(tmp_path / "state", worker):
        editor = start()
        editor.wait_state("loading")
        assert editor.items(URI, 0, 4, AUTOMATIC) == []
        assert "is loading its model" in editor.status()["last"]["why"]
        by_hand = editor.complete(URI, 0, 4, INVOKED)
        editor.status()
        worker.finish_loading()
        assert editor.reply(by_hand)["result"]["items"] == FILLED


def test_a_model_that_cannot_be_loaded(start: Start, tmp_path: Path) -> None:
    worker = FakeWorker(is_loading=True)
    with live_server(tmp_path / "state", worker):
        editor = start()
        editor.wait_state("loading")
        worker.finish_loading(CheckpointMissing("no config.json"))
        status = editor.wait_state("failed")
        assert "no config.json" in status["why"]
        assert editor.items(URI, 0, 4) == []


def test_the_deadline_is_the_bridges_too(start: Start, tmp_path: Path) -> None:
    with live_server(tmp_path / "state") as live:
        live.worker.hold()
        editor = start(automaticDeadlineMs=10)
        editor.wait_state("ready")
        assert editor.items(URI, 0, 4) == []
        assert editor.status()["last"]["reason"] == "deadline"
        live.worker.wait_for(live.worker.jobs[0].future.done)


def test_a_refusal_is_a_reason(start: Start, tmp_path: Path) -> None:
    worker = FakeWorker(capacity=0)
    with live_server(tmp_path / "state", worker):
        editor = start()
        editor.wait_state("ready")
        assert editor.items(URI, 0, 4) == []
        assert editor.status()["last"]["reason"] == "busy"


def test_shutdown_lets_a_live_request_go(start: Start, tmp_path: Path) -> None:
    with live_server(tmp_path / "state") as live:
        live.worker.hold()
        editor = start(automaticDeadlineMs=20_000)
        editor.wait_state("ready")
        editor.complete(URI, 0, 4)
        live.worker.wait_for(lambda: len(live.worker.jobs) == 1)
        assert editor.close() == 0
        live.worker.wait_for(live.worker.jobs[0].future.done)
        live.worker.release()


def test_a_newer_request_ends_the_wait_for_the_daemon(start: Start, tmp_path: Path) -> None:
    with live_server(tmp_path / "state", FakeWorker(is_loading=True)) as live:
        editor = start()
        editor.wait_state("loading")
        older = editor.complete(URI, 0, 4, INVOKED)
        newer = editor.complete(URI, 0, 4, INVOKED)
        assert editor.reply(older)["result"] is None
        live.worker.finish_loading()
        assert editor.reply(newer)["result"]["items"] == FILLED


def test_documents_are_named_below_their_folder(start: Start, tmp_path: Path) -> None:
    with live_server(tmp_path / "state") as live:
        editor = start(automaticDeadlineMs=20_000)
        editor.wait_state("ready")
        documents = ["file:///one/a%20b.py", "file:///two/deep/c.py", "untitled:Untitled-1"]
        for uri in documents:
            editor.open(uri, "x = ")
        folders = {"added": [{"uri": "file:///one", "name": "one"}], "removed": []}
        editor.notify("workspace/didChangeWorkspaceFolders", {"event": folders})
        for uri in documents:
            assert editor.items(uri, 0, 4)
        assert [job.request.path for job in live.worker.jobs] == ["a b.py", "c.py", None]


def test_the_daemon_is_looked_for_even_without_initialized(tmp_path: Path) -> None:
    with (
        live_server(tmp_path / "state"),
        FakeEditor(
            tmp_path, state_dir=tmp_path / "state", options={"startDaemon": False}
        ) as editor,
    ):
        editor.call("initialize", {"processId": None, "rootUri": None, "capabilities": {}})
        editor.open(URI, "x = \n")
        assert editor.items(URI, 0, 4, INVOKED) == FILLED


def test_wrong_settings_are_named(start: Start) -> None:
    editor = start(environ={"INFILLD_COLOUR": "red"})
    status = editor.wait_state("failed")
    assert "unknown key 'colour' in environment variable INFILLD_COLOUR" in status["why"]


def test_two_editors_share_a_daemon_and_do_not_supersede(start: Start, tmp_path: Path) -> None:
    with live_server(tmp_path / "state", FakeWorker(Script(drafts=()))) as live:
        editors = [start(automaticDeadlineMs=20_000), start(automaticDeadlineMs=20_000)]
        for editor in editors:
            editor.wait_state("ready")
        live.worker.hold()
        numbers = [editor.complete(URI, 0, 4) for editor in editors]
        live.worker.wait_for(lambda: len(live.worker.jobs) == 2)
        live.worker.release()
        for editor, number in zip(editors, numbers, strict=True):
            assert editor.reply(number)["result"]["items"] == FILLED


@pytest.mark.parametrize(
    ("raw", "options", "problems"),
    [
        (None, Options(), []),
        ({}, Options(), []),
        ([], Options(), []),
        (
            {"alternatives": 1, "startDaemon": False},
            Options(alternatives=1, start_daemon=False),
            [],
        ),
        ({"boldness": 1, "editDeadlineMs": 5}, Options(boldness=1, edit_deadline_ms=5), []),
        ({"boldness": None}, Options(), []),
        (
            {"boldness": 1.5},
            Options(),
            ["boldness is 1.5, expected a number from 0 to 1; using the model's own."],
        ),
        (
            {"boldness": True},
            Options(),
            ["boldness is True, expected a number from 0 to 1; using the model's own."],
        ),
        ([1], Options(), ["initializationOptions is [1], expected an object."]),
        ({"startDaemon": 1}, Options(), ["startDaemon is 1, expected true or false; using True."]),
        (
            {"daemonWaitMs": True, "alternatives": 8},
            Options(alternatives=8),
            ["daemonWaitMs is True, expected a number from 0 to 600000; using 5000."],
        ),
        (
            {"afterChars": 1.5},
            Options(),
            ["afterChars is 1.5, expected a number from 0 to 10000000; using 12000."],
        ),
    ],
)
def test_options(raw: object, options: Options, problems: list[str]) -> None:
    assert parse_options(raw) == (options, problems)
