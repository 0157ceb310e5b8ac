import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from fake_worker import Script
from live_server import LiveServer, live_server

from infilld.server import cli, wire
from infilld.server.client import Client
from infilld.server.verbs import model_choice


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.py"
    path.write_text("def f():\n    \n")
    return path


def run(server: LiveServer, *words: object) -> int:
    return cli.main([str(word) for word in words] + ["--state-dir", str(server.settings.state_dir)])


def test_fill_prints_the_text_of_the_span(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(server, "fill", path, "--at", "2:5", "--seed", 4, "--deadline-ms", 900) == 0
    assert capfd.readouterr() == ("return 1", "")
    assert path.read_text() == "def f():\n    \n"
    request = server.worker.jobs[0].request
    assert (request.spans[0].start, request.seed, request.deadline_ms) == (13, 4, 900)


def test_fill_json_prints_the_reply(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(server, "fill", path, "--at", "2:1", "--to", "2:5", "--json", "-n", 2) == 0
    reply = json.loads(capfd.readouterr().out)
    span = reply["choices"][0]["spans"][0]
    assert (span["start"], span["end"], span["text"]) == (9, 13, "return 1")


def test_fill_json_counts_in_the_whole_document(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path.write_text("x = 1\n" * 20_000)
    assert run(server, "fill", path, "--at", "20000:1", "--json") == 0
    span = json.loads(capfd.readouterr().out)["choices"][0]["spans"][0]
    assert span["start"] == span["end"] == 6 * 19_999
    assert len(server.worker.jobs[0].request.text) <= 64_000 + 16_000


def test_fill_shows_every_alternative(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.worker.script = Script(texts=["one", "two"])
    assert run(server, "fill", path, "--at", "2:5", "-n", 2) == 0
    assert capfd.readouterr().out == "--- 1 of 2\none\n--- 2 of 2\ntwo\n"


def test_fill_watch_shows_the_canvases_on_stderr(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(server, "fill", path, "--at", "2:5", "--watch", "--write") == 0
    out, err = capfd.readouterr()
    assert out == "return 1"
    assert err.splitlines() == [
        "pass 1, settled 1: 'rxturn q'",
        "pass 2, settled 7: 'return q'",
    ]
    assert path.read_text() == "def f():\n    return 1\n"


def test_no_suggestion_is_exit_3_with_the_reason_on_stderr(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.worker.script = Script(reason="empty", why="The model wrote no text.")
    assert run(server, "fill", path, "--at", "2:5", "--write") == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "(empty): The model wrote no text." in err
    assert path.read_text() == "def f():\n    \n"


SPANS = ["--at", "1:5", "--to", "1:6", "--at", "2:5", "--at", "1:1-1:4"]


def test_fill_takes_several_spans(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.worker.script = Script(texts=[["g", "pass", "async def"]])
    assert run(server, "fill", path, *SPANS, "--write") == 0
    assert path.read_text() == "async def g():\n    pass\n"
    spans = server.worker.jobs[0].request.spans
    assert [(span.start, span.end) for span in spans] == [(4, 5), (13, 13), (0, 3)]
    assert capfd.readouterr().out == (
        "--- span 1 of 3\ng\n--- span 2 of 3\npass\n--- span 3 of 3\nasync def\n"
    )


def test_several_answers_for_several_spans(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.worker.script = Script(texts=[["a", "b"], ["c", "d"]])
    assert run(server, "fill", path, "--at", "1:1", "--at", "2:5", "-n", 2) == 0
    heads = ["--- 1 of 2, span 1 of 2", "--- 1 of 2, span 2 of 2", "--- 2 of 2, span 1 of 2"]
    out = capfd.readouterr().out.splitlines()
    assert out[:6:2] == heads
    assert out[1::2] == ["a", "b", "c", "d"]


def test_watch_shows_several_spans_one_after_another(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.worker.script = Script(texts=[["ab", "cd"]], drafts=[["ax", "cd"]])
    assert run(server, "fill", path, "--at", "1:1", "--at", "2:5", "--watch") == 0
    assert capfd.readouterr().err.splitlines() == ["pass 1, settled 1,2: 'ax' | 'cd'"]


def test_spans_far_apart_are_sent_with_all_between(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path.write_text("x = 1\n" * 40_000)
    places = ["--at", "15000:1", "--at", "35000:6"]
    assert run(server, "fill", path, *places, "--json") == 0
    reply = json.loads(capfd.readouterr().out)
    found = [span["start"] for span in reply["choices"][0]["spans"]]
    assert found == [6 * 14_999, 6 * 34_999 + 5]
    assert 120_005 <= len(server.worker.jobs[0].request.text) <= 120_005 + 64_000 + 16_000


def test_fill_hands_on_what_is_asked(server: LiveServer, path: Path, tmp_path: Path) -> None:
    other = tmp_path / "b.py"
    other.write_text("B = 1\n")
    words = ["--instruction", "é" * 10_000, "--starts-with", "re", "--ends-with", "1"]
    words += ["--draft", "return 2", "--context", str(other), "--think", "--boldness", "0.75"]
    assert run(server, "fill", path, "--at", "2:5", *words) == 0
    got = server.worker.jobs[0].request
    assert got.instruction == "é" * 10_000
    assert [(pin.span, pin.at, pin.text) for pin in got.pins] == [
        (0, "start", "re"),
        (0, "end", "1"),
    ]
    assert got.drafts == ("return 2",)
    assert [(item.path, item.text, item.kind) for item in got.context] == [
        (str(other), "B = 1\n", "open")
    ]
    assert (got.think, got.boldness, got.repair) == (True, 0.75, None)


def test_pins_and_drafts_of_several_spans(server: LiveServer, path: Path) -> None:
    words = ["--starts-with", "", "--starts-with", "b", "--ends-with", "c", "--ends-with", ""]
    words += ["--draft", "", "--draft", "d"]
    assert run(server, "fill", path, "--at", "1:1", "--at", "2:5", *words) == 0
    got = server.worker.jobs[0].request
    assert [(pin.span, pin.at, pin.text) for pin in got.pins] == [
        (1, "start", "b"),
        (0, "end", "c"),
    ]
    assert got.drafts == (None, "d")


@pytest.mark.parametrize(
    ("words", "repair"),
    [
        ([], None),
        (["--repair"], []),
        (["--repair", "1:2-1:3", "1:5-1:7"], [(1, 2), (4, 6)]),
        (["--repair", "1:2-1:3", "--repair", "1:5-1:7"], [(1, 2), (4, 6)]),
    ],
)
def test_repair(
    server: LiveServer, path: Path, words: list[str], repair: list[tuple[int, int]] | None
) -> None:
    path.write_text("def f(:\n")
    assert run(server, "fill", path, "--at", "1:1-1:8", *words) == 0
    got = server.worker.jobs[0].request.repair
    assert (None if got is None else [(span.start, span.end) for span in got]) == repair


def test_a_repair_far_into_a_document_counts_in_the_window(server: LiveServer, path: Path) -> None:
    path.write_text("x = 1\n" * 20_000)
    span = ["--at", "19000:1", "--to", "19000:6"]
    assert run(server, "fill", path, *span, "--repair", "19000:1-19000:2") == 0
    got = server.worker.jobs[0].request
    assert got.repair is not None
    assert got.repair[0].start == got.spans[0].start > 0


def test_an_answer_for_other_spans_is_not_written(
    server: LiveServer, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Client.infill

    def shifted(client: Client, request: wire.InfillRequest) -> wire.InfillReply:
        body = real(client, request).model_dump()
        body["choices"][0]["spans"][0]["start"] -= 1
        return wire.InfillReply.model_validate(body)

    monkeypatch.setattr(Client, "infill", shifted)
    assert run(server, "fill", path, "--at", "2:5", "--write") == 1
    assert path.read_text() == "def f():\n    \n"


@pytest.mark.parametrize("content", [b"a\0b\n", b"\x7fELF\0\0"])
def test_a_binary_file_is_exit_1(
    shared: LiveServer, path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(content)
    assert run(shared, "fill", path, "--at", "1:1", "--write") == 1
    assert "NUL" in capfd.readouterr().err
    assert path.read_bytes() == content


def test_secret_context_is_exit_1(
    shared: LiveServer, path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / ".env"
    secret.write_text("TOKEN=hunter2\n")
    assert run(shared, "fill", path, "--at", "2:5", "--context", secret) == 1
    err = capfd.readouterr().err
    assert "looks like a secret" in err
    assert "hunter2" not in err
    assert shared.worker.jobs == []


def test_a_column_within_a_line_end_is_bad_usage(
    shared: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(b"ab\r\ncd")
    assert run(shared, "fill", path, "--at", "1:4") == 2
    assert "Give a column from 1 to 3" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "2:5", "--at", "2:1"], "behind the --at"),
        (["--at", "2:1", "--to", "2:3", "--to", "2:5"], "has an end already"),
        (["--at", "2:1-2:3", "--to", "2:5"], "has an end already"),
        (["--at", "2:1-"], "'' is not LINE:COL"),
        (["--at", "2:5-2:1"], "lies before"),
        (["--at", "1:1-1:4", "--at", "1:3"], "1:1 and 1:3 overlap"),
        (["--at", "1:1", "--at", "1:1"], "1:1 and 1:1 overlap"),
        (["--at", "1:1", "--at", "2:5", "--starts-with", "a"], "once for each --at"),
        (["--at", "1:1", "--at", "2:5", "--draft", "a"], "once for each --at"),
        (["--at", "1:1", "--ends-with", "a", "--ends-with", "b"], "once for each --at"),
        (["--at", "1:1", "--repair"], "--repair needs selected text"),
        (["--at", "1:1-1:4", "--repair", "1:2"], "is not LINE:COL-LINE:COL"),
        (["--at", "1:1-1:4", "--repair", "1:3-1:2"], "ends before it starts"),
        (["--at", "1:1", "--boldness", "1.5"], "expected a number from 0 to 1"),
        (["--at", "1:1", "--boldness", "nan"], "expected a number from 0 to 1"),
        (["--at", "1:1", "--instruction", "\udcff"], "--instruction is not UTF-8"),
        (["--at", "1:1", "--starts-with", "\udcff"], "--starts-with is not UTF-8"),
        (["--at", "1:1", "--draft", "\udcff"], "--draft is not UTF-8"),
    ],
)
def test_bad_usage_says_what_to_do(
    shared: LiveServer,
    path: Path,
    words: list[str],
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    try:
        code = run(shared, "fill", path, *words)
    except SystemExit as leaving:
        code = int(str(leaving.code))
    assert code == 2
    assert said in capfd.readouterr().err
    assert shared.worker.jobs == []


@pytest.mark.parametrize(
    "words",
    [
        ["--at", "2"],
        ["--at", "2:x"],
        ["--at", "2:6"],
        ["--at", "4:1"],
        ["--at", "2:5", "--to", "1:1"],
        ["--at", "2:5", "-n", "0"],
        ["--at", "2:5", "--port", "x"],
        ["--at", "2:5", "--nonsense"],
        [],
    ],
)
def test_bad_usage_is_exit_2(
    shared: LiveServer, path: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code = run(shared, "fill", path, *words)
    except SystemExit as leaving:
        code = int(str(leaving.code))
    assert code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err
    assert shared.worker.jobs == []


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_document_that_cannot_be_read_is_exit_1(
    shared: LiveServer, path: Path, content: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    path.unlink() if content is None else path.write_bytes(content)
    assert run(shared, "fill", path, "--at", "1:1", "--write") == 1
    assert capfd.readouterr().err.startswith("infilld: ")
    assert content is None or path.read_bytes() == content


def test_a_document_that_changes_meanwhile_is_not_written(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def script(_: object) -> Script:
        path.write_text("typed meanwhile")
        return Script()

    server.worker.script = script
    assert run(server, "fill", path, "--at", "2:5", "--write") == 1
    assert path.read_text() == "typed meanwhile"


def test_status_has_exactly_the_documented_keys(
    server: LiveServer, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(server, "status", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert told.pop("pid") > 0
    assert told == {
        "state": "running",
        "url": server.url,
        "token_file": str(server.settings.token_file),
        "model": "fake",
        "device": "cpu",
        "loaded": True,
        "page": f"{server.url}/",
    }


def test_without_auth_no_token_file_is_needed(
    tmp_path: Path, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with live_server(tmp_path / "open", auth=False) as server:
        assert not server.settings.token_file.exists()
        assert run(server, "fill", path, "--at", "2:5", "--auth", "false") == 0
        assert capfd.readouterr().out == "return 1"
        assert run(server, "status", "--auth", "false") == 0
        assert server.url in capfd.readouterr().out


@pytest.mark.parametrize("state", ["loading", "unloaded"])
def test_status_without_a_loaded_model(
    server: LiveServer, capfd: pytest.CaptureFixture[str], state: str
) -> None:
    server.worker.state = state
    assert run(server, "status", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["state"], told["loaded"]) == ("running", False)


def test_status_and_stop_without_a_daemon(
    own_home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told == {
        "state": "stopped",
        "pid": None,
        "url": None,
        "token_file": str(own_home / "state" / "infilld" / "token"),
        "model": "starter",
        "device": "auto",
        "loaded": False,
        "page": None,
    }
    assert cli.main(["stop"]) == 0
    assert cli.main(["logs"]) == 0


def test_logs_prints_the_end(own_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = own_home / "state" / "infilld" / "daemon.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo\nthree\n")
    assert cli.main(["logs", "-n", "2"]) == 0
    assert capfd.readouterr().out == "two\nthree\n"


def test_a_bad_configuration_is_exit_2(own_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = own_home / "config" / "infilld" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("prot = 1\n")
    assert cli.main(["status"]) == 2
    err = capfd.readouterr().err
    assert "prot" in err
    assert str(config) in err


def test_models_list_marks_the_configured_one(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "list", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert (row["model"], row["configured"]) == ("starter", True)
    assert cli.main(["models", "list", "--model", "/nowhere"]) == 0
    assert "* /nowhere  no checkpoint there" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", 'model = "/m"\n'),
        ("# mine\nport = 1\n", 'model = "/m"\n# mine\nport = 1\n'),
        ('port = 1\nmodel = "old" # why\n', 'port = 1\nmodel = "/m"\n'),
        ('port = 1\n[t]\nmodel = "x"\n', 'model = "/m"\nport = 1\n[t]\nmodel = "x"\n'),
    ],
)
def test_using_a_model_changes_one_line(before: str, after: str) -> None:
    assert model_choice.with_model(before, "/m") == after


def test_light_verbs_import_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from infilld.server import cli
for words in (["status"], ["stop"], ["logs"], ["models"], ["--help"], ["fill", "--help"]):
    try:
        cli.main(words)
    except SystemExit:
        pass
heavy = {"torch", "numpy", "fastapi", "uvicorn", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0
    assert capfd.readouterr().out.startswith("infilld 0.")


def test_flags_that_come_too_late_are_said(
    server: LiveServer, path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(server, "fill", path, "--at", "2:5", "--device", "cuda") == 0
    assert "--device counts when the daemon starts" in capfd.readouterr().err


def test_watch_on_a_terminal_dims_what_is_not_settled(server: LiveServer, path: Path) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-P", "-m", "infilld.server", "fill", str(path), "--at", "2:5"]
    words += ["--watch", "--state-dir", str(server.settings.state_dir)]
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
        check=True,
    )
    os.close(theirs)
    with os.fdopen(ours, "rb") as terminal:
        seen = terminal.read1(1 << 16).decode()
    assert done.stdout == b"return 1"
    assert "r\x1b[2mxturn q\x1b[0m" in seen
    assert "return \x1b[2mq\x1b[0m" in seen
    assert "pass 2" in seen


def test_watch_on_a_terminal_names_several_spans(server: LiveServer, path: Path) -> None:
    ours, theirs = pty.openpty()
    words = [sys.executable, "-P", "-m", "infilld.server", "fill", str(path), "--at", "2:5"]
    words += ["--at", "1:1", "--watch", "--state-dir", str(server.settings.state_dir)]
    environ = {**os.environ, "TERM": "xterm"}
    subprocess.run(words, stdout=subprocess.PIPE, stderr=theirs, env=environ, check=True)
    os.close(theirs)
    with os.fdopen(ours, "rb") as terminal:
        seen = terminal.read1(1 << 16).decode()
    assert "span 1 of 2" in seen
    assert "span 2 of 2" in seen


def test_doctor_says_ok_or_what_to_do(
    server: LiveServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(server, "doctor", "--json", "--device", "cpu", "--model", tmp_path) == 1
    checks = {check["name"]: check for check in json.loads(capfd.readouterr().out)}
    assert [name for name, check in checks.items() if not check["ok"]] == ["model"]
    assert server.url in checks["daemon and port"]["found"]
    assert checks["model"]["remedy"]
