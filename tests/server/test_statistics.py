"""What is kept of answers, and that nothing wrong with its file reaches a request."""

import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from ended_jobs import GAP, outcome, result
from fake_worker import FakeWorker, Script
from live_server import live_server

from infilld.engine import errors
from infilld.engine.conversation import ChatAnswer, ChatRequest, ChatResult, Message
from infilld.engine.request import (
    InfillRequest,
    Span,
)
from infilld.server import wire
from infilld.server.keeping import store
from infilld.server.keeping.outcomes import Outcome, Records, kind_of, outcome_of
from infilld.server.keeping.statistics import Statistics
from infilld.server.keeping.store import Store, Told


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "stats.sqlite"


@pytest.fixture
def statistics(path: Path) -> Iterator[Statistics]:
    kept = Statistics(path, retry_s=0.0)
    kept.start()
    yield kept
    kept.close()


def rows(path: Path, table: str = "answers") -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as link:
        link.row_factory = sqlite3.Row
        return [dict(row) for row in link.execute(f"SELECT * FROM {table} ORDER BY number")]


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (GAP, "infill"),
        (InfillRequest(text="ab", spans=(Span(0, 0), Span(1, 2))), "rewrite"),
        (InfillRequest(text="ab", spans=(Span(0, 2),), repair=()), "repair"),
        (InfillRequest(text="ab", spans=(Span(0, 0),), warm=True), "warm"),
        (ChatRequest(messages=(Message("user", "hi"),)), "chat"),
    ],
)
def test_kinds(request_: Any, kind: str) -> None:
    assert kind_of(request_) == kind


def test_an_answer_is_one_row_without_its_text(statistics: Statistics, path: Path) -> None:
    statistics.answered(outcome("a", ms=12.5))
    assert statistics.flush()
    (row,) = rows(path)
    assert row.pop("at") == pytest.approx(time.time(), abs=30)
    assert row == {
        "number": 1,
        "id": "a",
        "route": "/v1/infill",
        "kind": "infill",
        "language": "python",
        "reason": "ok",
        "is_failure": 0,
        "passes": 2,
        "prompt_tokens": 7,
        "cached_tokens": 3,
        "text_tokens": 4,
        "queue_ms": 1.0,
        "encode_ms": 2.0,
        "denoise_ms": 3.0,
        "total_ms": 12.5,
        "choices": 2,
        "chars": 6,
    }
    statistics.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for file in path.parent.iterdir():
        assert b"sEcReT" not in file.read_bytes()
        assert b"secret" not in file.read_bytes()


def test_a_language_or_route_that_is_no_name_is_not_kept() -> None:
    asked = InfillRequest(text="", spans=(Span(0, 0),), language="def f(): pass")
    got = outcome_of("a", "/v1/engines/my secret/x", asked, result())
    assert (got.language, got.route) == (None, "other")


def test_what_a_bad_request_quotes_is_not_kept() -> None:
    for error, why in (
        (errors.BadGrammar("cannot serve 'sEcReT'"), errors.BadGrammar.remedy),
        (ValueError("sEcReT"), "It failed with ValueError."),
        (errors.Busy("8 requests are waiting"), "8 requests are waiting"),
    ):
        got = outcome_of("", "/v1/infill", GAP, error)
        assert (got.why, got.is_failure, got.chars) == (why, True, ())


def test_windows_and_centiles(path: Path) -> None:
    now = time.mktime((2026, 3, 4, 12, 0, 0, 0, 0, -1))
    kept = Store(path)

    def at(hours_ago: float, **more: Any) -> Outcome:
        found = outcome(**more)
        return Outcome(**{**vars(found), "at": now - 3600 * hours_ago})

    kept.add([at(1, ms=float(ms)) for ms in range(1, 101)])
    kept.add([at(2, reason="low_confidence", ms=1000.0), at(2, reason="superseded", ms=0.0)])
    kept.add([at(13, ms=5000.0), at(24 * 8, reason="empty", ms=9.0)])
    kept.close()
    told = store.report(path, now=now)
    today, week, total = told["today"], told["week"], told["total"]
    assert isinstance(today, dict)
    assert isinstance(week, dict)
    assert isinstance(total, dict)
    assert (today["answers"], week["answers"], total["answers"]) == (102, 103, 104)
    # 101 counted: 1 to 100 and 1000; superseded ones took no time.
    assert (today["p50_ms"], today["p95_ms"]) == ({"infill": 51.0}, {"infill": 96.0})
    assert week["abstentions"] == {"low_confidence": 1, "superseded": 1}
    assert total["abstentions"] == {"empty": 1, "low_confidence": 1, "superseded": 1}


@pytest.mark.parametrize(("count", "p50", "p95"), [(1, 1, 1), (2, 1, 2), (3, 2, 3), (20, 10, 19)])
def test_centiles_are_nearest_rank(path: Path, count: int, p50: int, p95: int) -> None:
    kept = Store(path)
    kept.add([outcome(ms=float(ms)) for ms in range(count, 0, -1)])
    kept.close()
    total: Any = store.report(path)["total"]
    assert (total["p50_ms"], total["p95_ms"]) == ({"infill": p50}, {"infill": p95})


def test_what_clients_said(statistics: Statistics) -> None:
    for job_id in "abcde":
        statistics.answered(outcome(job_id))
    for job_id in "abcd":
        statistics.told(job_id, "shown", 0, None)
    statistics.told("a", "inserted", 1, None)  # "other", 5 characters
    statistics.told("a", "inserted", 1, None)  # told twice is inserted once
    statistics.told("a", "retained", 1, None)
    statistics.told("b", "partly", 0, 2)
    statistics.told("c", "dismissed", 0, None)
    statistics.told("e", "inserted", 0, None)  # of a client that says nothing of showing
    total: Any = statistics.report()["total"]
    assert {name: total[name] for name in ("shown", "inserted", "partly")} == {
        "shown": 4,
        "inserted": 2,
        "partly": 1,
    }
    assert (total["dismissed"], total["retained"]) == (1, 1)
    assert total["acceptance"] == pytest.approx(3 / 5)
    assert total["chars_inserted"] == 5 + 2 + 6


def test_errors_are_no_answers(statistics: Statistics) -> None:
    chat = ChatRequest(messages=(Message("user", "hi"),))
    statistics.answered(outcome_of("", "/v1/chat", chat, errors.Busy("full")))
    said = ChatResult(id="b", seed=0, answers=(ChatAnswer("hello", "", "stop"),))
    statistics.answered(outcome_of("b", "/v1/chat", chat, said))
    total: Any = statistics.report()["total"]
    assert (total["answers"], total["errors"], total["abstentions"]) == (1, {"busy": 1}, {})
    assert total["acceptance"] is None


def test_old_and_too_many_rows_are_dropped(path: Path) -> None:
    kept = Store(path)
    old = Outcome(**{**vars(outcome("old")), "at": time.time() - store.KEPT_S - 60})
    kept.add([old, *(outcome(str(n)) for n in range(10)), Told("old", old.at, "shown", 0, 1)])
    kept.prune(now=time.time(), kept_rows=4)
    kept.close()
    assert [row["id"] for row in rows(path)] == ["6", "7", "8", "9"]
    assert rows(path, "feedback") == []


def test_it_goes_on_after_a_restart(path: Path) -> None:
    for job_id in "ab":
        kept = Statistics(path)
        kept.start()
        kept.answered(outcome(job_id))
        kept.close()
    assert [row["id"] for row in rows(path)] == ["a", "b"]


def test_a_newer_file_is_left_alone(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(sqlite3.connect(path)) as link:
        link.execute(f"PRAGMA user_version = {store.VERSION + 1}")
    before = path.read_bytes()
    kept = Statistics(path, retry_s=0.0)
    kept.start()
    kept.answered(outcome())
    kept.answered(outcome())
    assert kept.flush()
    status = kept.status()
    assert (status["state"], status["dropped"]) == ("disabled", 2)
    assert "Update infilld" in str(status["why"])
    kept.close()
    assert path.read_bytes() == before
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "content", [b"this is no database", b"SQLite format 3\0" + b"\xff" * 5000], ids=["text", "torn"]
)
def test_a_damaged_file_is_set_aside(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_bytes(content)
    kept = Statistics(path)
    kept.start()
    kept.answered(outcome())
    assert kept.flush()
    status = kept.status()
    kept.close()
    assert status["state"] == "kept"
    aside = Path(str(status["damaged_file"]))
    assert aside.read_bytes() == content
    assert aside.name.startswith("stats.sqlite.damaged-")
    assert [row["id"] for row in rows(path)] == ["a"]
    assert len(caplog.records) == 1


def test_a_file_that_is_damaged_while_it_is_used(statistics: Statistics, path: Path) -> None:
    statistics.answered(outcome("a"))
    assert statistics.flush()
    for name in (path, path.with_name(path.name + "-wal")):
        name.write_bytes(b"\0" * 8192)
    for number in range(3):
        statistics.answered(outcome(str(number)))
        statistics.report()
    assert statistics.status()["state"] == "kept"
    assert "damaged_file" in statistics.status()
    assert rows(path)[-1]["id"] == "2"


def test_a_folder_that_is_not_there_is_said_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "absent" / "stats.sqlite"
    kept = Statistics(path, retry_s=0.0)
    kept.start()
    for _ in range(3):
        kept.answered(outcome())
        assert kept.flush()
    assert kept.status()["state"] == "disabled"
    assert "No such file" in str(kept.status()["why"])
    assert kept.report() == {}
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    path.parent.mkdir()
    kept.answered(outcome("kept"))
    assert kept.flush()
    assert (kept.status()["state"], kept.status()["dropped"]) == ("kept", 3)
    kept.close()
    assert [row["id"] for row in rows(path)] == ["kept"]


def test_another_process_that_locks_the_file_costs_records_not_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_BUSY_S", 0.05)
    kept = Statistics(path, retry_s=0.0)
    kept.start()
    assert kept.flush()
    with closing(sqlite3.connect(path, isolation_level=None)) as link:
        link.execute("BEGIN EXCLUSIVE")
        taken_s = []
        for _ in range(5):
            begun = time.perf_counter()
            kept.answered(outcome("lost"))
            taken_s.append(time.perf_counter() - begun)
        # Whoever waited for the file would wait every time; a busy machine is slow now and then.
        assert min(taken_s) < 0.05
        assert kept.flush()
        assert "locked" in str(kept.status()["why"])
        link.execute("ROLLBACK")
    kept.answered(outcome("kept"))
    assert kept.flush()
    assert kept.status()["state"] == "kept"
    kept.close()
    assert [row["id"] for row in rows(path)] == ["kept"]


def test_a_slow_disk_costs_records_not_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_open = threading.Event()
    real = Store.add

    def slow(self: Store, records: Any) -> None:
        is_open.wait()
        real(self, records)

    monkeypatch.setattr(Store, "add", slow)
    kept = Statistics(path, most_waiting=4)
    kept.start()
    for number in range(50):
        kept.answered(outcome(str(number)))
    assert not kept.flush(0.05)
    assert int(str(kept.status()["dropped"])) >= 50 - 4 - 5
    is_open.set()
    assert kept.flush(10.0)
    kept.close()
    assert len(rows(path)) == 50 - int(str(kept.status()["dropped"]))


def test_a_report_that_takes_long_is_told_again_for_a_while(
    statistics: Statistics, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []

    def slow(path: Path) -> dict[str, object]:
        time.sleep(0.15)
        reports.append(path)
        return {"total": len(reports)}

    monkeypatch.setattr(store, "report", slow)
    assert [statistics.report() for _ in range(3)] == [{"total": 1}] * 3


FULL = """
import resource, signal, sys
from pathlib import Path
from infilld.server.keeping.statistics import Statistics
from infilld.server.keeping.outcomes import outcome_of
from infilld.engine.request import InfillRequest, InfillResult, Span
import json
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
kept = Statistics(Path(sys.argv[1]), retry_s=0.0)
kept.start()
asked = InfillRequest(text="", spans=(Span(0, 0),))
def add(count):
    for number in range(count):
        kept.answered(outcome_of(str(number), "/r", asked, InfillResult(id="x", seed=0)))
    assert kept.flush(30.0)
add(10)
states = [kept.status()["state"]]
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
added = 10
while kept.status()["state"] == "kept" and added < 10_000:
    add(100)
    added += 100
states.append(kept.status()["state"])
why = kept.status()["why"]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
add(5)
states.append(kept.status()["state"])
answers = kept.report()["total"]["answers"]
kept.close()
print(json.dumps([states, why, added + 5 - answers, kept.status()["dropped"]]))
"""


def test_a_full_disk_loses_records_and_nothing_else(path: Path) -> None:
    """A file-size limit fails writes as a full disk does, whatever the rights of this user."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", FULL, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    states, why, lost, dropped = json.loads(done.stdout)
    assert states == ["kept", "disabled", "kept"]
    assert why
    assert 0 < lost == dropped < 513
    with closing(sqlite3.connect(path)) as link:
        assert link.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_keeper_that_breaks_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def answered(self, outcome: Outcome) -> None:
            raise RuntimeError("no")

        def told(self, *_: object) -> None:
            raise RuntimeError("no")

    seen: list[object] = []

    class Sound:
        def answered(self, outcome: Outcome) -> None:
            seen.append(outcome.reason)

        def told(self, *told: object) -> None:
            seen.append(told)

    records = Records([Broken(), Sound()])
    records.answered("a", "/v1/infill", GAP, result())
    records.told("a", "shown", 0, None)
    assert seen == ["ok", ("a", "shown", 0, None)]
    assert len(caplog.records) == 2


def test_stats_over_the_wire_and_over_a_restart(tmp_path: Path) -> None:
    asked = wire.InfillRequest(text="x = ", spans=[wire.Span(start=4, end=4)])
    worker = FakeWorker(Script(texts=["abc"]))
    with live_server(tmp_path / "state", worker) as server, server.client() as client:
        job = client.infill(asked).id
        client.feedback(wire.Feedback(id=job, event="inserted"))
        worker.script = Script(reason="empty", why="nothing")
        client.infill(asked)
        told = client.stats()
    assert told["live_jobs"] == 0
    assert told["statistics"]["state"] == "kept"
    for window in ("today", "week", "total"):
        assert told[window]["answers"] == 2
        assert told[window]["abstentions"] == {"empty": 1}
        assert (told[window]["inserted"], told[window]["chars_inserted"]) == (1, 3)
    with live_server(tmp_path / "state") as server, server.client() as client:
        assert client.stats()["total"] == told["total"]


def test_without_a_folder_to_write_the_daemon_serves(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "stats.sqlite").mkdir()
    asked = wire.InfillRequest(text="x = ", spans=[wire.Span(start=4, end=4)])
    with live_server(tmp_path / "state") as server, server.client() as client:
        assert client.infill(asked).reason == "ok"
        told = client.stats()
    assert told["statistics"]["state"] == "disabled"
    assert "directory" in told["statistics"]["why"]
    assert "today" not in told
    assert os.listdir(tmp_path / "state" / "stats.sqlite") == []
