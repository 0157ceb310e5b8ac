"""Rewrite, gaps and repair: the real bridge over stdio, the real server, a scripted worker."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_editor import AUTOMATIC, INVOKED, FakeEditor, apply_edit, position
from fake_worker import FakeWorker, Script
from hypothesis import example, given, settings
from hypothesis import strategies as st
from live_server import LiveServer, live_server

_numbers = itertools.count()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture(scope="module", params=["utf-8", "utf-16", "utf-32"])
def bridge(
    live: LiveServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[FakeEditor]:
    with FakeEditor(
        tmp_path_factory.mktemp("home"),
        state_dir=live.settings.state_dir,
        encodings=[request.param],
        options={"startDaemon": False, "automaticDeadlineMs": 20_000, "boldness": 0.75},
        root="file:///project",
    ) as editor:
        editor.initialize()
        editor.wait_state("ready")
        yield editor


@pytest.fixture
def worker(live: LiveServer) -> Iterator[FakeWorker]:
    """The worker with its jobs of earlier tests forgotten."""
    live.worker.jobs.clear()
    live.worker.script = Script(texts=("new",), drafts=())
    yield live.worker
    live.worker.release()


@pytest.fixture
def uri() -> str:
    return f"file:///project/src/{next(_numbers)}.py"


def where(text: str, start: int, end: int, encoding: str) -> dict[str, Any]:
    places = (position(text, offset, encoding) for offset in (start, end))
    first, last = ({"line": line, "character": character} for line, character in places)
    return {"start": first, "end": last}


def spot(text: str, part: str, encoding: str) -> dict[str, Any]:
    """The range of the only place where a part occurs."""
    assert text.count(part) == 1
    start = text.index(part)
    return where(text, start, start + len(part), encoding)


def rewriting(uri: str, place: object, **more: object) -> dict[str, object]:
    return {"textDocument": {"uri": uri}, "range": place, "instruction": "shorter", **more}


def asked(worker: FakeWorker) -> list[str]:
    """The texts of the spans of the only job."""
    (job,) = worker.jobs
    return [job.request.text[span.start : span.end] for span in job.request.spans]


def test_a_rewrite_answers_with_a_versioned_edit(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    text = "# 😀é\r\nx = '𝒳'; old()\r\n# end"
    bridge.open(uri, text)
    worker.script = Script(texts=("a\nb",), drafts=())
    place = spot(text, "old()", bridge.encoding)
    got = bridge.call("infilld/rewrite", rewriting(uri, place, token="t1"))
    assert got == {
        "edit": {
            "documentChanges": [
                {
                    "textDocument": {"uri": uri, "version": 1},
                    "edits": [{"range": place, "newText": "a\r\nb"}],
                }
            ]
        },
        "reason": "ok",
        "why": "",
    }
    assert asked(worker) == ["old()"]
    request = worker.jobs[0].request
    assert (request.instruction, request.repair, request.boldness) == ("shorter", None, 0.75)
    assert (request.path, request.language) == (uri.removeprefix("file:///project/"), "python")
    assert request.deadline_ms == 30_000


def test_gaps_at_given_ranges(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    text = "def f(a):\n    return \n\n\nprint(f(OLD))\n"
    bridge.open(uri, text)
    worker.script = Script(texts=(["3", "a + 1"],), drafts=())
    ranges = [spot(text, "OLD", bridge.encoding), where(text, 21, 21, bridge.encoding)]
    got = bridge.call("infilld/fillGaps", {"textDocument": {"uri": uri}, "ranges": ranges})
    after = apply_edit(text, got["edit"], uri, 1, bridge.encoding)
    assert after == "def f(a):\n    return a + 1\n\n\nprint(f(3))\n"
    assert asked(worker) == ["OLD", ""]


def test_every_placeholder_is_a_gap(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    text = "😀 <|gap|>\r\nif <|gap|><|gap|>:\r\n    pass  # <gap> <|gap\r\n"
    bridge.open(uri, text)
    worker.script = Script(texts=(["one", "two"],), drafts=())
    got = bridge.call("infilld/fillGaps", {"textDocument": {"uri": uri}})
    after = apply_edit(text, got["edit"], uri, 1, bridge.encoding)
    assert after == "😀 one\r\nif two:\r\n    pass  # <gap> <|gap\r\n"
    # The model sees gaps, and not how they were marked.
    assert worker.jobs[0].request.text == "😀 \r\nif :\r\n    pass  # <gap> <|gap\r\n"
    assert [(each.start, each.end) for each in worker.jobs[0].request.spans] == [(2, 2), (7, 7)]


@pytest.mark.parametrize("more", [{}, {"ranges": []}])
def test_a_document_without_gaps(
    bridge: FakeEditor, worker: FakeWorker, uri: str, more: dict[str, object]
) -> None:
    bridge.open(uri, "x = <gap>\n")
    got = bridge.call("infilld/fillGaps", {"textDocument": {"uri": uri}, **more})
    assert (got["edit"], got["reason"]) == (None, "no_gap")
    assert worker.jobs == []


def test_a_repair_knows_what_the_editor_says_is_wrong(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    text = "ok()\nif x = 1:\n    pas\nprint(y\n"
    bridge.open(uri, text)
    worker.script = Script(texts=("if x == 1:\n    pass\n",), drafts=())
    place = where(text, 5, 23, bridge.encoding)
    diagnostics = [
        spot(text, " = ", bridge.encoding),
        where(text, 19, 30, bridge.encoding),  # only a part of it may change
        where(text, 5, 5, bridge.encoding),  # no text
        spot(text, "ok", bridge.encoding),  # elsewhere
    ]
    params = {"textDocument": {"uri": uri}, "range": place, "diagnostics": diagnostics}
    got = bridge.call("infilld/repair", params)
    after = apply_edit(text, got["edit"], uri, 1, bridge.encoding)
    assert after == "ok()\nif x == 1:\n    pass\nprint(y\n"
    request = worker.jobs[0].request
    assert request.repair is not None
    assert [(each.start, each.end) for each in request.repair] == [(9, 12), (19, 23)]


def test_a_repair_without_diagnostics_lets_the_model_look(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "if x = 1:\n")
    place = where("if x = 1:\n", 0, 9, bridge.encoding)
    bridge.call("infilld/repair", {"textDocument": {"uri": uri}, "range": place})
    assert worker.jobs[0].request.repair == ()


def test_silence_has_a_reason_and_no_edit(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    bridge.open(uri, "old\n")
    worker.script = Script(reason="low_confidence", why="Not sure enough.", drafts=())
    got = bridge.call("infilld/rewrite", rewriting(uri, where("old\n", 0, 3, "utf-8")))
    assert got == {"edit": None, "reason": "low_confidence", "why": "Not sure enough."}
    last = bridge.status()["last"]
    assert (last["what"], last["reason"]) == ("rewrite", "low_confidence")


def test_text_that_stays_as_it_is_needs_no_edit(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "a\r\nb\r\n")
    worker.script = Script(texts=("a\nb",), drafts=())
    got = bridge.call("infilld/rewrite", rewriting(uri, where("a\r\nb\r\n", 0, 4, "utf-8")))
    assert (got["edit"], got["reason"]) == (None, "unchanged")


@pytest.mark.parametrize("elsewhere", [0, 1])
def test_a_document_that_moves_gets_no_edit(
    bridge: FakeEditor, worker: FakeWorker, uri: str, elsewhere: int
) -> None:
    bridge.open(uri, "old\nrest\n")
    worker.hold()
    place = where("old\n", 0, 3, "utf-8")
    number = bridge.request("infilld/rewrite", rewriting(uri, place))
    worker.wait_for(lambda: len(worker.jobs) == 1)
    bridge.insert(uri, 2, elsewhere, 0, "x")
    got = bridge.reply(number)["result"]
    assert (got["edit"], got["reason"]) == (None, "stale")
    worker.wait_for(lambda: worker.jobs[0].is_cancelled.is_set())


def test_a_new_version_of_the_same_text_is_the_edits(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "old\n")
    worker.hold()
    number = bridge.request("infilld/rewrite", rewriting(uri, where("old\n", 0, 3, "utf-8")))
    worker.wait_for(lambda: len(worker.jobs) == 1)
    bridge.change(uri, 7, {"text": "old\n"})
    bridge.status()  # answered after the change was taken in
    worker.release()
    got = bridge.reply(number)["result"]
    assert apply_edit("old\n", got["edit"], uri, 7, bridge.encoding) == "new\n"


def test_closing_the_document_stops_the_job(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "old\n")
    worker.hold()
    number = bridge.request("infilld/rewrite", rewriting(uri, where("old\n", 0, 3, "utf-8")))
    worker.wait_for(lambda: len(worker.jobs) == 1)
    bridge.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
    assert bridge.reply(number)["result"]["reason"] == "closed"
    worker.wait_for(worker.jobs[0].future.done)


def test_cancelling_stops_the_daemons_job(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    bridge.open(uri, "old\n")
    worker.hold()
    number = bridge.request("infilld/rewrite", rewriting(uri, where("old\n", 0, 3, "utf-8")))
    worker.wait_for(lambda: len(worker.jobs) == 1)
    bridge.notify("$/cancelRequest", {"id": number})
    assert bridge.reply(number)["error"]["code"] == -32800
    worker.wait_for(lambda: worker.jobs[0].is_cancelled.is_set())


def test_one_live_job_a_document(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    """A newer edit or a request by hand supersedes; what only the cursor asked for steps back."""
    bridge.open(uri, "old\n")
    worker.hold()
    params = rewriting(uri, where("old\n", 0, 3, "utf-8"))
    first = bridge.request("infilld/rewrite", params)
    worker.wait_for(lambda: len(worker.jobs) == 1)
    assert bridge.items(uri, 0, 3, AUTOMATIC) == []
    assert bridge.status()["last"]["reason"] == "busy"
    second = bridge.request("infilld/rewrite", params)
    assert bridge.reply(first)["result"]["reason"] == "superseded"
    worker.wait_for(lambda: len(worker.jobs) == 2)
    third = bridge.complete(uri, 0, 3, INVOKED)
    assert bridge.reply(second)["result"]["reason"] == "superseded"
    worker.wait_for(lambda: len(worker.jobs) == 3)
    fourth = bridge.request("infilld/rewrite", params)
    assert bridge.reply(third)["result"] is None
    worker.wait_for(lambda: len(worker.jobs) == 4)
    worker.release()
    assert bridge.reply(fourth)["result"]["reason"] == "ok"
    assert all(job.future.done() for job in worker.jobs)


UNUSUAL = {
    "an empty document": ("", 0, 0),
    "the whole document": ("a\r\nb\n", 0, 5),
    "the end without a line end": ("a\n\tb", 2, 4),
    "tabs and blanks": ("if a:\n\t  b\n        c\n", 6, 10),
    "NUL characters": ("a\0b\0", 1, 2),
}


@pytest.mark.parametrize(("text", "start", "end"), UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_text(
    bridge: FakeEditor, worker: FakeWorker, uri: str, text: str, start: int, end: int
) -> None:
    bridge.open(uri, text, language="klingon")
    place = where(text, start, end, bridge.encoding)
    got = bridge.call("infilld/rewrite", rewriting(uri, place, instruction="é😀" * 2_000))
    after = apply_edit(text, got["edit"], uri, 1, bridge.encoding)
    assert after == text[:start] + "new" + text[end:]
    assert worker.jobs[0].request.language == "klingon"


def test_a_document_of_20000_lines(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    text = "x = 1  # é\r\n" * 20_000
    bridge.open(uri, text)
    worker.script = Script(texts=(["A\n", "B"],), drafts=())
    ends = [where(text, 12 * line, 12 * line + 1, bridge.encoding) for line in (19_999, 0)]
    got = bridge.call("infilld/fillGaps", {"textDocument": {"uri": uri}, "ranges": ends})
    after = apply_edit(text, got["edit"], uri, 1, bridge.encoding)
    assert after == "B" + text[1 : 12 * 19_999] + "A\r\n" + text[12 * 19_999 + 1 :]
    assert worker.jobs[0].request.text == text
    worker.jobs.clear()
    bridge.call("infilld/fillGaps", {"textDocument": {"uri": uri}, "ranges": ends[:1]})
    assert len(worker.jobs[0].request.text) < 80_000


def test_a_range_that_ends_inside_a_character(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    """Within a code point means before it; past the end of a line means its end."""
    bridge.open(uri, "a😀b\r\nc")
    within = {"utf-8": 3, "utf-16": 2, "utf-32": 1}[bridge.encoding]
    place = {"start": {"line": 0, "character": 0}, "end": {"line": 0, "character": within}}
    got = bridge.call("infilld/rewrite", rewriting(uri, place))
    assert apply_edit("a😀b\r\nc", got["edit"], uri, 1, bridge.encoding) == "new😀b\r\nc"
    place = {"start": {"line": 0, "character": 99}, "end": {"line": 9, "character": 0}}
    worker.jobs.clear()
    got = bridge.call("infilld/rewrite", rewriting(uri, place))
    assert apply_edit("a😀b\r\nc", got["edit"], uri, 1, bridge.encoding) == "a😀bnew"
    assert asked(worker) == ["\r\nc"]


def test_ranges_that_overlap_are_refused(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    bridge.open(uri, "abcd\n")
    ranges = [where("abcd\n", 0, 2, "utf-8"), where("abcd\n", 1, 3, "utf-8")]
    got = bridge.call("infilld/fillGaps", {"textDocument": {"uri": uri}, "ranges": ranges})
    assert (got["edit"], got["reason"]) == (None, "spans_overlap")
    assert worker.jobs == []


def test_half_a_surrogate_pair_is_not_asked(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "old\n")
    params = rewriting(uri, where("old\n", 0, 3, "utf-8"), instruction="\ud83d")
    assert bridge.call("infilld/rewrite", params)["reason"] == "filtered"
    not_open = rewriting(uri + "x", where("old\n", 0, 3, "utf-8"))
    assert bridge.call("infilld/rewrite", not_open)["reason"] == "not_open"
    assert worker.jobs == []


PLACE = {"start": {"line": 0, "character": 0}, "end": {"line": 0, "character": 1}}
REVERSED = {"start": {"line": 0, "character": 1}, "end": {"line": 0, "character": 0}}
DOCUMENT = {"textDocument": {"uri": "file:///a.py"}}


@pytest.mark.parametrize(
    ("method", "params", "said"),
    [
        ("rewrite", None, "params"),
        ("rewrite", [], "params"),
        ("rewrite", {}, "instruction"),
        ("rewrite", {**DOCUMENT, "range": PLACE, "instruction": 5}, "instruction"),
        ("rewrite", {**DOCUMENT, "instruction": ""}, "range"),
        ("rewrite", {"range": PLACE, "instruction": ""}, "textDocument"),
        ("rewrite", {**DOCUMENT, "range": REVERSED, "instruction": ""}, "ends before"),
        ("rewrite", {**DOCUMENT, "range": PLACE, "instruction": "", "token": {}}, "token"),
        ("fillGaps", {**DOCUMENT, "ranges": {}}, "ranges"),
        ("fillGaps", {**DOCUMENT, "ranges": [PLACE, {"start": {}}]}, "ranges.1.start.line"),
        ("repair", {**DOCUMENT}, "range"),
        ("repair", {**DOCUMENT, "range": PLACE, "diagnostics": [5]}, "diagnostics.0"),
        ("repair", {"textDocument": {"uri": 5}, "range": PLACE}, "textDocument.uri"),
    ],
)
def test_malformed_parameters_are_answered(
    bridge: FakeEditor, method: str, params: object, said: str
) -> None:
    command = {"command": f"infilld.{method}", "arguments": [params]}
    for asked_by, with_params in (
        (f"infilld/{method}", params),
        ("workspace/executeCommand", command),
    ):
        error = bridge.reply(bridge.request(asked_by, with_params))["error"]
        assert (error["code"], said in error["message"]) == (-32602, True), error


def run_command(bridge: FakeEditor, name: str, *arguments: object) -> int:
    params = {"command": f"infilld.{name}", "arguments": list(arguments)}
    return bridge.request("workspace/executeCommand", params)


def applying(bridge: FakeEditor, uri: str) -> dict[str, Any]:
    """The bridge's request to apply an edit of a document."""
    return bridge.wait(
        lambda m: m.get("method") == "workspace/applyEdit" and uri in str(m["params"]),
        "a request to apply an edit",
    )


@pytest.mark.parametrize("is_applied", [True, False])
def test_a_command_has_the_editor_apply_the_edit(
    bridge: FakeEditor, worker: FakeWorker, uri: str, is_applied: bool
) -> None:
    bridge.open(uri, "😀 <|gap|>")
    number = run_command(bridge, "fillGaps", {"textDocument": {"uri": uri}, "jsonrpc": "trap"})
    request = applying(bridge, uri)
    assert request["params"]["label"] == "infilld: fillGaps"
    edit = request["params"]["edit"]
    assert apply_edit("😀 <|gap|>", edit, uri, 1, bridge.encoding) == "😀 new"
    refusal = {"applied": False, "failureReason": "read-only"}
    bridge.respond(request["id"], {"applied": True} if is_applied else refusal)
    expected = {"applied": True, "reason": "ok", "why": ""}
    if not is_applied:
        expected = {"applied": False, "reason": "not_applied", "why": "read-only"}
    assert bridge.reply(number)["result"] == expected


def test_a_command_that_changes_nothing_says_so(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "old\n")
    worker.script = Script(reason="empty", why=f"Nothing for {uri}.", drafts=())
    number = run_command(bridge, "rewrite", rewriting(uri, where("old\n", 0, 3, "utf-8")))
    assert bridge.reply(number)["result"]["reason"] == "empty"
    shown = [each["message"] for each in bridge.received("window/showMessage")]
    assert f"infilld: nothing changed (empty). Nothing for {uri}." in shown


def test_a_cancelled_command_applies_nothing(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "old\n")
    worker.hold()
    params = rewriting(uri, where("old\n", 0, 3, "utf-8"))
    number = run_command(bridge, "rewrite", params)
    worker.wait_for(lambda: len(worker.jobs) == 1)
    bridge.notify("$/cancelRequest", {"id": number})
    assert bridge.reply(number)["error"]["code"] == -32800
    worker.wait_for(worker.jobs[0].future.done)
    worker.release()
    # One that is cancelled before it has begun does not begin.
    number = run_command(bridge, "rewrite", params)
    bridge.notify("$/cancelRequest", {"id": number})
    bridge.status()
    assert not [m for m in bridge.received("workspace/applyEdit") if uri in str(m)]


def actions(bridge: FakeEditor, uri: str, place: object, **context: object) -> list[Any]:
    params = {"textDocument": {"uri": uri}, "range": place, "context": context}
    got: list[Any] = bridge.call("textDocument/codeAction", params)
    return got


def test_a_selection_may_be_repaired_or_written_anew(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    """An action is a command whose argument is the request's params."""
    text = "é😀 = old(\n"
    bridge.open(uri, text)
    place, wrong = where(text, 0, 9, bridge.encoding), where(text, 8, 9, bridge.encoding)
    repair, rewrite = actions(
        bridge, uri, place, diagnostics=[{"range": wrong, "message": "never closed"}]
    )
    assert (repair["kind"], rewrite["kind"]) == ("quickfix", "refactor.rewrite")
    assert "tags" not in repair
    for action, repaired in ((repair, [(8, 9)]), (rewrite, None)):
        worker.jobs.clear()
        command = {name: action["command"][name] for name in ("command", "arguments")}
        number = bridge.request("workspace/executeCommand", command)
        request = applying(bridge, uri)
        bridge.respond(request["id"], {"applied": False})
        assert bridge.reply(number)["result"]["reason"] == "not_applied"
        asked_for = worker.jobs[0].request
        got = asked_for.repair and [(each.start, each.end) for each in asked_for.repair]
        assert (got, asked_for.instruction) == (repaired, None)
        bridge.forget(request)


@pytest.mark.parametrize(
    ("only", "kinds"),
    [
        (["refactor"], ["refactor.rewrite"]),
        (["quickfix"], ["quickfix"]),
        ([""], ["quickfix", "refactor.rewrite"]),
        (["refactor.rewrite.more", "source", "quick"], []),
    ],
)
def test_only_the_actions_asked_for(
    bridge: FakeEditor, uri: str, only: list[str], kinds: list[str]
) -> None:
    bridge.open(uri, "old\n")
    place = where("old\n", 0, 3, "utf-8")
    found = actions(bridge, uri, place, diagnostics=[], only=only)
    assert [each["kind"] for each in found] == kinds
    assert actions(bridge, uri, where("old\n", 1, 1, "utf-8"), diagnostics=[]) == []
    assert actions(bridge, uri + "x", place, diagnostics=[]) == []


def test_actions_are_marked_for_editors_that_know_the_mark(tmp_path: Path) -> None:
    capabilities = {"textDocument": {"codeAction": {"tagSupport": {"valueSet": [1]}}}}
    with FakeEditor(tmp_path, state_dir=tmp_path / "state", options={"startDaemon": False}) as it:
        it.initialize(**capabilities)
        it.open("file:///a.py", "old\n")
        found = actions(it, "file:///a.py", PLACE, diagnostics=[])
        assert [each["tags"] for each in found] == [[1], [1]]


def test_a_deadline_of_1_ms(live: LiveServer, worker: FakeWorker, tmp_path: Path) -> None:
    worker.hold()
    options = {"startDaemon": False, "editDeadlineMs": 1, "daemonWaitMs": 20_000}
    with FakeEditor(tmp_path, state_dir=live.settings.state_dir, options=options) as editor:
        editor.initialize()
        editor.wait_state("ready")
        editor.open("file:///a.py", "old\n")
        got = editor.call("infilld/rewrite", rewriting("file:///a.py", PLACE))
        assert (got["edit"], got["reason"]) == (None, "deadline")
    assert worker.jobs[0].request.deadline_ms == 1


TEXTS = st.lists(
    st.sampled_from(["x", "foo(", " ", "é", "中", "😀", "𝒳", "\r\n", "\n", "\r", "\x0c", "\u2028"]),
    max_size=8,
).map("".join)
Part = tuple[str, str, str]


def glue(before: str, after: str) -> str:
    """What keeps two parts from making one line end together."""
    return "|" if before.endswith("\r") and after.startswith("\n") else ""


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=1, max_size=4), end=TEXTS)
@example(parts=[("", "", "\r\n"), ("\r\n", "", "b")], end="")
@example(parts=[("", "a", ""), ("", "b", "new"), ("\r\n", "\r\n", "")], end="")
def test_bytes_outside_the_ranges_are_identical(
    bridge: FakeEditor, live: LiveServer, parts: list[Part], end: str
) -> None:
    text, places = "", []
    for kept, inside, new in parts:
        is_twin = not (kept or inside) and bool(places) and places[-1][0] == len(text)
        text += "|" if is_twin else glue(text, kept) + kept
        start = len(text)
        text += glue(text, inside) + inside
        places.append((start, len(text), new))
    text += glue(text, end) + end
    uri = f"file:///project/{next(_numbers)}.py"
    live.worker.jobs.clear()
    live.worker.script = Script(texts=([new for _, _, new in places],), drafts=())
    bridge.open(uri, text)
    ranges = [where(text, start, stop, bridge.encoding) for start, stop, _ in places]
    got = bridge.call("infilld/fillGaps", {"textDocument": {"uri": uri}, "ranges": ranges})
    after = apply_edit(text, got["edit"], uri, 1, bridge.encoding) if got["edit"] else text
    assert got["reason"] in ("ok", "unchanged")
    # Line ends of the new text are those in use; all else stands as it was.
    pattern, at = "", 0
    for start, stop, new in places:
        lines = [re.escape(line) for line in re.split("\r\n|\r|\n", new)]
        pattern += re.escape(text[at:start]) + "(?:\r\n|\r|\n)".join(lines)
        at = stop
    assert re.fullmatch(pattern + re.escape(text[at:]), after), (text, after)
    bridge.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
