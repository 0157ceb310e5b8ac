"""The real worker behind the real socket, on random weights: every route, none of the sense."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import serving
from tiny_infill import tiny_infiller

from infilld.engine import resident
from infilld.engine.worker import Worker
from infilld.server import wire
from infilld.server.client import Client, ServerProblem
from infilld.server.settings import Settings

PIECES = ["a", "é", "\r\n", "\n", "\N{GRINNING FACE}", "    ", "(", "\ufeff"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident, "load_infiller", lambda *wishes: tiny_infiller())
        wanted = Settings(state_dir=tmp_path_factory.mktemp("real") / "state", port=0)
        with (
            serving(wanted, Worker(Path("tiny"))) as found,
            Client(found.url, found.token, timeout_s=60) as made,
        ):
            made.wait_ready(20)
            yield made


def asked(**more: object) -> wire.InfillRequest:
    body = {"text": "x = \n", "spans": [{"start": 4, "end": 4}], "max_tokens": 6, "seed": 1}
    return wire.InfillRequest.model_validate(body | more)


def test_a_seed_gives_the_same_answer_again(client: Client) -> None:
    first, second = client.infill(asked()), client.infill(asked())
    # The end of a cached prompt is added up in another order: the last digits may differ.
    shown = [[span.text for span in reply.choices[0].spans] for reply in (first, second)]
    assert shown[0] == shown[1]
    assert (first.model, first.seed) == ("tiny", 1)
    assert second.usage.cached_tokens > first.usage.cached_tokens == 0
    assert first.timings.total_ms > 0


def test_a_drawn_seed_is_returned(client: Client) -> None:
    drawn = client.infill(asked(seed=None))
    assert client.infill(asked(seed=drawn.seed)).choices == drawn.choices


def test_a_stream_counts_its_canvases(client: Client) -> None:
    *canvases, reply = client.stream(asked(max_tokens=30))
    assert isinstance(reply, wire.InfillReply)
    events = [event for event in canvases if isinstance(event, wire.CanvasEvent)]
    assert [event.seq for event in events] == list(range(len(canvases)))
    assert {event.id for event in events} == {reply.id}
    for before, after in itertools.pairwise(events):
        assert after.spans[0].settled >= before.spans[0].settled or after.revised
    for event in events:
        assert 0 <= event.spans[0].settled <= len(event.spans[0].text)
    same = client.infill(asked(max_tokens=30))
    assert same.choices == reply.choices


def test_a_stream_shows_its_tokens_where_that_is_asked(client: Client) -> None:
    *events, _ = client.stream(asked(max_tokens=12, show_tokens=True))
    for event in events:
        assert isinstance(event, wire.CanvasEvent)
        assert len([each for each in event.tokens if each.span == 0]) == 12
        given = [each for each in event.tokens if each.span is None]
        assert {each.state for each in given} == {"given"}
        # What stands for the end of the document has no text.
        assert "".join(each.text for each in given) == "\n"
    plain = client.stream(asked(max_tokens=12))
    assert not any(event.tokens for event in plain if isinstance(event, wire.CanvasEvent))


def test_closing_the_stream_cancels(client: Client) -> None:
    before = client.stats()["reasons"].get("cancelled", 0)
    stream = client.stream(asked(max_tokens=120))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    until = time.monotonic() + 20
    while client.stats()["reasons"].get("cancelled", 0) == before:
        assert time.monotonic() < until, "never cancelled"
    assert client.stats()["running"] == 0
    assert client.stats()["reasons"]["cancelled"] == before + 1


def test_an_inserted_suggestion_is_followed_up(client: Client) -> None:
    reply = client.infill(asked(document="followed", max_tokens=30))
    assert reply.choices
    before = client.stats()["prefetches"]
    client.feedback(wire.Feedback(id=reply.id, event="shown"))
    assert client.stats()["prefetches"] == before
    client.feedback(wire.Feedback(id=reply.id, event="inserted"))
    assert client.stats()["prefetches"] == before + 1
    with pytest.raises(ServerProblem) as caught:
        client.feedback(wire.Feedback(id="nobody", event="inserted"))
    assert (caught.value.status, caught.value.code) == (404, "unknown_id")


def test_warm_only_encodes(client: Client) -> None:
    reply = client.infill(asked(text="warm = 1\ny = \n", warm=True))
    assert (reply.choices, reply.usage.passes) == ([], 0)
    assert reply.usage.prompt_tokens > 0


def test_what_the_model_cannot_do_is_said(client: Client) -> None:
    with pytest.raises(ServerProblem) as caught:
        client.infill(asked(think=True))
    assert (caught.value.status, caught.value.code) == (400, "unsupported")
    assert caught.value.remedy


@settings(max_examples=25, deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.booleans())
def test_bytes_outside_the_span_stay(
    client: Client, before: str, inside: str, after: str, is_streamed: bool
) -> None:
    start, end = len(before), len(before + inside)
    request = asked(text=before + inside + after, spans=[{"start": start, "end": end}])
    reply = list(client.stream(request))[-1] if is_streamed else client.infill(request)
    assert isinstance(reply, wire.InfillReply)
    for choice in reply.choices:
        (span,) = choice.spans
        assert (span.start, span.end) == (start, end)
        if "\r\n" in request.text and "\n" not in request.text.replace("\r\n", ""):
            assert "\n" not in span.text.replace("\r\n", "")
