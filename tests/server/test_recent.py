"""The ring of the last answers: "why nothing?"."""

import json

import httpx
import pytest
from ended_jobs import outcome
from fake_worker import Script
from live_server import LiveServer

from infilld.engine.errors import CheckpointMissing
from infilld.server import cli, wire
from infilld.server.client import ServerProblem
from infilld.server.keeping.recent import CAPACITY, Recent

SECRET = "sEcReT"


def asked(**more: object) -> wire.InfillRequest:
    return wire.InfillRequest.model_validate(
        {"text": f"{SECRET} = ", "spans": [{"start": 9, "end": 9}], "path": f"{SECRET}.py"} | more
    )


def get(server: LiveServer, query: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.token}"}
    return httpx.get(f"{server.url}/v1/recent{query}", headers=headers)


def test_the_newest_is_first_and_the_oldest_is_forgotten() -> None:
    ring = Recent()
    for number in range(CAPACITY + 5):
        ring.answered(outcome(str(number), reason="empty" if number % 2 else "ok"))
    assert [each.id for each in ring.last(2)] == [str(CAPACITY + 4), str(CAPACITY + 3)]
    assert len(ring.last()) == CAPACITY
    assert ring.reasons() == {"empty": CAPACITY // 2, "ok": CAPACITY // 2}


def test_what_is_told_of_an_answer(server: LiveServer) -> None:
    server.worker.script = Script(reason="low_confidence", why="The best text is unlikely.")
    with server.client() as client:
        client.infill(asked(document="d", deadline_ms=900))
        server.worker.script = Script(texts=[SECRET])
        client.infill(asked())
    told = get(server).json()
    assert SECRET not in json.dumps(told)
    assert told["reasons"] == {"low_confidence": 1, "ok": 1}
    newest, oldest = told["recent"]
    assert (newest["reason"], newest["choices"], newest["document"]) == ("ok", 1, False)
    assert oldest["time"].endswith("+00:00")
    del oldest["id"], oldest["time"]
    assert oldest == {
        "route": "/v1/infill",
        "kind": "infill",
        "language": "python",
        "document": True,
        "reason": "low_confidence",
        "why": "The best text is unlikely.",
        "choices": 0,
        "total_ms": 1.5,
        "deadline_ms": 900,
    }


def test_what_was_refused_is_told_too(server: LiveServer) -> None:
    server.worker.failure = CheckpointMissing("no tokenizer.json")
    with server.client() as client, pytest.raises(ServerProblem):
        client.infill(asked())
    (entry,) = get(server).json()["recent"]
    assert (entry["id"], entry["reason"]) == ("", "checkpoint_missing")
    assert entry["why"] == "no tokenizer.json"


@pytest.mark.parametrize(
    ("query", "status"),
    [("?limit=1", 200), ("?limit=0", 400), (f"?limit={CAPACITY + 1}", 400), ("?limit=x", 400)],
)
def test_the_limit(shared: LiveServer, query: str, status: int) -> None:
    got = get(shared, query)
    assert got.status_code == status
    assert status == 200 or got.json()["error"]["remedy"]


def run(server: LiveServer, *words: str) -> int:
    return cli.main([*words, "--state-dir", str(server.settings.state_dir)])


def test_why_prints_one_line_each(server: LiveServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(server, "why") == 0
    assert "nothing was asked yet" in capfd.readouterr().out
    with server.client() as client:
        client.infill(asked())
        server.worker.script = Script(reason="empty", why="Nothing is missing here.")
        client.infill(asked())
    assert run(server, "why", "-n", "1") == 0
    out = capfd.readouterr().out.splitlines()
    assert len(out) == 2
    assert "empty" in out[0]
    assert "Nothing is missing here." in out[0]
    assert out[1] == "of the last 2: ok 1, empty 1"
    assert run(server, "why", "--json") == 0
    assert [each["reason"] for each in json.loads(capfd.readouterr().out)["recent"]] == [
        "empty",
        "ok",
    ]


@pytest.mark.usefixtures("own_home")
def test_why_without_a_daemon(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["why"]) == 1
    assert "no daemon runs" in capfd.readouterr().err
