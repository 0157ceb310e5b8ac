"""How much of clients' requests is held at once, and how long a body may take.

Every refusal is a 4xx with a remedy. What is counted is given back when the request ends.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import Message, Receive, Scope

from infilld.server.http import problems


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients may ask of the daemon.

    Attributes:
        body_bytes: of one request. bodies_bytes: of all that are open.
        requests: that are open at once.
        silence_s: longest pause within a body. body_s: longest time for a whole body.
    """

    body_bytes: int = 8 << 20
    bodies_bytes: int = 256 << 20
    requests: int = 512
    silence_s: float = 20.0
    body_s: float = 120.0


class Refused(Exception):
    """The request is refused: status, code, message, remedy."""

    def __init__(self, status: int, code: str, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.content = problems.body(code, message, remedy, status=status)


class ClientLeft(Exception):
    """The connection closed before the body was complete."""


class Intake:
    """Counts the open requests and the bytes of their bodies; lives on one event loop."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._requests = 0
        self._bytes = 0

    @contextmanager
    def open(self) -> Iterator["Held"]:
        """Count a request until the block ends.

        Raises:
            Refused: too many are open.
        """
        if self._requests >= self.limits.requests:
            raise Refused(
                429,
                "too_many_requests",
                f"{self._requests} requests are open",
                "Wait for the answers of some of them, then ask again.",
            )
        self._requests += 1
        held = Held(self)
        try:
            yield held
        finally:
            self._requests -= 1
            self._bytes -= held.length_bytes

    def count(self, length_bytes: int) -> None:
        """Count bytes of a body.

        Raises:
            Refused: the bodies of all open requests are too large together.
        """
        if self._bytes + length_bytes > self.limits.bodies_bytes:
            raise Refused(
                429,
                "too_many_bytes",
                f"open requests hold {self._bytes} bytes, the limit is {self.limits.bodies_bytes}",
                "Wait for the answers of some of them, or send windows of the documents.",
            )
        self._bytes += length_bytes


class Held:
    """What one request holds."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self.length_bytes = 0

    async def body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            Refused: it is not JSON, too large, or takes too long. ClientLeft: it never came.
        """
        limits = self._intake.limits
        self._check_head(scope)
        chunks: list[bytes] = []
        until_s = asyncio.get_running_loop().time() + limits.body_s
        while True:
            message = await _next(receive, limits.silence_s, until_s)
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunk = message.get("body", b"")
            if self.length_bytes + len(chunk) > limits.body_bytes:
                raise _too_large(limits)
            self._intake.count(len(chunk))
            self.length_bytes += len(chunk)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _check_head(self, scope: Scope) -> None:
        lengths = header(scope, b"content-length")
        is_chunked = bool(header(scope, b"transfer-encoding"))
        if is_chunked and lengths:
            # Two programs on the way may each believe another of the two.
            raise Refused(
                400,
                "bad_framing",
                "both Content-Length and Transfer-Encoding are given",
                "Send one of them.",
            )
        if lengths and not (len(lengths) == 1 and lengths[0].isascii() and lengths[0].isdigit()):
            raise Refused(
                400, "bad_framing", "Content-Length is not one number", "Send the body's bytes."
            )
        length_bytes = int(lengths[0]) if lengths else 0
        # Some clients ask without a body, and then name no type.
        if length_bytes or is_chunked or header(scope, b"content-type"):
            _check_type(scope)
        if length_bytes > self._intake.limits.body_bytes:
            raise _too_large(self._intake.limits)


def header(scope: Scope, name: bytes) -> Sequence[str]:
    """Every value of a header; `name` in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first, then whatever comes."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


async def _next(receive: Receive, silence_s: float, until_s: float) -> Message:
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout_at(min(until_s, loop.time() + silence_s)):
            return await receive()
    except TimeoutError:
        raise Refused(
            408, "body_timeout", "the body did not come in time", "Send it without long pauses."
        ) from None


def _check_type(scope: Scope) -> None:
    kinds = header(scope, b"content-type")
    kind = kinds[0].partition(";")[0].strip().lower() if len(kinds) == 1 else ""
    if kind != "application/json":
        raise Refused(
            415,
            "not_json",
            f"Content-Type is {problems.short(kind) or 'absent'}",
            "Send Content-Type: application/json.",
        )


def _too_large(limits: Limits) -> Refused:
    return Refused(
        413,
        "too_large",
        f"the limit is {limits.body_bytes} bytes",
        "Send a window of the document.",
    )
