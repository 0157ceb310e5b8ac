"""`/metrics`, read as strictly as its format is defined."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from fake_worker import Script
from live_server import LiveServer

from infilld.engine.request import InfillRequest, InfillResult, Span, Timings
from infilld.server import wire
from infilld.server.keeping import metrics
from infilld.server.keeping.metrics import Family, Metrics, exposition
from infilld.server.keeping.outcomes import outcome_of

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (\S+)")
PAIR = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass
class Read:
    """A family as a scraper sees it."""

    help: str
    type: str = ""
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = field(default_factory=dict)


def parse(text: str) -> Mapping[str, Read]:
    """Read the format, or fail: groups, endings of names, duplicates, histograms.

    Source: Prometheus, Exposition formats, Text format details.
    """
    assert text.endswith("\n")
    found: dict[str, Read] = {}
    current = ""
    for line in text.split("\n")[:-1]:
        if line.startswith("# HELP "):
            current, _, help_text = line.removeprefix("# HELP ").partition(" ")
            assert re.fullmatch(NAME, current)
            assert current not in found, f"{current} twice"
            found[current] = Read(help_text)
        elif line.startswith("# TYPE "):
            name, _, kind = line.removeprefix("# TYPE ").partition(" ")
            assert (name, kind in ("counter", "gauge", "histogram")) == (current, True)
            assert not found[name].samples
            found[name].type = kind
        else:
            _add(found[current], current, line)
    for name, family in found.items():
        _check(name, family)
    return found


def _add(family: Read, name: str, line: str) -> None:
    match = SAMPLE.fullmatch(line)
    assert match, line
    full, pairs, value = match.groups()
    endings = ("_bucket", "_sum", "_count") if family.type == "histogram" else ("",)
    assert full in [name + ending for ending in endings], f"{full} among {name}"
    unescaped = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
    labels = {
        key: re.sub(r"\\.", lambda found: unescaped[found[0]], text)
        for key, text in PAIR.findall(pairs or "")
    }
    place = (full.removeprefix(name), frozenset(labels.items()))
    assert place not in family.samples, f"{line} twice"
    family.samples[place] = float(value)


def _check(name: str, family: Read) -> None:
    assert family.help
    assert family.type
    assert (family.type == "counter") == name.endswith("_total"), name
    assert not re.search(r"_(ms|milliseconds|kb|mb|percent)(_|$)", name), name
    if family.type == "counter":
        assert all(value >= 0 for value in family.samples.values())
    if family.type != "histogram":
        return
    rows: dict[frozenset[tuple[str, str]], list[tuple[float, float]]] = {}
    for (ending, labels), value in family.samples.items():
        if ending == "_bucket":
            edge = float(dict(labels)["le"])
            rest = frozenset(pair for pair in labels if pair[0] != "le")
            rows.setdefault(rest, []).append((edge, value))
    for labels, row in rows.items():
        assert row == sorted(row)
        assert [value for _, value in row] == sorted(value for _, value in row)
        assert row[-1][0] == math.inf
        assert row[-1][1] == family.samples["_count", labels]


def value(found: Mapping[str, Read], family: str, ending: str = "", **labels: str) -> float:
    return found[family].samples[ending, frozenset(labels.items())]


def scrape(server: LiveServer) -> Mapping[str, Read]:
    headers = {"Authorization": f"Bearer {server.token}"}
    got = httpx.get(server.url + "/metrics", headers=headers)
    assert got.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parse(got.text)


def test_metrics_of_a_daemon(server: LiveServer) -> None:
    before = scrape(server)
    assert value(before, "infilld_live_jobs") == 0
    assert value(before, "infilld_model_loaded") == 1
    asked = wire.InfillRequest(text="x = ", spans=[wire.Span(start=4, end=4)])
    with server.client() as client:
        job = client.infill(asked).id
        client.feedback(wire.Feedback(id=job, event="shown"))
        server.worker.script = Script(reason="empty", why="nothing")
        client.infill(asked)
    found = scrape(server)
    assert value(found, "infilld_answers_total", kind="infill", reason="ok") == 1
    assert value(found, "infilld_answers_total", kind="infill", reason="empty") == 1
    assert value(found, "infilld_feedback_total", event="shown") == 1
    assert value(found, "infilld_passes_total") == 4
    seconds = "infilld_answer_duration_seconds"
    assert value(found, seconds, "_count", kind="infill") == 2
    assert value(found, seconds, "_sum", kind="infill") == pytest.approx(0.003)
    assert value(found, seconds, "_bucket", kind="infill", le="0.01") == 2
    assert value(found, "llamacpp:prompt_tokens_total") == 20
    assert value(found, "llamacpp:tokens_predicted_total") == 4
    assert value(found, "process_resident_memory_bytes") > 1e6
    (labels,) = (dict(labels) for _, labels in found["infilld_info"].samples)
    assert (labels["model"], labels["device"]) == ("fake", "cpu")


def test_the_worker_s_numbers_keep_their_units() -> None:
    live: dict[str, Any] = {"running": 1, "queued": 2, "last_load_s": 1.5, "state": "unloaded"}
    found = parse(exposition(Metrics().families(live)))
    assert value(found, "infilld_model_load_seconds") == 1.5
    assert value(found, "llamacpp:requests_processing") == 1
    assert value(found, "llamacpp:requests_deferred") == 2
    assert value(found, "infilld_model_loaded") == 0


@pytest.mark.parametrize("ms", [0.0, 10.0, 10.001, 29_999.0, 60_000.0])
def test_a_bucket_holds_what_is_not_above_its_edge(ms: float) -> None:
    counted = Metrics()
    asked = InfillRequest(text="", spans=(Span(0, 0),))
    result = InfillResult(id="a", seed=0, timings=Timings(total_ms=ms))
    counted.answered(outcome_of("a", "/v1/infill", asked, result))
    found = parse(exposition(counted.families({})))
    for edge in metrics.BOUNDS_S:
        held = value(
            found, "infilld_answer_duration_seconds", "_bucket", kind="infill", le=str(edge)
        )
        assert held == (ms / 1e3 <= edge), edge


def test_labels_and_helps_are_escaped() -> None:
    nasty = 'a"b\\c\nd}e,f="g'
    text = exposition([Family("infilld_x", "gauge", "one\ntwo \\", [("", {"name": nasty}, 1)])])
    assert len(text.splitlines()) == 3
    assert value(parse(text), "infilld_x", name=nasty) == 1


@pytest.mark.parametrize(
    "text",
    [
        "infilld_x 1\n",
        "# HELP a b\n# TYPE a gauge\na 1",
        '# HELP a b\n# TYPE a gauge\na{x="1"} 1\na{x="1"} 2\n',
        "# HELP a b\n# TYPE a counter\na 1\n",
        '# HELP a b\n# TYPE a gauge\na{x="\\q"} 1\n',
        "# HELP a b\n# TYPE a gauge\na\tx\n",
    ],
)
def test_the_reader_of_these_tests_is_strict(text: str) -> None:
    with pytest.raises((AssertionError, KeyError)):
        parse(text)
