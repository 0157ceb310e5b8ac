"""What the daemon's log holds, where it goes, and how it is shown."""

import json
import logging
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_worker import FakeWorker
from live_server import LiveServer, live_server

from infilld.engine.errors import ModelError
from infilld.server import cli
from infilld.server.process import logs
from infilld.server.process.logs import (
    JsonFormatter,
    RotatingLog,
    TextFormatter,
    following,
    last_lines,
)
from infilld.server.settings import Settings

SECRET = "sEcReT = 1"
HEAD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} [A-Z]+ [\w.]+: ")


def record(message: str, *values: object, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("a.b", logging.ERROR, "x.py", 1, message, values, info)


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


FORGERY = "a\n2026-01-01 00:00:00.000 INFO root: all is well\r\x1b[2J\u2028\u202e\x85end\udc80"


def test_a_record_cannot_be_forged() -> None:
    text = TextFormatter(shows_all=False).format(
        record("%s", FORGERY, error=raised(OSError(FORGERY)))
    )
    first, *rest = text.split("\n")
    assert HEAD.match(first)
    assert rest
    assert not [line for line in rest if not line.startswith("    | ")]
    assert not re.search("[\r\x1b\u2028\u202e\x85]", text)
    assert len(text.splitlines()) == len(rest) + 1


def test_json_has_one_object_a_line() -> None:
    logs.route.set("/v1/infill")
    logs.job_id.set("job-1")
    try:
        line = JsonFormatter(shows_all=False).format(
            record("%s", FORGERY, error=raised(ModelError("no such file")))
        )
    finally:
        logs.route.set(None)
        logs.job_id.set(None)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    told = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", told.pop("time"))
    assert told.pop("exception").endswith("ModelError: no such file")
    assert told == {
        "level": "error",
        "logger": "a.b",
        "message": FORGERY,
        "job": "job-1",
        "route": "/v1/infill",
    }


@pytest.mark.parametrize("kind", [TextFormatter, JsonFormatter])
def test_messages_that_may_quote_source_are_left_out_unless_asked_for(
    kind: type[TextFormatter] | type[JsonFormatter],
) -> None:
    failed = record("job failed", error=raised(ValueError(SECRET)))
    assert SECRET not in kind(shows_all=False).format(failed)
    assert "ValueError" in kind(shows_all=False).format(failed)
    assert SECRET in kind(shows_all=True).format(failed)


LOGGING = """
import logging, os, sys
from pathlib import Path
from infilld.server.process import logs
from infilld.server.settings import Settings
settings = Settings(state_dir=Path(sys.argv[1]), log_format=sys.argv[2])
logs.to_stderr(settings)
logs.to_file(settings, limit_bytes=1000)
for number in range(100):
    logging.getLogger("a").info("line %d", number)
os.write(2, b"last words")
"""


def log_in_a_process(state_dir: Path, kind: str, *, is_detached: bool) -> str:
    """Returns what came out at stderr, where that is not the log."""
    state_dir.mkdir(mode=0o700, exist_ok=True)
    words = [sys.executable, "-P", "-c", LOGGING, str(state_dir), kind]
    if not is_detached:
        return subprocess.run(words, check=True, capture_output=True, text=True).stderr
    with (state_dir / "daemon.log").open("ab") as log:
        subprocess.run(words, check=True, stdout=log, stderr=log)
    return ""


@pytest.mark.parametrize("is_detached", [False, True])
def test_the_log_is_moved_away_while_it_is_written(tmp_path: Path, is_detached: bool) -> None:
    stderr = log_in_a_process(tmp_path / "state", "text", is_detached=is_detached)
    path = tmp_path / "state" / "daemon.log"
    files = [path, *(path.with_name(f"daemon.log.{number}") for number in (1, 2, 3))]
    assert sorted(path.parent.iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 1000 for file in files)
    if not is_detached:
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
        assert stderr.count("\n") == 100
        assert "last words" not in path.read_text()
    else:
        # What logging knows nothing of goes where the log is now.
        assert path.read_text().endswith("line 99\nlast words")
    shown = last_lines(path, 30, path.stat().st_size)
    numbers = [int(line.rpartition(" ")[2]) for line in shown]
    assert numbers == list(range(70, 100))


def test_logs_shows_json_of_either_format(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for kind in ("text", "json"):
        log_in_a_process(tmp_path / kind, kind, is_detached=False)
        words = ["logs", "--json", "-n", "2", "--state-dir", str(tmp_path / kind)]
        assert cli.main(words) == 0
        told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        assert [each["message"] for each in told] == ["line 98", "line 99"]
        assert {(each["level"], each["logger"]) for each in told} == {("info", "a")}
        assert all(each["time"].endswith("Z") for each in told)


def test_following_goes_on_through_every_change(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    path.write_text("old\n")
    handler = RotatingLog(path, False, 300)
    said = [f"line {number}" for number in range(200)]
    is_over = threading.Event()

    def write() -> None:
        for number, line in enumerate(said):
            handler.emit(logging.LogRecord("a", 20, "", 0, line, (), None))
            if number % 10 == 0:
                # As slowly as a daemon does at its busiest: three files are kept.
                time.sleep(0.005)
        handler.close()
        is_over.set()

    writer = threading.Thread(target=write)
    lines = following(path, 4, is_over=is_over.is_set, poll_s=0.0005)
    writer.start()
    assert list(lines) == said
    writer.join()


def test_following_waits_for_a_log(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    answers = iter([False, False, True])

    def is_over() -> bool:
        path.write_text("first\n")
        return next(answers)

    assert list(following(path, 0, is_over=is_over, poll_s=0.0)) == ["first"]


@pytest.mark.e2e
def test_logs_follows_until_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "daemon.log"
    path.write_text("one\ntwo\n")
    words = [sys.executable, "-P", "-m", "infilld.server", "logs", "-f", "-n", "1"]
    words += ["--state-dir", str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "two\n"
        with path.open("a") as log:
            log.write("three\n")
        assert child.stdout.readline() == "three\n"
        os.kill(child.pid, 2)
        assert child.wait(20) == 130


FULL = """
import logging, resource, signal, sys
from pathlib import Path
from infilld.server.process import logs
from infilld.server.settings import Settings
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logs.to_file(Settings(state_dir=Path(sys.argv[1])))
log = logging.getLogger("a")
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
for number in range(1000):
    log.info("line %d", number)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.info("room again")
"""


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    words = [sys.executable, "-P", "-W", "error", "-c", FULL, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
    log = (tmp_path / "daemon.log").read_text()
    assert log.endswith("a: room again\n")
    assert "line 10\n" in log
    assert "line 900\n" not in log


class Broken(FakeWorker):
    """Fails with an error that quotes what was asked."""

    def submit(self, request: object, on_canvas: object = None) -> object:  # type: ignore[override]
        raise KeyError(SECRET)


@pytest.fixture
def root_handler(tmp_path: Path) -> Iterator[Path]:
    """The daemon's own log, for the length of a test."""
    settings = Settings(state_dir=tmp_path, log_format="json", log_level="debug")
    level, before = logging.root.level, list(logging.root.handlers)
    logs.to_file(settings)
    yield settings.log_file
    for handler in set(logging.root.handlers) - set(before):
        logging.root.removeHandler(handler)
        handler.close()
    logging.root.setLevel(level)


def test_what_a_request_holds_is_never_logged(tmp_path: Path, root_handler: Path) -> None:
    body = {"text": SECRET, "spans": [{"start": 0, "end": 0}], "path": f"/{SECRET}.py"}
    with live_server(tmp_path / "state", Broken()) as server:
        assert ask(server, body).status_code == 500
        assert ask(server, body | {SECRET: 1}).status_code == 400
    with live_server(tmp_path / "other") as server:
        assert ask(server, body | {"stream": True}).status_code == 200
    log = root_handler.read_text()
    assert "KeyError" in log
    assert "sEcReT" not in log
    failed = next(told for told in map(json.loads, log.splitlines()) if "KeyError" in str(told))
    assert failed["route"] == "/v1/infill"


def ask(server: LiveServer, body: object) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.token}"}
    return httpx.post(server.url + "/v1/infill", json=body, headers=headers)
