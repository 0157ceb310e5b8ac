"""An OpenAI-compatible service: what it is asked over HTTP, and what comes back.

One pool of connections to one address. Redirects are not followed, and neither proxies nor
`.netrc` are looked for: source text goes where `engine` says and nowhere else. Certificates are
judged by the system's own store.
"""

import functools
import json
import logging
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from infilld.server.remote.faults import (
    KeyRefused,
    Refused,
    Unreachable,
    message_of,
    quoted,
    refusal,
)

CONNECT_S = 5.0
# An answer of 8 texts of 4,096 tokens with a line of log-probability each is a tenth of it.
_MOST_BYTES = 32 * 1024 * 1024
_MOST_ERROR_BYTES = 64 * 1024
_MOST_KEY_BYTES = 16 * 1024
_CONNECTIONS = 64

# What a service may not know. One that refuses a request and names it is asked without it.
OPTIONAL = (
    "chat_template_kwargs",
    "stream_options",
    "logprobs",
    "temperature",
    "seed",
)


@dataclass
class Written:
    """One answer as far as it has come.

    Attributes:
        text: of it. thoughts: before it. finish: why it ended; empty: it has not.
        tokens: of the text, each with its log-probability, nats; none where it is not told.
    """

    text: str = ""
    thoughts: str = ""
    finish: str = ""
    tokens: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Replied:
    """The answers to one request, by number, and what they cost."""

    answers: dict[int, Written] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    text_tokens: int = 0


@dataclass(frozen=True)
class Model:
    """A model of the service; `context_tokens` is 0 where it is not told.

    `is_infilld`: it is served by another infilld, which takes an infill as it is.
    """

    name: str
    context_tokens: int = 0
    is_ready: bool = True
    is_infilld: bool = False


class KeyFile:
    """The key to send, read again whenever its file changes; it is never shown.

    Args:
        path: of the file; None: no key is sent.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._seen, self._key = path, (0, 0, 0), ""

    def headers(self) -> dict[str, str]:
        """What tells the service who asks.

        Raises:
            Unreachable: the file cannot be read, or holds no key.
        """
        if self._path is None:
            return {}
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen != self._seen:
                with self._path.open(encoding="ascii") as file:
                    self._key = file.read(_MOST_KEY_BYTES).strip()
                self._seen = seen
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not ASCII"
            raise Unreachable(f"cannot read the key in {self._path}: {why}") from None
        if not self._key or any(c.isspace() or not c.isprintable() for c in self._key):
            raise Unreachable(f"{self._path} does not hold one key")
        return {"Authorization": f"Bearer {self._key}"}


class Service:
    """The service at one address; used on one event loop.

    Args:
        url: base address, with or without `/v1`. key_file: see `KeyFile`.
    """

    def __init__(self, url: str, key_file: Path | None) -> None:
        # It tells of every request: most of a daemon's log, and nothing that is not known.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._base = url.rstrip("/").removesuffix("/v1")
        self._key = KeyFile(key_file)
        self._unknown: set[str] = set()
        self._http = httpx.AsyncClient(
            verify=_trusted(),
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=_CONNECTIONS, keepalive_expiry=30.0),
            follow_redirects=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def models(self, timeout_s: float) -> list[Model]:
        """The models it serves; none where it does not tell.

        Raises:
            Unreachable, KeyRefused.
        """
        try:
            async with aclosing(self._exchange("GET", "/v1/models", None, timeout_s)) as chunks:
                body = b"".join([chunk async for chunk in chunks])
            return [_model(each) for each in json.loads(body)["data"] if each.get("id")]
        except Refused as error:
            if error.status == 404:
                return []
            raise Unreachable(f"/v1/models answers {error.status}: {error.said}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Unreachable("/v1/models does not answer as OpenAI's does") from None

    async def chat(
        self,
        body: dict[str, Any],
        on_text: Callable[[Replied], None] | None,
        silence_s: float | None,
    ) -> Replied:
        """Ask, and read the answers as they are written.

        Args:
            body: of `/v1/chat/completions`, without what says how it is streamed.
            on_text: called after every event with all that has come.
            silence_s: the longest between two pieces of what comes; None: any.

        Raises:
            Unreachable, KeyRefused. Refused: this request, and not for an optional key.
        """
        asked = body | {"stream": True, "stream_options": {"include_usage": True}}
        sent = {name: value for name, value in asked.items() if name not in self._unknown}
        while True:
            try:
                replied = await self._chat(sent, on_text, silence_s)
            except Refused as error:
                if not error.names or error.status not in (400, 422) or error.is_too_long:
                    raise
                sent = {name: value for name, value in sent.items() if name not in error.names}
            else:
                # Before it is taken without them, nothing shows that they were the trouble.
                self._unknown |= asked.keys() - sent.keys()
                return replied

    async def _chat(
        self,
        sent: dict[str, Any],
        on_text: Callable[[Replied], None] | None,
        silence_s: float | None,
    ) -> Replied:
        replied, is_ended = Replied(), False
        async with aclosing(self._lines("/v1/chat/completions", sent, silence_s)) as lines:
            async for line in lines:
                is_ended = _take(line, replied, sent) or is_ended
                if on_text is not None:
                    on_text(replied)
        if not is_ended and not any(each.finish for each in replied.answers.values()):
            raise Unreachable("the answer broke off", is_down=False)
        return replied

    async def infill(
        self,
        sent: dict[str, Any],
        on_canvas: Callable[[dict[str, Any]], None],
        silence_s: float | None,
    ) -> dict[str, Any]:
        """Ask another infilld.

        Args:
            sent: body of `/v1/infill`, streamed. on_canvas: called with the data of each event.
            silence_s: as of `chat`.

        Returns:
            The reply.

        Raises:
            Unreachable, KeyRefused, Refused.
        """
        event = b""
        async with aclosing(self._lines("/v1/infill", sent, silence_s)) as lines:
            async for line in lines:
                name, _, value = line.partition(b":")
                if name == b"event":
                    event = value.strip()
                elif name == b"data":
                    told = _object(value)
                    if event == b"done":
                        return told
                    if event == b"error":
                        raise _failed(value, sent)
                    on_canvas(told)
        raise Unreachable("the answer broke off", is_down=False)

    async def _lines(
        self, path: str, sent: dict[str, Any], silence_s: float | None
    ) -> AsyncGenerator[bytes, None]:
        """The lines of an answer that are not empty."""
        rest = b""
        async with aclosing(self._exchange("POST", path, sent, silence_s)) as chunks:
            async for chunk in chunks:
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield line.strip()
        if rest.strip():
            yield rest.strip()

    async def _exchange(
        self, method: str, path: str, sent: Mapping[str, Any] | None, timeout_s: float | None
    ) -> AsyncGenerator[bytes, None]:
        """The body of a 200, in pieces."""
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        try:
            request = self._http.stream(
                method,
                self._base + path,
                json=sent,
                headers=self._key.headers(),
                timeout=timeout,
            )
            async with request as response:
                if response.status_code != 200:
                    raise await _problem(response, dict(sent or {}))
                size = 0
                async for chunk in response.aiter_bytes():
                    size += len(chunk)
                    if size > _MOST_BYTES:
                        raise Unreachable(
                            f"its answer is longer than {_MOST_BYTES} bytes", is_down=False
                        )
                    yield chunk
        except httpx.TimeoutException as error:
            if isinstance(error, httpx.ConnectTimeout):
                raise Unreachable("the connection takes too long", may_retry=False) from None
            # Others may be answered meanwhile.
            why = f"nothing came for {timeout_s:g} s"
            raise Unreachable(why, is_down=False, may_retry=False) from None
        except httpx.ConnectError as error:
            raise Unreachable(_plain(error) or "no connection") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            # Also what a connection does that was kept too long: the next attempt makes a new one.
            raise Unreachable(
                f"the connection broke ({type(error).__name__})", is_down=False
            ) from None


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The system's own certificates; reading them takes 40 ms or more."""
    return ssl.create_default_context()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        told = json.loads(raw)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise Unreachable("it does not answer as infilld does", is_down=False)
    return told


def _failed(raw: bytes, sent: dict[str, Any]) -> Exception:
    """What an error in a stream of infilld means."""
    refused = refusal(400, raw, sent, ())
    if refused.code in ("busy", "cancelled", "internal", "loading", "model_error", "unavailable"):
        return Unreachable(f"it failed; {refused.said}", is_down=False)
    return refused


def _model(told: Mapping[str, Any]) -> Model:
    state = told.get("state")
    return Model(
        name=str(told["id"]),
        # As vLLM says it, and as another infilld does.
        context_tokens=_whole(told.get("max_model_len")) or _whole(told.get("prompt_tokens")),
        # As another infilld says it; others are not there before they can answer.
        is_ready=state not in ("loading", "failed"),
        is_infilld=told.get("owned_by") == "infilld",
    )


def _plain(error: Exception) -> str:
    """What the system says of a connection: no more than a line."""
    return str(error).partition("\n")[0][:120]


async def _problem(response: httpx.Response, sent: dict[str, Any]) -> Exception:
    """What a status other than 200 means."""
    body = b""
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > _MOST_ERROR_BYTES:
            break
    status = response.status_code
    if status in (401, 403):
        return KeyRefused()
    if status >= 500:
        said = quoted(message_of(body), sent)
        is_down = status in (502, 503, 504)
        return Unreachable(f"it answers {status}; {said}", is_down=is_down)
    if 300 <= status < 400 or status < 200:
        return Unreachable(f"it answers {status}, which is not followed", may_retry=False)
    return refusal(status, body, sent, OPTIONAL)


def _take(line: bytes, replied: Replied, sent: Mapping[str, Any]) -> bool:
    """Add what a line of a stream holds; whether it says that the stream has ended.

    Args:
        line: of the body. replied: gets it. sent: the request, which no error may quote.

    Raises:
        Unreachable: it is no event of a chat, or tells of an error.
    """
    text = line
    if text.startswith(b"data:"):
        text = text.removeprefix(b"data:").strip()
    elif not text.startswith(b"{"):
        # A comment, or the name of an event. What ignores `stream` answers with one object.
        return False
    if text == b"[DONE]":
        return True
    try:
        told = json.loads(text)
        if "error" in told and "choices" not in told:
            said = quoted(_error(told["error"]), sent)
            raise Unreachable(f"it failed; {said}", is_down=False)
        for choice in told.get("choices") or ():
            _add(choice, replied.answers.setdefault(int(choice.get("index", 0)), Written()))
        _count(told.get("usage") or {}, replied)
    except (ValueError, TypeError, AttributeError, LookupError):
        raise Unreachable("it does not answer as OpenAI's API does", is_down=False) from None
    return False


def _error(told: object) -> str:
    return str(told.get("message", "")) if isinstance(told, dict) else str(told)


def _add(choice: Mapping[str, Any], answer: Written) -> None:
    part = choice.get("delta") or choice.get("message") or {}
    answer.text += part.get("content") or ""
    # Both names are in use, and some services send both.
    answer.thoughts += part.get("reasoning_content") or part.get("reasoning") or ""
    answer.finish = choice.get("finish_reason") or answer.finish
    for token in (choice.get("logprobs") or {}).get("content") or ():
        answer.tokens.append((str(token["token"]), float(token["logprob"])))


def _count(usage: Mapping[str, Any], replied: Replied) -> None:
    details = usage.get("prompt_tokens_details") or {}
    replied.prompt_tokens = _whole(usage.get("prompt_tokens")) or replied.prompt_tokens
    replied.cached_tokens = _whole(details.get("cached_tokens")) or replied.cached_tokens
    replied.text_tokens = _whole(usage.get("completion_tokens")) or replied.text_tokens


def _whole(value: object) -> int:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return value if is_count and isinstance(value, int) else 0
