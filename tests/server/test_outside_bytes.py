"""Bytes outside the spans are identical, whatever the document and whatever the model writes."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from fake_worker import Script
from hypothesis import example, given, settings
from hypothesis import strategies as st
from live_server import LiveServer, live_server

from infilld.server import cli, wire

PIECES = [
    "a",
    " ",
    "\t",
    "\n",
    "\r\n",
    "\N{GRINNING FACE}",
    "\U0010ffff",
    "e\u0301",
    "\u2028",
    "\x0c",
    "\ufeff",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
BOM = "\ufeff"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("outside") / "state") as running:
        yield running


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents") / "a.py"


def place(text: str) -> str:
    """LINE:COL of the end of a text, counted the slow way."""
    line, column, last = 1, 1, ""
    for character in text:
        if character == "\n" and last == "\r":
            pass  # the same line end
        elif character in "\r\n":
            line, column = line + 1, 1
        else:
            column += 1
        last = character
    return f"{line}:{column}"


@settings(deadline=None)
@given(st.booleans(), TEXTS, TEXTS, TEXTS, TEXTS)
@example(True, "", "", "", "\r\n")
@example(False, "a\r\n", "", "", "b")
@example(False, "x" * 70_000 + "\r\n", "old", "y" * 20_000, "new")
def test_fill_write(
    live: LiveServer, path: Path, has_bom: bool, before: str, inside: str, after: str, new: str
) -> None:
    head = (BOM if has_bom else "").encode()
    if not has_bom and (before + inside + after).startswith(BOM):
        before = "a" + before
    path.write_bytes(head + (before + inside + after).encode())
    live.worker.script = Script(texts=[new], drafts=[])
    span = ["--at", place(before), "--to", place(before + inside)]
    state = ["--state-dir", str(live.settings.state_dir)]
    assert cli.main(["fill", str(path), *span, *state, "--write"]) == 0
    assert path.read_bytes() == head + (before + new + after).encode()
    sent = live.worker.jobs[-1].request
    assert sent.text[sent.spans[0].start : sent.spans[0].end] == inside
    live.worker.jobs.clear()


# What is kept before a span, what the span holds, what is written there.
Part = tuple[str, str, str]
PARTS = st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=2, max_size=5)


def apart(parts: list[Part]) -> list[Part]:
    """The parts with a character between two gaps that would be at one place."""
    made: list[Part] = []
    for kept, inside, new in parts:
        is_twin = bool(made) and not (kept or inside or made[-1][1])
        made.append(("a" if is_twin else kept, inside, new))
    return made


@settings(deadline=None, max_examples=60)
@given(st.booleans(), PARTS, TEXTS, st.randoms(use_true_random=False))
@example(True, [("", "", "\r\n"), ("\r\n", "", "b")], "", Random(0))
@example(False, [("", "a", ""), ("", "b", "new"), ("", "\r\n", "")], "", Random(1))
@example(False, [("x" * 70_000, "old", "1"), ("y" * 90_000, "", "2")], "z" * 20_000, Random(0))
def test_fill_write_several(
    live: LiveServer, path: Path, has_bom: bool, parts: list[Part], end: str, order: Random
) -> None:
    head = (BOM if has_bom else "").encode()
    parts = apart(parts)
    old = "".join(kept + inside for kept, inside, _ in parts) + end
    if not has_bom and old.startswith(BOM):
        parts = [("a" + parts[0][0], *parts[0][1:]), *parts[1:]]
        old = "a" + old
    path.write_bytes(head + old.encode())
    places, at = [], 0
    for kept, inside, new in parts:
        start = at + len(kept)
        at = start + len(inside)
        places.append((start, at, new))
    order.shuffle(places)
    live.worker.script = Script(texts=[[new for _, _, new in places]], drafts=[])
    words = []
    for first, last, _ in places:
        words += ["--at", place(old[:first]), "--to", place(old[:last])]
    state = ["--state-dir", str(live.settings.state_dir)]
    assert cli.main(["fill", str(path), *words, *state, "--write"]) == 0
    expected = "".join(kept + new for kept, _, new in parts) + end
    assert path.read_bytes() == head + expected.encode()
    sent = live.worker.jobs[-1].request
    assert [sent.text[span.start : span.end] for span in sent.spans] == [
        old[first:last] for first, last, _ in places
    ]
    live.worker.jobs.clear()


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS, TEXTS, st.booleans())
def test_rest(
    live: LiveServer, before: str, inside: str, after: str, new: str, is_streamed: bool
) -> None:
    text = before + inside + after
    start, end = len(before), len(before + inside)
    live.worker.script = Script(texts=[new], drafts=[new])
    request = wire.InfillRequest(text=text, spans=[wire.Span(start=start, end=end)])
    with live.client() as client:
        reply = list(client.stream(request))[-1] if is_streamed else client.infill(request)
    assert isinstance(reply, wire.InfillReply)
    span = reply.choices[0].spans[0]
    assert live.worker.jobs[-1].request.text == text
    spliced = text[: span.start] + span.text + text[span.end :]
    assert spliced.encode() == (before + new + after).encode()
    live.worker.jobs.clear()
