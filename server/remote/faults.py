"""What a remote engine says when something is wrong, as errors of ours.

Nothing it says is repeated as it came: it may quote the request, which is source text.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from infilld.engine.errors import InfilldError, Unavailable

_MOST_QUOTED_CHARS = 200
# So many letters and digits in a row that the request has too are source text, not words.
_COPIED_CHARS = 12
# A key with so many of them beside it, as it stands in the request, is quoted, not spoken of.
_BESIDE_CHARS = 6
_TOO_LONG = re.compile(
    r"context.?length|context.?window|context.?size|too.long|too.large|maximum.{0,40}tokens"
    r"|exceeds? .{0,40}(context|tokens|length)|longer than",
    re.IGNORECASE | re.DOTALL,
)


class Unreachable(Exception):
    """No answer that could be used came: nobody listens, or the service is out of order.

    Attributes:
        is_down: nothing else would be answered either. may_retry: at once, with hope.
    """

    def __init__(self, why: str, *, is_down: bool = True, may_retry: bool = True) -> None:
        super().__init__(why)
        self.is_down, self.may_retry = is_down, may_retry


class KeyRefused(Exception):
    """The service wants another key."""


class Refused(Exception):
    """A 4xx: this request cannot be served as it is.

    Attributes:
        status: of the answer. code: of its error; empty: it has none.
        said: the service's own words, short and without source text.
        names: of the optional keys that its words name. is_too_long: the prompt is.
    """

    def __init__(
        self, status: int, code: str, said: str, names: Collection[str], is_too_long: bool
    ) -> None:
        super().__init__(said)
        self.status, self.code, self.said = status, code, said
        self.names, self.is_too_long = names, is_too_long


def refusal(
    status: int, body: bytes, sent: Mapping[str, Any], optional: Collection[str]
) -> Refused:
    """What a 4xx says.

    Args:
        status, body: of the answer. sent: the request. optional: keys that it can do without.
    """
    raw = message_of(body)
    request = _bare(json.dumps(sent, ensure_ascii=False))
    names = [name for name in optional if name in sent and _speaks_of(name, raw, request)]
    # Some say it in a code beside the message.
    is_too_long = bool(_TOO_LONG.search(body.decode("utf-8", errors="replace")))
    return Refused(status, _code(body), quoted(raw, sent), names, is_too_long)


def _speaks_of(name: str, raw: str, request: str) -> bool:
    """Whether words of a service name a key anywhere but in a piece of the request.

    Args:
        name: of the key. raw: the words. request: its letters and digits.
    """
    far, key = 4 * _BESIDE_CHARS, _bare(name)
    for found in re.finditer(rf"(?<!\w){name}(?!\w)", raw):
        before = _bare(raw[max(0, found.start() - far) : found.start()])[-_BESIDE_CHARS:]
        behind = _bare(raw[found.end() : found.end() + far])[:_BESIDE_CHARS]
        is_quoted = (len(before) == _BESIDE_CHARS and before + key in request) or (
            len(behind) == _BESIDE_CHARS and key + behind in request
        )
        if not is_quoted:
            return True
    return False


def quoted(raw: str, sent: Mapping[str, Any]) -> str:
    """Words of a service in one short line, or a note where they repeat what users wrote.

    Args:
        raw: the words. sent: the request that they are about.
    """
    said = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\s]+", " ", raw).strip()[:_MOST_QUOTED_CHARS]
    if not said:
        return "it does not say why"
    # However it is escaped: only letters and digits are compared.
    text, bare = _bare("\n".join(_texts(sent.get("messages", sent)))), _bare(said)
    pieces = (bare[at : at + _COPIED_CHARS] for at in range(len(bare) - _COPIED_CHARS + 1))
    if any(piece in text for piece in pieces):
        return "its words quote the request and are left out"
    return f'it says: "{said}"'


def _bare(text: str) -> str:
    return re.sub(r"\\[nrt]|[\W_]", "", text)


def message_of(body: bytes) -> str:
    """The message of an error body in any of the forms in use, or its text."""
    text = body.decode("utf-8", errors="replace")
    try:
        told = json.loads(text)
    except ValueError:
        return text
    if isinstance(told, dict):
        for key in ("error", "detail", "message"):
            inner = told.get(key)
            if isinstance(inner, dict):
                inner = inner.get("message")
            if isinstance(inner, str):
                return inner
    return text


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return ""


def _texts(sent: object) -> list[str]:
    """What a user wrote, of a request: not its keys."""
    if isinstance(sent, dict):
        return [text for value in sent.values() for text in _texts(value)]
    if isinstance(sent, list):
        return [text for value in sent for text in _texts(value)]
    return [sent] if isinstance(sent, str) else []


def down(url: str, why: str) -> InfilldError:
    """The error of a request while the remote engine does not answer."""
    return Unavailable(
        f"the remote engine at {url} does not answer: {why}",
        remedy="Start it, mend `engine` in the configuration, or set `fail_over = true`.",
    )


def key_refused(url: str) -> InfilldError:
    """The error of a request while the remote engine takes no key of ours."""
    return Unavailable(
        f"the remote engine at {url} refuses the key",
        remedy="Set `engine_key_file` to a file that holds its key.",
    )
