"""A server of OpenAI's protocol without a model, as vLLM answers: scripted by a test.

It listens on loopback in a thread. What it was asked is kept; what it answers is a `Reply`, or a
function of the request's body. `hold()` makes answers wait before each piece, `release()` lets
them go on; `dropped` counts the answers whose reader went away.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn

_WAIT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a request gets.

    Attributes:
        texts: one for each answer. thoughts: before each. finish: of each.
        piece_chars: of each piece of a stream; vLLM sends a canvas of 256 tokens at once.
        nats: log-probability of every token, which is a piece of three characters; of each answer
            its own. None: none are told.
        status, error: of a refusal, whose message it is. asked_before: it comes after so many.
        breaks_off: the connection ends after the first piece.
        holds_after: pieces after which the gate is closed. pause_s: before each piece.
        is_plain: one JSON object whatever was asked. raw: the whole body instead.
    """

    texts: Sequence[str] = ("```\npass\n```",)
    thoughts: str = ""
    finish: str = "stop"
    piece_chars: int = 1000
    nats: Sequence[float] | None = None
    status: int = 200
    error: object = "refused"
    asked_before: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    breaks_off: bool = False
    holds_after: int | None = None
    pause_s: float = 0.0
    is_plain: bool = False
    raw: bytes | None = None


class FakeOpenAI:
    """The server; `with` starts and stops it."""

    def __init__(self, script: Reply | Callable[[dict[str, Any]], Reply] | None = None) -> None:
        self.script: Reply | Callable[[dict[str, Any]], Reply] = script or Reply()
        self.models: list[dict[str, Any]] = [{"id": "diffusion", "object": "model"}]
        self.models_reply: Reply | None = None
        self.key: str | None = None
        self.asked: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.dropped = 0
        self.port = 0
        self._changed = threading.Condition()
        self._is_open = threading.Event()
        self._is_open.set()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeOpenAI":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen, at the port it had before."""
        # Not closed by uvicorn: the next start needs the same port.
        listening = socket.create_server(("127.0.0.1", self.port))
        # asyncio sets it where a socket names its protocol only; without, a stream takes 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            log_config=None,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self._server = server = _Server(config)
        self._thread = threading.Thread(target=lambda: server.run([listening]), daemon=True)
        self._thread.start()
        until = time.monotonic() + _WAIT_S
        while not server.started:
            assert time.monotonic() < until, "the fake server does not start"
            time.sleep(0.002)

    def stop(self) -> None:
        """Stop listening and end every connection."""
        if self._server is None or self._thread is None:
            return
        self.release()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._server = None

    def reset(self, script: Reply) -> None:
        """As new, at the same port."""
        self.release()
        self.script, self.models_reply, self.key = script, None, None
        self.models = [{"id": "diffusion", "object": "model"}]
        self.asked, self.paths, self.dropped = [], [], 0

    def hold(self) -> None:
        self._is_open.clear()

    def release(self) -> None:
        self._is_open.set()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = _WAIT_S) -> None:
        """Wait until what comes in makes the condition true."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "the fake server was never asked"

    def _note(self) -> None:
        with self._changed:
            self._changed.notify_all()

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        self.paths.append(scope["path"])
        told = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self.key is not None and told != f"Bearer {self.key}":
            await _send(send, 401, {"error": {"message": "no such key"}})
        elif scope["path"] == "/v1/models":
            if self.models_reply is not None:
                reply = self.models_reply
                await _send(send, reply.status, {"error": reply.error}, reply.headers)
            else:
                await _send(send, 200, {"object": "list", "data": self.models})
        elif scope["path"] == "/v1/chat/completions":
            body = json.loads(await _body(receive))
            self.asked.append(body)
            self._note()
            reply = self.script(body) if callable(self.script) else self.script
            await self._reply(reply, body, receive, send)
        else:
            await _send(send, 404, {"detail": "Not Found"})

    async def _reply(self, reply: Reply, body: dict[str, Any], receive: Any, send: Any) -> None:
        if reply.status != 200:
            while len(self.asked) < reply.asked_before:
                await asyncio.sleep(0.002)
            await _send(send, reply.status, {"error": {"message": reply.error}}, reply.headers)
            return
        if reply.is_plain:
            await _send(send, 200, _whole(reply))
            return
        kind = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        if reply.raw is not None:
            await send({"type": "http.response.body", "body": reply.raw})
            return
        for number, piece in enumerate(_pieces(reply, body)):
            if number == reply.holds_after:
                self.hold()
            await asyncio.sleep(reply.pause_s)
            if not await self._opened(receive):
                return
            if reply.breaks_off and number == 1:
                raise ConnectionAbortedError
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _opened(self, receive: Any) -> bool:
        """Wait at the gate; False: the reader went away."""
        if self._is_open.is_set():
            return True
        gone = asyncio.ensure_future(receive())
        while not self._is_open.is_set():
            await asyncio.wait({gone}, timeout=0.002)
            if gone.done():
                self.dropped += 1
                self._note()
                return False
        gone.cancel()
        return True


class _Server(uvicorn.Server):
    """It looks often whether it is to stop."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.002)


def _tokens(text: str) -> list[str]:
    return [text[at : at + 3] for at in range(0, len(text), 3)]


def _logs(reply: Reply, number: int, text: str) -> dict[str, Any] | None:
    if reply.nats is None:
        return None
    nats = reply.nats[number]
    return {"content": [{"token": token, "logprob": nats} for token in _tokens(text)]}


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "prompt_tokens": 100,
        "completion_tokens": sum(len(_tokens(text)) for text in reply.texts),
        "prompt_tokens_details": {"cached_tokens": 40},
    }


def _whole(reply: Reply) -> dict[str, Any]:
    return {
        "choices": [
            {
                "index": number,
                "message": {"role": "assistant", "content": text},
                "finish_reason": reply.finish,
                "logprobs": _logs(reply, number, text),
            }
            for number, text in enumerate(reply.texts)
        ],
        "usage": _usage(reply),
    }


def _pieces(reply: Reply, body: dict[str, Any]) -> list[bytes]:
    """The events of a stream, as vLLM sends them."""
    events: list[dict[str, Any]] = []
    size = reply.piece_chars
    for number, text in enumerate(reply.texts):
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        if reply.thoughts:
            deltas.append({"reasoning_content": reply.thoughts})
        deltas += [{"content": text[at : at + size]} for at in range(0, len(text), size)]
        for delta in deltas:
            content = delta.get("content")
            logs = _logs(reply, number, content) if content else None
            events.append({"choices": [{"index": number, "delta": delta, "logprobs": logs}]})
        last = {"index": number, "delta": {}, "finish_reason": reply.finish}
        events.append({"choices": [last]})
    if body.get("stream_options", {}).get("include_usage"):
        events.append({"choices": [], "usage": _usage(reply)})
    return [f"data: {json.dumps(event)}\n\n".encode() for event in events]


async def _body(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return body


async def _send(
    send: Any, status: int, content: object, headers: Mapping[str, str] | None = None
) -> None:
    kind = [(b"content-type", b"application/json")]
    kind += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})
