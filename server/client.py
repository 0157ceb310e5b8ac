"""A thin client of the native REST interface, in a blocking and an asynchronous form.

httpx is imported at the first request: the bridge must answer its editor before that.
"""

import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from infilld.server import wire
from infilld.server.discovery import UNIX

if TYPE_CHECKING:
    import httpx

M = TypeVar("M", bound=BaseModel)

CONNECT_S = 5.0
"""Seconds a loopback connection may take before the daemon counts as gone."""


class ServerProblem(Exception):
    """The daemon refused, failed or went away.

    Attributes:
        status: HTTP status; 0 when no answer came.
        code: stable word, such as `loading`, `busy`, `unreachable` or `timeout`.
        message: what was found, what was expected.
        remedy: one sentence on what to do; may be empty.
    """

    def __init__(self, status: int, code: str, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.remedy = status, code, message, remedy


class Client:
    """Blocking client of one daemon.

    `url` is `http://host:port`, or `unix:` and the path of its socket; `token` is empty where the
    daemon asks for none; `timeout_s` bounds each silence, not a whole stream.
    """

    def __init__(self, url: str, token: str, *, timeout_s: float = 120.0) -> None:
        self._options = _Options(url, token, timeout_s)
        self._opened: httpx.Client | None = None

    def infill(self, request: wire.InfillRequest) -> wire.InfillReply:
        """Fill the spans and wait for the answer.

        Raises:
            ServerProblem: the daemon refused, failed or went away.
        """
        return _parse(wire.InfillReply, self._send("POST", "/v1/infill", _body(request, False)))

    def stream(self, request: wire.InfillRequest) -> Iterator[wire.CanvasEvent | wire.InfillReply]:
        """Yield each canvas, then the reply; closing the iterator cancels the job.

        Raises:
            ServerProblem: the daemon refused, failed or went away.
        """
        events = _Events()
        with _translated(), self._http.stream("POST", "/v1/infill", **_body(request, True)) as got:
            if got.status_code != 200:
                got.read()
                raise _problem(got)
            for chunk in got.iter_bytes():
                yield from events.feed(chunk)
        events.finish()

    def feedback(self, told: wire.Feedback) -> None:
        """Say what became of a suggestion.

        Raises:
            ServerProblem: `unknown_id`: the answer is forgotten; or as for `infill`.
        """
        self._send("POST", "/v1/feedback", _json(told), accept=(204,))

    def health(self) -> wire.Health:
        """The daemon's state, whatever it is; needs no token."""
        return _parse(wire.Health, self._send("GET", "/health", {}, accept=(200, 503)))

    def wait_ready(self, timeout_s: float) -> None:
        """Return once the model is loaded.

        Raises:
            ServerProblem: loading failed, or was not done after `timeout_s`.
        """
        until = time.monotonic() + timeout_s
        while (state := self.health().state) != "ready":
            if state == "failed":
                raise _load_failure(self.stats())
            _check_time(until, timeout_s)
            time.sleep(0.05)

    def stats(self) -> dict[str, Any]:
        """Counters of the daemon since it started."""
        return _object(self._send("GET", "/stats", {}))

    def models(self) -> list[dict[str, Any]]:
        """What is loaded, one record a model."""
        return list(_object(self._send("GET", "/v1/models", {}))["data"])

    def recent(self, limit: int) -> dict[str, Any]:
        """The last answers, newest first, and how many have each reason.

        Raises:
            ServerProblem: as for `infill`.
        """
        return _object(self._send("GET", f"/v1/recent?limit={limit}", {}))

    def switch(self, model: str) -> None:
        """Have another model loaded; `models` tells when it is, or `switch_failure`.

        Raises:
            ServerProblem: `busy`: it is switching already; `unsupported`: the engine has no choice
                of models; or as for `infill`.
        """
        self._send("POST", "/v1/model", _json(wire.SwitchRequest(model=model)), accept=(202,))

    def close(self) -> None:
        """Close the connections; harmless twice."""
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _http(self) -> "httpx.Client":
        if self._opened is None:
            import httpx

            transport = httpx.HTTPTransport(verify=False, uds=self._options.socket)
            self._opened = httpx.Client(transport=transport, **self._options.shared())
        return self._opened

    def _send(
        self, method: str, path: str, body: dict[str, Any], accept: tuple[int, ...] = (200,)
    ) -> bytes:
        with _translated():
            got = self._http.request(method, path, **body)
        if got.status_code not in accept:
            raise _problem(got)
        return got.content


class AsyncClient:
    """The same for asyncio; cancelling a call closes its connection, which cancels the job."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 120.0) -> None:
        self._options = _Options(url, token, timeout_s)
        self._opened: httpx.AsyncClient | None = None

    async def infill(self, request: wire.InfillRequest) -> wire.InfillReply:
        """As `Client.infill`."""
        got = await self._send("POST", "/v1/infill", _body(request, False))
        return _parse(wire.InfillReply, got)

    async def stream(
        self, request: wire.InfillRequest
    ) -> AsyncIterator[wire.CanvasEvent | wire.InfillReply]:
        """As `Client.stream`."""
        events = _Events()
        with _translated():
            async with self._http.stream("POST", "/v1/infill", **_body(request, True)) as got:
                if got.status_code != 200:
                    await got.aread()
                    raise _problem(got)
                async for chunk in got.aiter_bytes():
                    for event in events.feed(chunk):
                        yield event
        events.finish()

    async def feedback(self, told: wire.Feedback) -> None:
        """As `Client.feedback`."""
        await self._send("POST", "/v1/feedback", _json(told), accept=(204,))

    async def health(self) -> wire.Health:
        """As `Client.health`."""
        return _parse(wire.Health, await self._send("GET", "/health", {}, accept=(200, 503)))

    async def wait_ready(self, timeout_s: float) -> None:
        """As `Client.wait_ready`."""
        import asyncio

        until = time.monotonic() + timeout_s
        while (state := (await self.health()).state) != "ready":
            if state == "failed":
                raise _load_failure(await self.stats())
            _check_time(until, timeout_s)
            await asyncio.sleep(0.05)

    async def stats(self) -> dict[str, Any]:
        """As `Client.stats`."""
        return _object(await self._send("GET", "/stats", {}))

    async def models(self) -> list[dict[str, Any]]:
        """As `Client.models`."""
        return list(_object(await self._send("GET", "/v1/models", {}))["data"])

    async def close(self) -> None:
        """As `Client.close`."""
        if self._opened is not None:
            await self._opened.aclose()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def _http(self) -> "httpx.AsyncClient":
        if self._opened is None:
            import httpx

            transport = httpx.AsyncHTTPTransport(verify=False, uds=self._options.socket)
            self._opened = httpx.AsyncClient(transport=transport, **self._options.shared())
        return self._opened

    async def _send(
        self, method: str, path: str, body: dict[str, Any], accept: tuple[int, ...] = (200,)
    ) -> bytes:
        with _translated():
            got = await self._http.request(method, path, **body)
        if got.status_code not in accept:
            raise _problem(got)
        return got.content


class _Options:
    def __init__(self, url: str, token: str, timeout_s: float) -> None:
        self._token, self._timeout_s = token, timeout_s
        self.socket = url.removeprefix(UNIX) if url.startswith(UNIX) else None
        self._url = url if self.socket is None else "http://localhost"

    def shared(self) -> dict[str, Any]:
        import httpx

        return {
            "base_url": self._url,
            # A daemon without a token asks for none, and "Bearer " alone is no legal header.
            "headers": {"Authorization": f"Bearer {self._token}"} if self._token else {},
            "timeout": httpx.Timeout(self._timeout_s, connect=CONNECT_S),
            # A proxy of the environment must not see what goes to loopback.
            "trust_env": False,
        }


class _Events:
    """Takes a stream apart; remembers whether the last event has come."""

    def __init__(self) -> None:
        self._rest = b""
        self._is_done = False

    def feed(self, chunk: bytes) -> Iterator[wire.CanvasEvent | wire.InfillReply]:
        # Not by lines of text: str.splitlines breaks at U+2028 and others inside the data.
        *frames, self._rest = (self._rest + chunk).split(b"\n\n")
        for frame in frames:
            fields = dict(line.partition(b": ")[::2] for line in frame.split(b"\n"))
            kind, data = fields.get(b"event"), fields.get(b"data", b"")
            if kind == b"canvas":
                yield _parse(wire.CanvasEvent, data)
            elif kind == b"done":
                self._is_done = True
                yield _parse(wire.InfillReply, data)
            elif kind == b"error":
                error = _parse(wire.ErrorReply, data).error
                raise ServerProblem(200, error.code, error.message, error.remedy)

    def finish(self) -> None:
        if not self._is_done:
            raise ServerProblem(
                0, "cut_off", "the daemon closed the stream before the answer", "Try again."
            )


@contextmanager
def _translated() -> Iterator[None]:
    import httpx

    try:
        yield
    except httpx.TimeoutException as error:
        raise ServerProblem(0, "timeout", f"no answer in time ({error})", "Try again.") from error
    except httpx.HTTPError as error:
        raise ServerProblem(
            0, "unreachable", f"the daemon does not answer: {error}", "Run: infilld status"
        ) from error


def _body(request: wire.InfillRequest, is_streamed: bool) -> dict[str, Any]:
    return _json(request.model_copy(update={"stream": is_streamed}))


def _json(body: wire.InfillRequest | wire.Feedback | wire.SwitchRequest) -> dict[str, Any]:
    return {"content": body.to_json(), "headers": {"Content-Type": "application/json"}}


def _load_failure(stats: dict[str, Any]) -> ServerProblem:
    failure = stats.get("failure") or "the model could not be loaded"
    remedy = "`infilld logs` says what to do; the daemon tries again after `infilld stop`."
    return ServerProblem(500, "model_error", failure, remedy)


def _check_time(until: float, timeout_s: float) -> None:
    if time.monotonic() > until:
        raise ServerProblem(
            503, "loading", f"the model was not loaded after {timeout_s:g} s", "Wait and try again."
        )


def _problem(got: "httpx.Response") -> ServerProblem:
    try:
        error = wire.ErrorReply.model_validate_json(got.content).error
    except ValidationError:
        return ServerProblem(
            got.status_code,
            "not_infilld",
            f"{got.request.url} answered {got.status_code} and not as infilld does",
            "Run: infilld status",
        )
    return ServerProblem(got.status_code, error.code, error.message, error.remedy)


def _parse(model: type[M], data: bytes) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise ServerProblem(
            200, "not_infilld", f"the answer is not a {model.__name__}: {error}", "infilld status"
        ) from error


def _object(data: bytes) -> dict[str, Any]:
    got = json.loads(data)
    if not isinstance(got, dict):
        raise ServerProblem(200, "not_infilld", "the answer is not an object", "infilld status")
    return got
