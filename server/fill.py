"""`infilld fill`: one infill or rewrite of a document, through the daemon."""

import argparse
import json
import os
import sys
from pathlib import Path

from infilld.server import discovery, wire
from infilld.server.client import Client
from infilld.server.document import Document, PositionProblem, Window
from infilld.server.flags import whole
from infilld.server.settings import Settings
from infilld.server.watch import harmless, watch

START_S = 60.0
LOAD_S = 600.0
NO_SUGGESTION = 3


def position(text: str) -> tuple[int, int]:
    """`LINE:COL` as two numbers, for argparse."""
    line, _, column = text.partition(":")
    if not (line.isascii() and line.isdigit() and column.isascii() and column.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not LINE:COL, such as 12:5")
    return int(line), int(column)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("file", metavar="FILE", type=Path, help="the document")
    parser.add_argument(
        "--at", metavar="LINE:COL", type=position, required=True, help="the gap, or where it starts"
    )
    parser.add_argument("--to", metavar="LINE:COL", type=position, help="end of what is replaced")
    parser.add_argument("--instruction", metavar="T", help="what to do with the selected text")
    parser.add_argument("-n", type=whole(1, 8), default=1, metavar="N", help="answers")
    parser.add_argument(
        "--seed", type=whole(0, wire.MAX_SEED), metavar="N", help="of every random draw"
    )
    parser.add_argument(
        "--deadline-ms",
        type=whole(1, wire.MAX_DEADLINE_MS),
        metavar="N",
        help="show what is certain by then",
    )
    parser.add_argument("--watch", action="store_true", help="show the canvas being refined")
    parser.add_argument("--json", action="store_true", help="print the whole reply")
    parser.add_argument("--write", action="store_true", help="change the document")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Do it; returns the exit code.

    Raises:
        Problem, ServerProblem: the document or the daemon stands in the way.
    """
    document = Document.read(options.file)
    start, end = _span(document, options)
    window = document.window(start, end)
    request = _request(options, window)
    _warn_of_vain_flags(options, settings)
    daemon = discovery.ensure(settings, START_S)
    with Client(daemon.url, daemon.token) as client:
        client.wait_ready(LOAD_S)
        reply = watch(client.stream(request)) if options.watch else client.infill(request)
    if options.json:
        sys.stdout.write(json.dumps(_moved(reply, window.at).model_dump(), indent=2) + "\n")
    if not reply.choices:
        sys.stderr.write(f"infilld: no suggestion ({reply.reason}): {reply.why}\n")
        return NO_SUGGESTION
    texts = [choice.spans[0].text for choice in reply.choices]
    if options.write:
        document.write(document.replaced(start, end, texts[0]))
    if not options.json:
        _show(texts)
    return 0


def _span(document: Document, options: argparse.Namespace) -> tuple[int, int]:
    start = document.offset(*options.at)
    end = start if options.to is None else document.offset(*options.to)
    if end < start:
        raise PositionProblem("--to lies before --at", remedy="Swap the two.")
    return start, end


def _request(options: argparse.Namespace, window: Window) -> wire.InfillRequest:
    return wire.InfillRequest(
        text=window.text,
        spans=[wire.Span(start=window.start, end=window.end)],
        path=os.fsencode(options.file).decode(errors="replace"),
        instruction=options.instruction,
        n=options.n,
        seed=options.seed,
        deadline_ms=options.deadline_ms,
    )


def _warn_of_vain_flags(options: argparse.Namespace, settings: Settings) -> None:
    names = ("model", "device", "host", "port", "auth", "log_level")
    vain = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    pid = discovery.running_pid(settings) if vain else None
    if pid is not None:
        sys.stderr.write(
            f"infilld: {', '.join(vain)} counts when the daemon starts, and one runs already "
            f"(pid {pid}); `infilld stop` ends it\n"
        )


def _moved(reply: wire.InfillReply, by: int) -> wire.InfillReply:
    """The reply with offsets of the whole document instead of the window."""
    if not by:
        return reply
    choices = [
        choice.model_copy(
            update={
                "spans": [
                    span.model_copy(update={"start": span.start + by, "end": span.end + by})
                    for span in choice.spans
                ]
            }
        )
        for choice in reply.choices
    ]
    return reply.model_copy(update={"choices": choices})


def _show(texts: list[str]) -> None:
    """Print one text as it is, or several with a line above each."""
    is_terminal = sys.stdout.isatty()
    for number, text in enumerate(texts, start=1):
        head = f"--- {number} of {len(texts)}\n" if len(texts) > 1 else ""
        tail = "\n" if len(texts) > 1 or (is_terminal and not text.endswith("\n")) else ""
        # A terminal is shown no commands; what is piped away is exact, to the byte.
        shown = harmless(text.replace("\r\n", "\n")) if is_terminal else text
        sys.stdout.flush()
        sys.stdout.buffer.write(f"{head}{shown}{tail}".encode())
    sys.stdout.flush()
