"""A canvas being refined, shown in the terminal: settled text normal, the rest dim."""

import sys
from collections.abc import Iterator

from infilld.server import wire
from infilld.server.client import ServerProblem

Stream = Iterator[wire.CanvasEvent | wire.InfillReply]


def watch(stream: Stream) -> wire.InfillReply:
    """Show every canvas on stderr and return the reply.

    A terminal shows one canvas that changes in place; anything else gets one line a canvas.
    Several spans stand one after another.
    """
    return _live(stream) if sys.stderr.isatty() else _lines(stream)


def harmless(text: str) -> str:
    """Text of the same length whose control characters cannot command a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _lines(stream: Stream) -> wire.InfillReply:
    for event in stream:
        if isinstance(event, wire.InfillReply):
            return event
        text = " | ".join(repr(span.text) for span in event.spans)
        settled = ",".join(str(span.settled) for span in event.spans)
        sys.stderr.write(f"pass {event.passes}, settled {settled}: {text}\n")
        sys.stderr.flush()
    raise _cut_off()


def _live(stream: Stream) -> wire.InfillReply:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as live:
        for event in stream:
            if isinstance(event, wire.InfillReply):
                return event
            shown = Text()
            for number, span in enumerate(event.spans, start=1):
                if len(event.spans) > 1:
                    head = "" if number == 1 else "\n"
                    shown.append(f"{head}span {number} of {len(event.spans)}\n", style="cyan")
                clean = harmless(span.text)
                shown.append(clean[: span.settled]).append(clean[span.settled :], style="dim")
            shown.append(f"\npass {event.passes}", style="cyan")
            live.update(shown, refresh=True)
    raise _cut_off()


def _cut_off() -> ServerProblem:
    return ServerProblem(0, "cut_off", "the stream ended without an answer", "Try again.")
