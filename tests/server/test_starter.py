"""The embedded starter model, from the command line down, in real processes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from infilld.server import discovery, wire
from infilld.server.client import Client
from infilld.server.settings import STARTER, Settings
from infilld.server.verbs import models

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (models.folder_of(STARTER) / "config.json").is_file(),
        reason="this checkout has no starter model yet",
    ),
]

# The model is sure where code resembles code nearby, and silent elsewhere.
CRLF_AND_BOM = (
    b"\xef\xbb\xbfdef add(a, b):\r\n    return a + b\r\n\r\n\r\n"
    b"def plus(a, b):\r\n    return \r\n\r\n\r\nprint(add(1, 2))  # \xf0\x9f\x98\x80"
)
GAP = CRLF_AND_BOM.decode("utf-8-sig").rindex("return ") + len("return ")


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    settings = Settings(
        state_dir=tmp_path_factory.mktemp("starter") / "state", port=0, device="cpu"
    )
    yield settings
    discovery.stop(settings)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "add.py"
    path.write_bytes(CRLF_AND_BOM)
    return path


def infilld(wanted: Settings, *words: object) -> subprocess.CompletedProcess[bytes]:
    """One verb in a new process."""
    line = [sys.executable, "-P", "-m", "infilld.server", *map(str, words), "--state-dir"]
    more = ["--port", "0", "--device", "cpu"] if words[0] == "fill" else []
    return subprocess.run([*line, str(wanted.state_dir), *more], capture_output=True)


def test_fill_starts_the_daemon_and_finds_it_again(wanted: Settings, path: Path) -> None:
    replies = []
    for _ in range(2):
        done = infilld(wanted, "fill", path, "--at", "6:12", "--seed", 1, "--json")
        assert done.returncode == 0, done.stderr
        replies.append(json.loads(done.stdout))
    first, second = replies
    assert first["model"] == STARTER
    (span,) = first["choices"][0]["spans"]
    (again,) = second["choices"][0]["spans"]
    # A prompt that is cached but for its end is added up in another order.
    assert again == span | {"confidence": pytest.approx(span["confidence"], rel=1e-4)}
    assert (span["start"], span["end"]) == (GAP, GAP)
    assert span["text"].strip()
    assert 0 < span["confidence"] <= 1
    assert second["usage"]["cached_tokens"] > 0
    assert path.read_bytes() == CRLF_AND_BOM


def test_write_changes_the_gap_alone(wanted: Settings, path: Path) -> None:
    done = infilld(wanted, "fill", path, "--at", "6:12", "--seed", 1, "--write", "--watch")
    assert done.returncode == 0, done.stderr
    assert b"pass 1" in done.stderr
    cut = CRLF_AND_BOM.rindex(b"return ") + len(b"return ")
    assert path.read_bytes() == CRLF_AND_BOM[:cut] + done.stdout + CRLF_AND_BOM[cut:]
    assert b"\n" not in done.stdout.replace(b"\r\n", b"")


def test_a_stream_ends_with_what_a_plain_request_says(wanted: Settings) -> None:
    text = CRLF_AND_BOM.decode("utf-8-sig")
    request = wire.InfillRequest(text=text, spans=[wire.Span(start=GAP, end=GAP)], seed=1)
    found = discovery.ensure(wanted)
    with Client(found.url, found.token) as client:
        client.wait_ready(60)
        *canvases, last = client.stream(request)
        assert isinstance(last, wire.InfillReply)
        (again,) = client.infill(request).choices
    assert [span.text for span in again.spans] == [span.text for span in last.choices[0].spans]
    shown = [event for event in canvases if isinstance(event, wire.CanvasEvent)]
    assert [event.seq for event in shown] == list(range(len(canvases)))
    assert len(shown) >= 1


def test_status_and_stop(wanted: Settings) -> None:
    discovery.ensure(wanted)
    with Client(*address(wanted)) as client:
        client.wait_ready(60)
    told = json.loads(infilld(wanted, "status", "--json").stdout)
    assert (told["state"], told["model"], told["loaded"]) == ("running", STARTER, True)
    assert infilld(wanted, "stop").stdout == b"stopped\n"
    assert json.loads(infilld(wanted, "status", "--json").stdout)["state"] == "stopped"


def address(wanted: Settings) -> tuple[str, str]:
    found = discovery.find(wanted)
    assert found is not None
    return found.url, found.token


def test_it_can_be_inspected(capfd: pytest.CaptureFixture[str]) -> None:
    report = models.inspect(models.folder_of(STARTER), "cpu")
    assert report["fits"]
    assert report["stored_bytes"]
