"""Several spans, pins, drafts, context and repair: the starter model behind the real socket."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_editor import FakeEditor, apply_edit
from live_server import serving

from infilld.engine.worker import Worker
from infilld.server import cli, wire
from infilld.server.client import Client, ServerProblem
from infilld.server.settings import STARTER, Settings
from infilld.server.verbs.models import folder_of

pytestmark = pytest.mark.slow

TEXT = (
    "def add(first, second):\r\n    return first + second\r\n\r\n\r\n"
    "def plus(first, second):\r\n    return \r\n\r\n\r\n"
    "def sum_of(first, second):\r\n    \r\n\r\n\r\nprint(add(1, 2))  # \N{GRINNING FACE}"
)
RETURN = TEXT.rindex("    return \r") + len("    return ")
BODY = TEXT.rindex("    \r\n") + 4


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(state_dir=tmp_path_factory.mktemp("real") / "state", port=0, device="cpu")


@pytest.fixture(scope="module")
def client(wanted: Settings) -> Iterator[Client]:
    with (
        serving(wanted, Worker(folder_of(STARTER), device="cpu")) as found,
        Client(found.url, found.token, timeout_s=120) as made,
    ):
        made.wait_ready(120)
        yield made


def asked(*spans: tuple[int, int], **more: object) -> wire.InfillRequest:
    body = {
        "text": TEXT,
        "path": "adding.py",
        "language": "python",
        "spans": [{"start": start, "end": end} for start, end in spans],
        "seed": 1,
        "boldness": 1,
    }
    return wire.InfillRequest.model_validate(body | more)


def texts(client: Client, request: wire.InfillRequest) -> list[str]:
    """The texts of the best answer, which must be for the spans that were asked for."""
    reply = client.infill(request)
    assert reply.choices, (reply.reason, reply.why)
    for choice in reply.choices:
        assert [wire.Span(start=s.start, end=s.end) for s in choice.spans] == request.spans
        for span in choice.spans:
            assert "\n" not in span.text.replace("\r\n", "")
            assert 0 <= span.confidence <= 1
    return [span.text for span in reply.choices[0].spans]


def test_several_spans_in_the_order_asked(client: Client) -> None:
    first, second = texts(client, asked((BODY, BODY), (RETURN, RETURN)))
    again = texts(client, asked((RETURN, RETURN), (BODY, BODY)))
    assert "first" in second
    assert len(again) == 2
    assert first != second


# Whole words, and words that the vocabulary cuts elsewhere.
@pytest.mark.parametrize(("start", "end"), [("first", "second"), ("fir", "cond"), ("", "second")])
def test_pins_hold(client: Client, start: str, end: str) -> None:
    given = [("start", start), ("end", end)]
    pins = [{"span": 0, "at": at, "text": text} for at, text in given if text]
    (text,) = texts(client, asked((RETURN, RETURN), pins=pins))
    assert text.startswith(start)
    assert text.endswith(end)


def test_a_draft_is_a_start(client: Client) -> None:
    (text,) = texts(client, asked((RETURN, RETURN), draft=["first + second"]))
    assert text == "first + second"


def test_a_repair_keeps_what_is_not_suspected(client: Client) -> None:
    wrong = TEXT.replace("return first + second", "return first ] second")
    start = wrong.index("    return first")
    end = wrong.index("\r\n", start)
    at = wrong.index("]")
    suspects = [{"start": at, "end": at + 1}]
    (text,) = texts(client, asked((start, end), text=wrong, repair=suspects))
    assert text.startswith(wrong[start:at])
    assert text.endswith(wrong[at + 1 : end])
    assert "]" not in text


def test_a_repair_without_ranges_finds_some_or_says_none(client: Client) -> None:
    start = TEXT.index("    return first")
    end = TEXT.index("\r\n", start)
    reply = client.infill(asked((start, end), repair=[]))
    assert reply.choices or reply.why


@pytest.mark.parametrize(
    "more",
    [
        {"context": [{"path": "b.py", "text": "def other(a):\n    return a\n", "kind": "open"}]},
        {"instruction": "add the two " * 900},
        {"language": "klingon", "path": "a.unknown"},
        {"background": True},
        {"think": True},
        {"text": "", "spans": [{"start": 0, "end": 0}]},
        {"text": "\tif a:\n        b\n\t    c", "spans": [{"start": 8, "end": 8}]},
        {"text": "x = 1\n" * 20_000, "spans": [{"start": 60_000, "end": 60_000}]},
        {
            "text": "x = 1\n" * 20_000,
            "spans": [{"start": 4, "end": 5}, {"start": 119_998, "end": 119_999}],
        },
    ],
    ids=[
        "context",
        "instruction",
        "language",
        "background",
        "think",
        "empty",
        "tabs",
        "long",
        "far",
    ],
)
def test_every_answer_is_an_answer_or_a_reason(client: Client, more: dict[str, object]) -> None:
    request = asked((RETURN, RETURN), **more)
    try:
        reply = client.infill(request)
    except ServerProblem as problem:
        is_said = problem.status == 400 and problem.code in ("unsupported", "context_too_long")
        if not (is_said and problem.remedy):
            raise
        return
    assert reply.choices or reply.why
    for choice in reply.choices:
        assert [wire.Span(start=s.start, end=s.end) for s in choice.spans] == request.spans


def test_what_looks_binary_is_filtered(client: Client) -> None:
    assert client.infill(asked((1, 1), text="a\0\0b")).reason == "filtered"


def test_a_deadline_of_1_ms_is_kept(client: Client) -> None:
    reply = client.infill(asked((RETURN, RETURN), (BODY, BODY), deadline_ms=1))
    assert reply.reason in ("deadline", "ok")
    assert reply.timings.total_ms < 2_000


def test_a_stream_shows_every_span(client: Client) -> None:
    request = asked((RETURN, RETURN), (BODY, BODY))
    *canvases, last = client.stream(request)
    assert isinstance(last, wire.InfillReply)
    written = [span.text for span in last.choices[0].spans]
    assert written == texts(client, request)
    for event in canvases:
        assert isinstance(event, wire.CanvasEvent)
        assert len(event.spans) == 2


def test_the_shell_writes_several_spans(
    client: Client, wanted: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "adding.py"
    path.write_bytes(TEXT.encode())
    words = ["--at", "6:12", "--at", "10:5", "--starts-with", "first", "--starts-with", "return "]
    state = ["--state-dir", str(wanted.state_dir), "--boldness", "1", "--seed", "1"]
    assert cli.main(["fill", str(path), *words, *state, "--write"]) == 0
    pattern = re.escape(TEXT[:RETURN]) + "first.*" + re.escape(TEXT[RETURN:BODY]) + "return .*"
    assert re.fullmatch(pattern + re.escape(TEXT[BODY:]), path.read_bytes().decode(), re.DOTALL)


def test_the_bridge_fills_placeholders_and_repairs(
    client: Client, wanted: Settings, tmp_path: Path
) -> None:
    uri = "file:///adding.py"
    text = TEXT[:RETURN] + "<|gap|>" + TEXT[RETURN:BODY] + "<|gap|>" + TEXT[BODY:]
    options = {"startDaemon": False, "boldness": 1}
    with FakeEditor(tmp_path, state_dir=wanted.state_dir, options=options) as editor:
        editor.initialize()
        editor.wait_state("ready")
        editor.open(uri, text)
        document = {"textDocument": {"uri": uri}}
        got = editor.call("infilld/fillGaps", document)
        assert got["edit"], got
        after = apply_edit(text, got["edit"], uri, 1, editor.encoding)
        pattern = re.escape(TEXT[:RETURN]) + "(.*)" + re.escape(TEXT[RETURN:BODY]) + "(.*)"
        found = re.fullmatch(pattern + re.escape(TEXT[BODY:]), after, re.DOTALL)
        assert found
        assert "gap" not in found[1] + found[2]
        wrong = TEXT.replace("return first + second", "return first ] second")
        editor.change(uri, 2, {"text": wrong})
        place = {"start": {"line": 1, "character": 0}, "end": {"line": 1, "character": 99}}
        mark = {"start": {"line": 1, "character": 17}, "end": {"line": 1, "character": 18}}
        got = editor.call("infilld/repair", {**document, "range": place, "diagnostics": [mark]})
        after = apply_edit(wrong, got["edit"], uri, 2, editor.encoding) if got["edit"] else wrong
        start, rest = wrong.split("]")
        assert after.startswith(start)
        assert after.endswith(rest)
        assert got["edit"] or got["why"]
        params = {**document, "range": place, "instruction": "subtract"}
        got = editor.call("infilld/rewrite", params)
        assert got["edit"] or got["why"]
