"""What every request must pass before the application sees it.

A web page in the user's browser can reach loopback. So the Host header must name this address
(DNS rebinding), an Origin must be our own, what browsers say of a request's origin must agree,
bodies must be JSON (a form post needs no preflight), and everything but `OPEN_PATHS` needs the
bearer token. No answer carries a CORS header.
"""

import hmac
import logging
import time
from collections.abc import Collection, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infilld.server.http import problems
from infilld.server.http.bodies import ClientLeft, Held, Intake, Limits, Refused, header, replay
from infilld.server.process.token import TokenFile, TokenProblem

log = logging.getLogger(__name__)

PAGE_PATH = "/"
"""A link elsewhere may lead here; the page asks for the token itself."""
OPEN_PATHS = frozenset({"/health", PAGE_PATH})
"""Served without the token; nothing there tells anything about a user."""
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HEAD_BYTES = 1 << 16
_WITHOUT_BODY = frozenset({"GET", "HEAD", "OPTIONS"})
_TOKEN_REMEDY = "Send the content of the token file; `infilld status` says where it is."
# Browsers are not to guess types, nor to lend our answers to other pages.
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """Middleware that refuses requests before any of their body is parsed.

    Args:
        token: what clients must send; None asks for none.
        allowed_hosts: Host headers that are taken beside this machine's own; one without a port
            stands for every port.
        limits: what clients may ask at once.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: TokenFile | str | None,
        allowed_hosts: Collection[str] = (),
        limits: Limits | None = None,
    ) -> None:
        self._app, self._token, self._allowed = app, token, frozenset(allowed_hosts)
        self._intake = Intake(limits or Limits())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        assert scope["type"] == "http", "the server is started without web sockets"
        answer = _Answer(scope, send)
        try:
            await self._serve(scope, receive, answer)
        except ClientLeft:
            return
        except Refused as refused:
            await _refuse(refused, scope, receive, answer)
        except Exception as error:
            # Not left to the server below, which would name neither the method nor the route.
            log.error("%s failed", answer.name, exc_info=error)
            if answer.status is None:
                told = problems.response(500, problems.INTERNAL, path=scope["path"])
                await told(scope, receive, answer)
        finally:
            log.debug("%s %s in %.1f ms", answer.name, answer.status, answer.age_ms())

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_head(scope)
        if scope["path"] in OPEN_PATHS and scope["method"] in _WITHOUT_BODY:
            # Not counted: who asks whether we are full is to get an answer.
            await self._app(scope, receive, send)
            return
        with self._intake.open() as held:
            await self._app(scope, await _received(scope, receive, held), send)

    def _check_head(self, scope: Scope) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _HEAD_BYTES:
            raise Refused(
                431,
                "head_too_large",
                f"the headers are longer than {_HEAD_BYTES} bytes",
                "Send fewer or shorter headers.",
            )
        hosts = header(scope, b"host")
        if len(hosts) != 1 or not is_own_host(hosts[0], scope, self._allowed):
            raise Refused(
                403,
                "foreign_host",
                f"Host is {_shown(hosts)}",
                f"Use {_address(scope)}. Other names are let in by the setting allowed_hosts.",
            )
        origins = header(scope, b"origin")
        if not all(_is_own_origin(origin, hosts[0], self._allowed) for origin in origins):
            raise Refused(
                403,
                "foreign_origin",
                f"Origin is {_shown(origins)}: pages of others are not served",
                "Ask from a program, or from the page at GET / here.",
            )
        if _is_from_elsewhere(scope):
            raise Refused(
                403,
                "foreign_origin",
                "the browser says that another site asks: pages of others are not served",
                "Ask from a program, or from the page at GET / here.",
            )
        if scope["path"] not in OPEN_PATHS:
            self._check_token(header(scope, b"authorization"))

    def _check_token(self, sent: Sequence[str]) -> None:
        if self._token is None:
            return
        try:
            wanted = self._token if isinstance(self._token, str) else self._token.current()
        except TokenProblem as problem:
            raise Refused(401, "bad_token", str(problem), problem.remedy) from None
        scheme, _, given = sent[0].partition(" ") if len(sent) == 1 else ("", "", "")
        is_right = hmac.compare_digest(given.strip(" ").encode(), wanted.encode())
        if not is_right or scheme.lower() != "bearer":
            found = "no bearer token" if not sent else "not this daemon's bearer token"
            raise Refused(401, "bad_token", found, _TOKEN_REMEDY)


def is_own_host(host: str, scope: Scope, allowed: Collection[str]) -> bool:
    """Whether a Host header names the place at which a request arrived.

    Names are `localhost` and what is allowed; else only the address itself counts, which no
    foreign name server can hand out. A Unix socket has no port: whoever forwards one has its own.
    """
    name, port = _split(host.lower())
    if f"{name}:{port}" in allowed or name in allowed:
        return True
    address, own_port = scope["server"]
    if own_port is None:
        return name in _LOCAL_NAMES
    if (port or "80") != str(own_port):
        return False
    return name in _LOCAL_NAMES or (
        (literal := _literal(name)) is not None and literal == _literal(address)
    )


def _is_own_origin(origin: str, host: str, allowed: Collection[str]) -> bool:
    scheme, _, site = origin.lower().partition("://")
    if site in allowed or (site == host.lower() and _split(site)[0] in allowed):
        return scheme in ("http", "https")
    return scheme == "http" and site == host.lower()


def _is_from_elsewhere(scope: Scope) -> bool:
    """Whether a browser says that another site's page asks; following a link to our page is fine.

    Source: Fetch Metadata Request Headers, W3C.
    """
    sites = set(header(scope, b"sec-fetch-site"))
    is_link = (
        header(scope, b"sec-fetch-mode") == ["navigate"]
        and header(scope, b"sec-fetch-dest") == ["document"]
        and (scope["method"], scope["path"]) == ("GET", PAGE_PATH)
    )
    # A page of another port of this machine is "same-site".
    return not sites <= {"same-origin", "none"} and not is_link


async def _received(scope: Scope, receive: Receive, held: Held) -> Receive:
    if scope["method"] in _WITHOUT_BODY:
        return receive
    return replay(await held.body(scope, receive), receive)


async def _refuse(refused: Refused, scope: Scope, receive: Receive, send: Send) -> None:
    answer = problems.response(refused.status, refused.content, path=scope["path"])
    if refused.status == 401:
        answer.headers["WWW-Authenticate"] = "Bearer"
    if refused.status in (400, 408, 431):
        # Where this request ends is not known.
        answer.headers["Connection"] = "close"
    await answer(scope, receive, send)


class _Answer:
    """Sends an answer with our headers, and knows what became of it."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._began_s = time.monotonic()
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = dict(message.get("headers", ()))
            missing = [pair for pair in _HEADERS if pair[0] not in headers]
            message["headers"] = [*message.get("headers", ()), *missing]
        await self._send(message)

    @property
    def name(self) -> str:
        """Method and route: neither the address nor the query, which a client could fill."""
        route = getattr(self._scope.get("route"), "path", "(no route)")
        return f"{self._scope['method']} {route}"

    def age_ms(self) -> float:
        return (time.monotonic() - self._began_s) * 1000


def _address(scope: Scope) -> str:
    address, port = scope["server"]
    if port is None:
        return "localhost"
    literal = _literal(address)
    return f"[{literal}]:{port}" if isinstance(literal, IPv6Address) else f"{literal}:{port}"


def _split(host: str) -> tuple[str, str]:
    """Name and port of a Host header; the port is empty where there is none."""
    name, colon, port = host.rpartition(":")
    is_port = bool(colon) and port.isascii() and port.isdigit()
    return (name, port) if is_port else (host, "")


def _literal(name: str) -> IPv4Address | IPv6Address | None:
    """The address that is written, without its zone; None for a name."""
    try:
        found = ip_address(name.removeprefix("[").removesuffix("]").partition("%")[0])
    except ValueError:
        return None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def _shown(values: Sequence[str]) -> str:
    return ", ".join(repr(problems.short(value)) for value in values) or "absent"
