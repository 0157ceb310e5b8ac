"""The protocol's edges: what is malformed is answered, and nothing pops up."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from fake_editor import FakeEditor

OFF = {"startDaemon": False}


@pytest.fixture(scope="module")
def bridge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeEditor]:
    """A bridge without a daemon; nothing here needs one."""
    folder = tmp_path_factory.mktemp("protocol")
    with FakeEditor(folder, state_dir=folder / "state", options=OFF) as editor:
        editor.initialize()
        yield editor
        editor.status()
        assert editor.received("window/showMessage") == [], "something popped up"


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[FakeEditor]:
    with FakeEditor(tmp_path, state_dir=tmp_path / "state", options=OFF) as editor:
        yield editor


def error_of(bridge: FakeEditor, method: str, params: object) -> dict[str, Any]:
    got = bridge.reply(bridge.request(method, params))
    assert "error" in got, got
    error: dict[str, Any] = got["error"]
    return error


def test_what_is_advertised(fresh: FakeEditor) -> None:
    result = fresh.initialize()
    capabilities = result["capabilities"]
    assert capabilities["inlineCompletionProvider"] == {}
    commands = {"rewrite", "fillGaps", "repair", "status", "accepted"}
    told = capabilities["executeCommandProvider"]["commands"]
    assert set(told) == {f"infilld.{name}" for name in commands}
    assert capabilities["textDocumentSync"]["openClose"] is True
    assert capabilities["textDocumentSync"]["change"] == 2
    assert result["serverInfo"] == {"name": "infilld", "version": version("infilld")}
    kinds = {"quickfix", "refactor.rewrite"}
    assert set(capabilities["codeActionProvider"]["codeActionKinds"]) == kinds
    beyond = ("completionProvider", "notebookDocumentSync")
    assert not [name for name in beyond if capabilities.get(name)]


PLACE = {"textDocument": {"uri": "file:///a.py"}, "position": {"line": 0, "character": 0}}


@pytest.mark.parametrize(
    "params",
    [
        {**PLACE, "context": {"triggerKind": 0}},
        {**PLACE, "context": {"triggerKind": "often"}},
        {**PLACE},
        {**PLACE, "context": {"triggerKind": 2}, "position": {"line": -1, "character": 0}},
        {**PLACE, "context": {"triggerKind": 2}, "position": {"line": 0}},
        {"context": {"triggerKind": 2}, "position": {"line": 0, "character": 0}},
        [],
        None,
        "text",
    ],
    ids=repr,
)
def test_malformed_parameters_are_answered(bridge: FakeEditor, params: object) -> None:
    error = error_of(bridge, "textDocument/inlineCompletion", params)
    assert error["code"] == -32602
    assert error["message"].startswith("Invalid Params")


def test_the_answer_names_what_is_wrong(bridge: FakeEditor) -> None:
    params = {**PLACE, "context": {"triggerKind": 2}, "position": {"line": 0}}
    assert "character" in error_of(bridge, "textDocument/inlineCompletion", params)["message"]


def test_a_nested_jsonrpc_key_is_harmless(bridge: FakeEditor) -> None:
    trap = {"jsonrpc": "2.0", "id": 7, "method": "initialize", "params": {"jsonrpc": "1.0"}}
    status = bridge.call(
        "workspace/executeCommand", {"command": "infilld.status", "arguments": [trap, [trap]]}
    )
    assert {"state", "url", "model", "why", "last"} <= status.keys()


@pytest.mark.parametrize("arguments", [None, [], ["id"], ["id", "0"], [0, 0], ["id", 0, 0]])
def test_what_was_inserted_needs_an_id_and_a_number(
    bridge: FakeEditor, arguments: list[object] | None
) -> None:
    given = {"command": "infilld.accepted", "arguments": arguments}
    params = {name: value for name, value in given.items() if value is not None}
    assert error_of(bridge, "workspace/executeCommand", params)["code"] == -32602


def test_unknown_methods_and_commands(bridge: FakeEditor) -> None:
    assert error_of(bridge, "textDocument/nonsense", {})["code"] == -32601
    bridge.send({"jsonrpc": "2.0", "id": "no-params", "method": "infilld/nonsense"})
    assert bridge.wait(lambda m: m.get("id") == "no-params", "a reply")["error"]["code"] == -32601
    assert error_of(bridge, "workspace/executeCommand", {"command": "rm"})["code"] == -32602
    bridge.notify("$/nonsense", {"a": 1})
    bridge.status()


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"7",
        b'{"id": 900, "method": "shutdown"}',
        b'{"jsonrpc": "2.0", "id": {}, "method": "x"}',
    ],
    ids=repr,
)
def test_what_is_no_message_is_refused(bridge: FakeEditor, body: bytes) -> None:
    before = len(bridge.received_errors())
    bridge.send_raw(body)
    bridge.status()
    assert [error["code"] for error in bridge.received_errors()[before:]] == [-32600]


def test_what_is_no_json_is_survived(bridge: FakeEditor) -> None:
    bridge.send_raw(b"{nonsense")
    bridge.status()


def test_a_response_nobody_waits_for_is_dropped(bridge: FakeEditor) -> None:
    bridge.send({"jsonrpc": "2.0", "id": 4711, "result": None})
    bridge.send({"jsonrpc": "2.0", "id": 4712, "error": {"code": 1, "message": "x"}})
    bridge.notify("$/cancelRequest", {"id": 4713})
    bridge.status()


def test_malformed_and_unexpected_notifications_are_dropped(bridge: FakeEditor) -> None:
    bridge.notify("textDocument/didOpen", {"textDocument": 5})
    bridge.notify("textDocument/didChange", {})
    bridge.insert("file:///never-opened.py", 2, 0, 0, "x")
    bridge.status()


def test_requests_before_initialize_and_after_shutdown(fresh: FakeEditor) -> None:
    assert error_of(fresh, "textDocument/inlineCompletion", {})["code"] == -32002
    fresh.notify("textDocument/didOpen", {})
    fresh.initialize()
    assert error_of(fresh, "initialize", {"capabilities": {}})["code"] == -32600
    fresh.call("shutdown", None)
    assert error_of(fresh, "shutdown", None)["code"] == -32600
    fresh.notify("exit", None)
    assert fresh.wait_exit() == 0


def test_leaving_without_shutdown_is_a_failure(tmp_path: Path) -> None:
    editor = FakeEditor(tmp_path, state_dir=tmp_path / "state", options=OFF)
    editor.initialize()
    assert editor.process.stdin is not None
    editor.process.stdin.close()
    assert editor.wait_exit() == 1


def test_bad_options_are_named_once_and_defaults_used(tmp_path: Path) -> None:
    options = {"alternatives": 0, "colour": "red", "startDaemon": False}
    with FakeEditor(tmp_path, state_dir=tmp_path / "state", options=options) as editor:
        editor.initialize()
        editor.status()
        (shown,) = editor.received("window/showMessage")
        assert shown["type"] == 2
        assert "alternatives is 0, expected a number from 1 to 8; using 3." in shown["message"]
        assert "colour is unknown" in shown["message"]


def test_the_log_holds_no_document_text(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with FakeEditor(tmp_path, state_dir=state, options=OFF) as editor:
        editor.initialize()
        editor.open("file:///secret.py", "password = 'hunter2'")
        editor.items("file:///secret.py", 0, 20)
        editor.notify("textDocument/didOpen", {"textDocument": {"text": "hunter2", "uri": 5}})
        editor.insert("file:///secret.py", 2, 0, 0, "hunter2")
        editor.status()
    log = (state / "lsp.log").read_text()
    assert "inline completion: no_daemon" in log
    assert "hunter2" not in log
    assert (state / "lsp.log").stat().st_mode & 0o777 == 0o600


def test_stdout_is_the_protocols_alone(tmp_path: Path) -> None:
    """What is printed by anyone, a child process included, goes to standard error."""
    code = (
        "import os, subprocess, sys\n"
        "from infilld.lsp import cli\n"
        "output = cli._take_stdout()\n"
        "print('printed', flush=True)\n"
        "os.write(1, b'written ')\n"
        "subprocess.run(['echo', 'child'], check=True)\n"
        "output.write(b'protocol')\n"
        "output.flush()\n"
    )
    got = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert got.stdout == b"protocol"
    assert got.stderr == b"printed\nwritten child\n"


def test_the_bridge_loads_no_gpu_stack_and_no_http_before_it_answers() -> None:
    code = (
        "import sys, infilld.lsp.server\n"
        "heavy = {'torch', 'transformers', 'numpy', 'triton', 'httpx', 'pydantic', 'fastapi'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    got = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True)
    assert json.loads(got.stdout.decode().replace("'", '"')) == []


def test_the_version() -> None:
    got = subprocess.run(
        [sys.executable, "-P", "-m", "infilld.lsp", "--version"], capture_output=True, check=True
    )
    assert got.stdout.decode() == f"infilld {version('infilld')}\n"
