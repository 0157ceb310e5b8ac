"""Inline completion: the real bridge over stdio, the real server, a scripted worker."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_editor import AUTOMATIC, INVOKED, FakeEditor, apply_item, position
from fake_worker import FakeWorker, Script
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import LiveServer, live_server

_numbers = itertools.count()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("state")) as running:
        yield running


@pytest.fixture(scope="module", params=[("utf-8", "utf-16"), None], ids=["utf-8", "utf-16"])
def bridge(
    live: LiveServer, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[FakeEditor]:
    home = tmp_path_factory.mktemp("home")
    options = {"startDaemon": False, "automaticDeadlineMs": 20_000}
    with FakeEditor(
        home,
        state_dir=live.settings.state_dir,
        encodings=request.param,
        options=options,
        root="file:///project",
    ) as editor:
        editor.initialize()
        editor.wait_state("ready")
        yield editor


@pytest.fixture
def worker(live: LiveServer) -> Iterator[FakeWorker]:
    """The worker with its jobs of earlier tests forgotten."""
    live.worker.jobs.clear()
    live.worker.script = Script(texts=("return 1",), drafts=())
    yield live.worker
    live.worker.release()


@pytest.fixture
def uri() -> str:
    return f"file:///project/src/{next(_numbers)}.py"


def at(line: int, character: int) -> dict[str, int]:
    return {"line": line, "character": character}


def test_the_encoding_is_negotiated(bridge: FakeEditor, request: pytest.FixtureRequest) -> None:
    offered = request.node.callspec.params["bridge"]
    assert bridge.encoding == (offered[0] if offered else "utf-16")


def test_a_gap_is_filled(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    bridge.open(uri, "# 😀é\r\ndef f():\r\n    ret\r\n# end")
    worker.script = Script(texts=("urn '😀'",), drafts=())
    assert bridge.items(uri, 2, 7) == [
        {"insertText": "return '😀'", "range": {"start": at(2, 4), "end": at(2, 7)}}
    ]
    asked = worker.jobs[0].request
    assert asked.text == "# 😀é\ndef f():\n    ret\n# end"
    assert [(span.start, span.end) for span in asked.spans] == [(21, 21)]
    assert (asked.path, asked.language) == (uri.removeprefix("file:///project/"), "python")
    assert (asked.alternatives, asked.deadline_ms) == (1, 20_000)
    assert asked.document is not None
    assert asked.document.endswith(uri)


def test_astral_text_before_the_gap(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    text = "x = '😀𝒳é中' + na"
    bridge.open(uri, text)
    line, character = position(text, len(text), bridge.encoding)
    worker.script = Script(texts=("me😀",), drafts=())
    (item,) = bridge.items(uri, line, character)
    assert item["insertText"] == "name😀"
    assert apply_item(text, item, bridge.encoding) == text + "me😀"


def test_an_invoked_request_gets_alternatives(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "x = \n")
    worker.script = Script(texts=("1", "2\n3", "1"), drafts=())
    items = bridge.items(uri, 0, 4, INVOKED)
    assert [item["insertText"] for item in items] == ["1", "2\n3"]
    assert worker.jobs[0].request.alternatives == 3


def test_no_suggestion_is_an_empty_list(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    bridge.open(uri, "x = \n")
    worker.script = Script(reason="low_confidence", why="Not sure enough.", drafts=())
    assert bridge.items(uri, 0, 4) == []
    last = bridge.status()["last"]
    assert (last["reason"], last["why"]) == ("low_confidence", "Not sure enough.")


def test_a_newer_request_supersedes(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    bridge.open(uri, "x = \n")
    worker.hold()
    older = bridge.complete(uri, 0, 4)
    worker.wait_for(lambda: len(worker.jobs) == 1)
    newer = bridge.complete(uri, 0, 4)
    assert bridge.reply(older)["result"] is None
    worker.wait_for(lambda: len(worker.jobs) == 2 and worker.jobs[0].future.done())
    worker.release()
    assert bridge.reply(newer)["result"]["items"][0]["insertText"] == "return 1"


def test_documents_do_not_supersede_each_other(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "x = \n")
    bridge.open(uri + "i", "y = \n")
    worker.hold()
    numbers = [bridge.complete(uri, 0, 4), bridge.complete(uri + "i", 0, 4)]
    worker.wait_for(lambda: len(worker.jobs) == 2)
    worker.release()
    assert all(bridge.reply(number)["result"]["items"] for number in numbers)


def test_cancelling_stops_the_daemons_job(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    bridge.open(uri, "x = \n")
    worker.hold()
    number = bridge.complete(uri, 0, 4)
    worker.wait_for(lambda: len(worker.jobs) == 1)
    bridge.notify("$/cancelRequest", {"id": number})
    assert bridge.reply(number)["error"]["code"] == -32800
    worker.wait_for(lambda: worker.jobs[0].is_cancelled.is_set())
    worker.wait_for(worker.jobs[0].future.done)


def test_another_change_stops_the_job_at_once(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "x = \nrest")
    worker.hold()
    number = bridge.complete(uri, 0, 4)
    worker.wait_for(lambda: len(worker.jobs) == 1)
    bridge.insert(uri, 2, 1, 0, "more ")
    assert bridge.reply(number)["result"] == {"items": []}
    worker.wait_for(worker.jobs[0].future.done)
    assert bridge.status()["last"]["reason"] == "stale"


def test_closing_the_document_stops_the_job(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "x = \n")
    worker.hold()
    number = bridge.complete(uri, 0, 4)
    worker.wait_for(lambda: len(worker.jobs) == 1)
    bridge.notify("textDocument/didClose", {"textDocument": {"uri": uri}})
    assert bridge.reply(number)["result"] == {"items": []}
    worker.wait_for(worker.jobs[0].future.done)


@pytest.mark.parametrize(("typed", "is_kept"), [("tu", True), ("te", False)])
def test_typing_along_keeps_a_suggestion_that_fits(
    bridge: FakeEditor, worker: FakeWorker, uri: str, typed: str, is_kept: bool
) -> None:
    text = "😀 re\nrest"
    bridge.open(uri, text)
    line, character = position(text, 4, bridge.encoding)
    worker.script = Script(texts=("turn 1",), drafts=())
    worker.hold()
    number = bridge.complete(uri, line, character)
    worker.wait_for(lambda: len(worker.jobs) == 1)
    for version, char in enumerate(typed, start=2):
        bridge.insert(uri, version, line, character + version - 2, char)
    bridge.status()  # answered after the changes were taken in
    worker.release()
    items = bridge.reply(number)["result"]["items"]
    if not is_kept:
        assert items == []
        return
    assert items == [
        {
            "insertText": "return 1",
            "range": {"start": at(0, character - 2), "end": at(0, character + 2)},
        }
    ]
    assert apply_item("😀 retu\nrest", items[0], bridge.encoding) == "😀 return 1\nrest"


def test_a_selected_menu_entry_is_pinned(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    bridge.open(uri, "x.app + 1")
    worker.script = Script(texts=("append(y)", "apply()"), drafts=())
    entry = {"range": {"start": at(0, 2), "end": at(0, 5)}, "text": "append"}
    number = bridge.complete(uri, 0, 5, INVOKED, selectedCompletionInfo=entry)
    # What does not start with the entry would replace the user's choice.
    assert bridge.reply(number)["result"]["items"] == [
        {"insertText": "append(y)", "range": entry["range"]}
    ]
    asked = worker.jobs[0].request
    assert asked.text == "x. + 1"
    assert [(span.start, span.end) for span in asked.spans] == [(2, 2)]
    assert [(pin.span, pin.at, pin.text) for pin in asked.pins] == [(0, "start", "append")]


def test_a_selected_menu_entry_that_is_typed_needs_no_pin(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "x.app + 1")
    worker.script = Script(texts=("(y)",), drafts=())
    entry = {"range": {"start": at(0, 2), "end": at(0, 5)}, "text": "app"}
    number = bridge.complete(uri, 0, 5, AUTOMATIC, selectedCompletionInfo=entry)
    assert bridge.reply(number)["result"]["items"] == [
        {"insertText": "app(y)", "range": entry["range"]}
    ]
    assert (worker.jobs[0].request.text, worker.jobs[0].request.pins) == ("x.app + 1", ())


def test_positions_past_the_end_are_clamped(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "x = \r\ny = ")
    worker.script = Script(texts=("1",), drafts=())
    assert bridge.items(uri, 0, 99)[0]["range"] == {"start": at(0, 4), "end": at(0, 4)}
    assert bridge.items(uri, 99, 0)[0]["range"] == {"start": at(1, 4), "end": at(1, 4)}


def test_changes_are_taken_in(bridge: FakeEditor, worker: FakeWorker, uri: str) -> None:
    """A form feed is no line end; pygls' own documents would count it as one."""
    bridge.open(uri, "a\x0c😀b\nc")
    bridge.insert(uri, 2, 1, 1, "d\r\n")
    bridge.insert(uri, 3, 2, 0, "e")
    assert bridge.items(uri, 2, 1)
    assert worker.jobs[0].request.text == "a\x0c😀b\ncd\ne"


def test_a_document_that_is_not_open_gets_nothing(bridge: FakeEditor, uri: str) -> None:
    assert bridge.items(uri, 0, 0) == []
    assert bridge.status()["last"]["reason"] == "not_open"


def test_half_a_surrogate_pair_gets_nothing(
    bridge: FakeEditor, worker: FakeWorker, uri: str
) -> None:
    bridge.open(uri, "x = '\ud83d'\n")
    assert bridge.items(uri, 1, 0) == []
    assert bridge.status()["last"]["reason"] == "filtered"
    assert not worker.jobs


TEXTS = st.lists(
    st.sampled_from(["x", "foo(", " ", "é", "中", "😀", "𝒳", "\r\n", "\n", "\r", "\x0c", "\u2028"]),
    max_size=20,
).map("".join)


@settings(max_examples=25, deadline=None)
@given(text=TEXTS, fill=TEXTS.filter(bool), data=st.data())
def test_bytes_outside_the_span_are_identical(
    bridge: FakeEditor, live: LiveServer, text: str, fill: str, data: st.DataObject
) -> None:
    """Whatever the fill, the document before and after the gap stays as it is."""
    places = [o for o in range(len(text) + 1) if text[max(0, o - 1) : o + 1] != "\r\n"]
    cursor = data.draw(st.sampled_from(places))
    uri = f"file:///project/{next(_numbers)}.py"
    live.worker.jobs.clear()
    live.worker.script = Script(texts=(fill,), drafts=())
    bridge.open(uri, text)
    (item,) = bridge.items(uri, *position(text, cursor, bridge.encoding))
    inserted = re.sub("\r\n|\r", "\n", fill)
    after = apply_item(text, item, bridge.encoding)
    assert after.encode() == (text[:cursor] + inserted + text[cursor:]).encode()
    bridge.notify("textDocument/didClose", {"textDocument": {"uri": uri}})


def test_an_item_says_when_it_was_inserted(live: LiveServer, tmp_path: Path) -> None:
    """Only where the editor can run a command of ours; the daemon hears which choice it was."""
    uri = "file:///project/inserted.py"
    with FakeEditor(
        tmp_path, state_dir=live.settings.state_dir, options={"startDaemon": False}
    ) as editor:
        editor.initialize(workspace={"executeCommand": {}})
        editor.wait_state("ready")
        live.worker.jobs.clear()
        live.worker.script = Script(texts=("return 1", "return 2"), drafts=())
        editor.open(uri, "")
        items = editor.items(uri, 0, 0, INVOKED)
        (job,) = live.worker.jobs
        assert [item["command"]["arguments"] for item in items] == [[job.id, 0], [job.id, 1]]
        live.worker.told.clear()
        command = {name: items[1]["command"][name] for name in ("command", "arguments")}
        assert editor.call("workspace/executeCommand", command) is None
        assert live.worker.told == [(job.id, "inserted", 1, None)]
        # An answer the daemon has forgotten is nobody's problem.
        forgotten = command | {"arguments": ["nobody", 0]}
        assert editor.call("workspace/executeCommand", forgotten) is None
        assert len(live.worker.told) == 1
