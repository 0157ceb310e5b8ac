"""What every request must pass before the application sees it.

A web page in the user's browser can reach loopback. So the Host header must name this address
(DNS rebinding), an Origin must be our own, bodies must be JSON (a form post needs no preflight),
and everything but `/health` needs the bearer token. No answer carries a CORS header.
"""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infilld.server import problems

BODY_LIMIT_BYTES = 8 << 20
OPEN_PATHS = frozenset({"/health"})


class Refused(Exception):
    """The request is refused: status, code, message, remedy."""

    def __init__(self, status: int, code: str, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.status, self.content = status, problems.body(code, message, remedy)


class ClientLeft(Exception):
    """The connection closed before the body was complete."""


class Guard:
    """Middleware that refuses requests before any of their body is parsed.

    `token` None asks for none.
    """

    def __init__(
        self, app: ASGIApp, *, token: str | None, limit_bytes: int = BODY_LIMIT_BYTES
    ) -> None:
        self._app, self._token, self._limit_bytes = app, token, limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        assert scope["type"] == "http", "the server is started without web sockets"
        try:
            self._check_head(scope)
            if scope["method"] not in ("GET", "HEAD"):
                receive = _replay(await self._read_body(scope, receive), receive)
        except ClientLeft:
            return
        except Refused as refused:
            answer = problems.response(refused.status, refused.content)
            if refused.status == 401:
                answer.headers["WWW-Authenticate"] = "Bearer"
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_head(self, scope: Scope) -> None:
        address, port = scope["server"]
        bound = f"[{address}]" if ":" in address else address
        own = {f"{name}:{port}" for name in ("localhost", "127.0.0.1", "[::1]", bound)}
        hosts = _header(scope, b"host")
        if len(hosts) != 1 or hosts[0].lower() not in own:
            raise Refused(403, "foreign_host", f"Host is {hosts}", f"Use {bound}:{port}.")
        origins = _header(scope, b"origin")
        if any(origin not in {f"http://{name}" for name in own} for origin in origins):
            raise Refused(403, "foreign_origin", f"Origin is {origins}: web pages are not served")
        if scope["path"] not in OPEN_PATHS:
            self._check_token(_header(scope, b"authorization"))

    def _check_token(self, sent: Sequence[str]) -> None:
        if self._token is None:
            return
        wanted = f"Bearer {self._token}".encode()
        if len(sent) != 1 or not hmac.compare_digest(sent[0].encode(), wanted):
            found = "no bearer token" if not sent else "not this daemon's bearer token"
            remedy = "Send the content of the token file; `infilld status` says where it is."
            raise Refused(401, "bad_token", found, remedy)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        kinds = _header(scope, b"content-type")
        kind = kinds[0].partition(";")[0].strip().lower() if len(kinds) == 1 else ""
        if kind != "application/json":
            remedy = "Send Content-Type: application/json."
            raise Refused(415, "not_json", f"Content-Type is {kind or 'absent'}", remedy)
        limit = f"the limit is {self._limit_bytes} bytes"
        too_large = Refused(413, "too_large", limit, "Send a window of the document.")
        declared = _header(scope, b"content-length")
        if declared and int(declared[0]) > self._limit_bytes:
            raise too_large
        chunks: list[bytes] = []
        length_bytes = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            chunks.append(message.get("body", b""))
            length_bytes += len(chunks[-1])
            if length_bytes > self._limit_bytes:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first, then whatever comes."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
