"""Jobs on the event loop: what waits for a reader is bounded, and nothing that matters is lost."""

import asyncio
import json
import logging
from concurrent.futures import Future
from typing import Any

import pytest
from fake_worker import FakeWorker, Script

from infilld.engine.conversation import ChatRequest, ChatUpdate, Message
from infilld.engine.request import CanvasUpdate, DraftSpan, InfillRequest, InfillResult, Span
from infilld.server.jobs import MOST_UNREAD, Jobs

pytestmark = pytest.mark.asyncio

REQUEST = InfillRequest(text="x = ", spans=(Span(4, 4),))


class Eager:
    """A worker whose job shows all its updates before anybody can read one."""

    def __init__(self, updates: list[Any]) -> None:
        self._updates = updates
        self.id = "job-0"
        self.future: Future[InfillResult] = Future()

    def submit(self, request: Any, on_canvas: Any = None) -> "Eager":
        for update in self._updates:
            on_canvas(update)
        self.future.set_result(InfillResult(id="job-0", seed=0, reason="ok", why=""))
        return self

    def cancel(self) -> None:
        pass


async def read(updates: list[Any], request: Any = REQUEST) -> list[Any]:
    jobs = Jobs(Eager(updates))  # type: ignore[arg-type]  # all that is asked of it
    job = jobs.submit(request, route="/", with_updates=True)
    # Two turns of the loop: all of it has been delivered.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    found = [update async for update in job.updates()]
    assert (await job.result()).id == "job-0"
    return found


def canvases(count: int, *revised: int) -> list[CanvasUpdate]:
    return [
        CanvasUpdate(
            seq=seq,
            canvas=0,
            passes=seq + 1,
            spans=(DraftSpan(str(seq), 0),),
            revised=seq in revised,
        )
        for seq in range(count)
    ]


async def test_a_reader_in_time_gets_every_update() -> None:
    updates = canvases(MOST_UNREAD)
    assert await read(updates) == updates


async def test_a_slow_reader_gets_the_newest() -> None:
    updates = canvases(1000)
    assert await read(updates) == updates[-MOST_UNREAD:]


async def test_a_revision_that_nobody_read_is_still_told() -> None:
    found = await read(canvases(1000, 3))
    assert [update.revised for update in found] == [True] + [False] * (MOST_UNREAD - 1)
    found = await read(canvases(1000))
    assert not any(update.revised for update in found)


async def test_a_conversation_s_updates_are_bounded_too() -> None:
    updates = [
        ChatUpdate(seq=i, canvas=0, passes=i, text="", thoughts="", draft=str(i))
        for i in range(100)
    ]
    asked = ChatRequest(messages=(Message("user", "hi"),))
    assert await read(updates, asked) == updates[-MOST_UNREAD:]


@pytest.mark.parametrize("asked_for", [True, False])
async def test_source_text_is_logged_when_asked_for(
    asked_for: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    jobs = Jobs(FakeWorker(Script(texts=["the\nanswer"])), log_prompts=asked_for)
    with jobs.run(REQUEST, route="/v1/infill") as job:
        await job.result()
        await asyncio.sleep(0)
    said = [record.getMessage() for record in caplog.records if record.name.endswith("jobs")]
    if not asked_for:
        assert not said
        return
    assert [line.split(" ")[:3] for line in said] == [
        [job.id, "/v1/infill", "asks"],
        [job.id, "gets", said[1].split(" ")[2]],
    ]
    assert json.loads(said[0].partition("asks ")[2])["text"] == "x = "
    told = json.loads(said[1].partition("gets ")[2])
    assert told["alternatives"][0]["spans"][0]["text"] == "the\nanswer"
