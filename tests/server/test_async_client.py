import asyncio
import subprocess
import sys

import pytest
from fake_worker import Script
from live_server import LiveServer

from infilld.server import wire
from infilld.server.client import AsyncClient, Client, ServerProblem

REQUEST = wire.InfillRequest(text="a", spans=[wire.Span(start=1, end=1)])


@pytest.mark.asyncio
async def test_every_call(server: LiveServer) -> None:
    async with AsyncClient(server.url, server.token) as client:
        await client.wait_ready(5)
        assert (await client.infill(REQUEST)).reason == "ok"
        events = [event async for event in client.stream(REQUEST)]
        assert [type(event) for event in events] == [wire.CanvasEvent] * 2 + [wire.InfillReply]
        assert (await client.stats())["live_jobs"] == 0
        assert (await client.models())[0]["id"] == "fake"


@pytest.mark.asyncio
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_cancelling_a_call_cancels_the_job(server: LiveServer, is_streamed: bool) -> None:
    server.worker.hold()
    async with AsyncClient(server.url, server.token) as client:

        async def call() -> None:
            if is_streamed:
                async for _ in client.stream(REQUEST):
                    pass
            else:
                await client.infill(REQUEST)

        task = asyncio.create_task(call())
        await asyncio.to_thread(server.worker.wait_for, lambda: len(server.worker.jobs) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        cancelled = server.worker.stats
        await asyncio.to_thread(server.worker.wait_for, lambda: cancelled()["cancelled"] == 1)


@pytest.mark.asyncio
async def test_a_stream_that_is_refused(server: LiveServer) -> None:
    async with AsyncClient(server.url, "wrong") as client:
        with pytest.raises(ServerProblem) as caught:
            async for _ in client.stream(REQUEST):
                pass
    assert (caught.value.status, caught.value.code) == (401, "bad_token")


def test_nobody_there_is_said(server: LiveServer) -> None:
    with Client("http://127.0.0.1:1", "") as client, pytest.raises(ServerProblem) as caught:
        client.infill(REQUEST)
    assert (caught.value.status, caught.value.code) == (0, "unreachable")


def test_silence_becomes_a_timeout_and_cancels(server: LiveServer) -> None:
    server.worker.hold()
    with server.client(timeout_s=0.2) as client, pytest.raises(ServerProblem) as caught:
        client.infill(REQUEST)
    assert caught.value.code == "timeout"
    server.worker.wait_for(lambda: server.worker.stats()["cancelled"] == 1)


def test_many_calls_on_one_client(server: LiveServer) -> None:
    server.worker.script = Script(drafts=[])
    with server.client() as client:
        assert [client.infill(REQUEST).id for _ in range(20)] == [f"job-{i}" for i in range(20)]


def test_the_client_is_light() -> None:
    code = """
import sys
from infilld.server import client, discovery, settings, wire
client.Client("http://127.0.0.1:1", ""), client.AsyncClient("http://127.0.0.1:1", "")
heavy = {"httpx", "torch", "numpy", "fastapi", "uvicorn", "infilld.engine"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
