"""One client's connection: what uvicorn leaves open for ever ends here.

A client has `HEAD_S` for the head of a request, and must read some of its answer every `STALL_S`;
else its connection is closed, which cancels its job. What is not HTTP gets an answer in our shape.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Callable
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from infilld.server.http import problems

log = logging.getLogger(__name__)

HEAD_S = 30.0
STALL_S = 30.0
# Below the 1024 descriptors that a process usually has, with room for files.
MOST_CONNECTIONS = 900


class Connection(H11Protocol):
    """As uvicorn's, which does not know how long a client takes; for its `http` setting."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request, or refuse where too many are connected."""
        self._head, self._reader = _Timer(self.loop), _Timer(self.loop)
        self._unsent_bytes = 0
        super().connection_made(transport)
        # It would quote the address with its query; the guard has its own.
        self.access_log = False
        if len(self.connections) > MOST_CONNECTIONS:
            log.warning("refused a connection: %d are open", MOST_CONNECTIONS)
            self._refuse(
                429, "too_many_connections", "too many connections are open", "Close some."
            )
            return
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._head.stop()
        self._reader.stop()

    def pause_writing(self) -> None:
        """The client reads slower than we write; what is streamed waits."""
        super().pause_writing()
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._reader.start(STALL_S, self._look_at_reader)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._reader.stop()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that is idle, or whose next request never becomes one."""
        super().timeout_keep_alive_handler()
        # Closing waits until the last answer is read.
        self._reader.start(STALL_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            self._refuse(
                431,
                "head_too_large",
                "the request's head is too large",
                "Send fewer or shorter headers.",
            )
        else:
            self._refuse(
                400, "bad_http", "this is not HTTP/1.1", "Look into what stands between us."
            )

    def _watch_head(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering or self.transport.is_closing():
            self._head.stop()
        elif not self._head.is_running:
            self._head.start(HEAD_S, self.timeout_keep_alive_handler)

    def _look_at_reader(self) -> None:
        unsent_bytes = self.transport.get_write_buffer_size()
        if unsent_bytes < self._unsent_bytes:
            self._unsent_bytes = unsent_bytes
            self._reader.start(STALL_S, self._look_at_reader)
            return
        log.info("closed a connection: its client read nothing of its answer for %g s", STALL_S)
        self.transport.abort()

    def _refuse(self, status: int, code: str, message: str, remedy: str) -> None:
        """Answer without the application, where an answer can begin, and close."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            told = json.dumps(problems.body(code, message, remedy, status=status)).encode()
            head = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(told)).encode()),
                (b"connection", b"close"),
            ]
            reason = HTTPStatus(status).phrase.encode()
            for event in (
                h11.Response(status_code=status, headers=head, reason=reason),
                h11.Data(data=told),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Timer:
    """Calls once, later, unless it is stopped or started anew."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    @property
    def is_running(self) -> bool:
        return self._handle is not None and self._handle.when() > self._loop.time()

    def start(self, after_s: float, act: Callable[[], None]) -> None:
        self.stop()
        self._handle = self._loop.call_later(after_s, act)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
