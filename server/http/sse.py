"""Framing of server-sent events."""

import json
from collections.abc import Mapping

MEDIA_TYPE = "text/event-stream"
HEADERS: Mapping[str, str] = {"Cache-Control": "no-store"}


# What ends a stream of OpenAI's.
DONE = b"data: [DONE]\n\n"


def frame(event: str, data: Mapping[str, object]) -> bytes:
    """One event on the wire.

    The data is one line of ASCII: readers that split text at U+2028 or U+0085 would otherwise cut
    it in two.
    """
    return f"event: {event}\n".encode("ascii") + unnamed(data)


def unnamed(data: Mapping[str, object]) -> bytes:
    """An event without a name, as OpenAI's streams have them."""
    return f"data: {json.dumps(data)}\n\n".encode("ascii")
