"""`infilld fill`: infills, rewrites and repairs of a document, through the daemon."""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infilld.server import discovery, wire
from infilld.server.client import Client, ServerProblem
from infilld.server.settings import Problem, Settings
from infilld.server.verbs import material
from infilld.server.verbs.document import Document, PositionProblem, Window
from infilld.server.verbs.flags import share, warn_of_vain_flags, whole
from infilld.server.verbs.watch import harmless, watch

START_S = 60.0
LOAD_S = 600.0
NO_SUGGESTION = 3


class UsageProblem(Problem):
    """Flags that do not go together."""

    code = "usage"


Place = tuple[int, int]
"""Line and column, both from 1."""
Offsets = tuple[int, int]
"""`[start, end)` in code points of the document."""


def position(text: str) -> Place:
    """`LINE:COL` as two numbers, for argparse."""
    line, _, column = text.partition(":")
    if not (line.isascii() and line.isdigit() and column.isascii() and column.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not LINE:COL, such as 12:5")
    return int(line), int(column)


def gap_or_range(text: str) -> tuple[Place, Place | None]:
    """`LINE:COL` or `LINE:COL-LINE:COL`, for argparse."""
    start, dash, end = text.partition("-")
    return position(start), position(end) if dash else None


def full_range(text: str) -> tuple[Place, Place | None]:
    """`LINE:COL-LINE:COL`, for argparse."""
    start, _, end = text.partition("-")
    if not end:
        raise argparse.ArgumentTypeError(f"{text!r} is not LINE:COL-LINE:COL, such as 12:5-12:9")
    return position(start), position(end)


class _At(argparse.Action):
    """Adds a span to those before it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), values])


class _To(argparse.Action):
    """Gives the span before it an end."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        *others, last = getattr(namespace, self.dest) or [None]
        if last is None:
            raise argparse.ArgumentError(self, "belongs behind the --at of its span")
        if last[1] is not None:
            raise argparse.ArgumentError(self, "the span before it has an end already")
        setattr(namespace, self.dest, [*others, (last[0], values)])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("file", metavar="FILE", type=Path, help="the document")
    parser.add_argument(
        "--at",
        metavar="LINE:COL[-LINE:COL]",
        dest="spans",
        action=_At,
        type=gap_or_range,
        required=True,
        help="a gap, or what is replaced; again for further spans",
    )
    parser.add_argument(
        "--to",
        metavar="LINE:COL",
        dest="spans",
        action=_To,
        type=position,
        help="end of what the --at before it replaces",
    )
    parser.add_argument("--instruction", metavar="T", help="what to do with the selected text")
    for name, help_text in (
        ("--starts-with", "text the result starts with"),
        ("--ends-with", "text the result ends with"),
        ("--draft", "text to start from"),
    ):
        parser.add_argument(
            name,
            metavar="T",
            action="append",
            default=[],
            help=f"{help_text}; with several spans once for each, '' for none",
        )
    parser.add_argument(
        "--context",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        help="another file that helps; again for further files",
    )
    parser.add_argument(
        "--repair",
        metavar="LINE:COL-LINE:COL",
        nargs="*",
        action="extend",
        type=full_range,
        help="repair the selected text: these ranges of it, or without any what looks wrong",
    )
    parser.add_argument(
        "--think", action="store_true", help="let the model reason before it writes"
    )
    parser.add_argument(
        "--boldness",
        type=share(),
        metavar="X",
        help="from 0, only what is nearly certain, to 1, whatever is not broken",
    )
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
        Problem, ServerProblem: the flags, a document or the daemon stands in the way.
    """
    _refuse_misfits(options)
    document = Document.read(options.file)
    spans = _offsets(document, options.spans, "--to lies before --at")
    _refuse_overlap(options, spans)
    # One text from the first span to the last, however far they are apart.
    window = document.window(min(start for start, _ in spans), max(end for _, end in spans))
    request = _request(options, document, spans, window)
    warn_of_vain_flags(options, settings)
    daemon = discovery.ensure(settings, START_S)
    with Client(daemon.url, daemon.token) as client:
        client.wait_ready(LOAD_S)
        reply = watch(client.stream(request)) if options.watch else client.infill(request)
    reply = _moved(reply, window.at)
    _refuse_other_spans(reply, spans)
    if options.json:
        sys.stdout.write(json.dumps(reply.model_dump(), indent=2) + "\n")
    if not reply.choices:
        sys.stderr.write(f"infilld: no suggestion ({reply.reason}): {reply.why}\n")
        return NO_SUGGESTION
    texts = [[span.text for span in choice.spans] for choice in reply.choices]
    if options.write:
        changes = [(*span, text) for span, text in zip(spans, texts[0], strict=True)]
        document.write(document.replaced(changes))
    if not options.json:
        _show(texts)
    return 0


def _refuse_misfits(options: argparse.Namespace) -> None:
    count = len(options.spans)
    for name in ("starts_with", "ends_with", "draft"):
        given = len(getattr(options, name))
        if given not in (0, count):
            flag = f"--{name.replace('_', '-')}"
            raise UsageProblem(
                f"{flag} is given {given} times for {count} spans",
                remedy=f"Give {flag} once for each --at, in the same order; '' means none.",
            )
    if options.repair is not None and any(end is None for _, end in options.spans):
        raise UsageProblem(
            "--repair needs selected text",
            remedy="Give each --at a --to behind the text to repair.",
        )


def _offsets(
    document: Document, ranges: Sequence[tuple[Place, Place | None]], if_reversed: str
) -> list[Offsets]:
    found = []
    for first, last in ranges:
        start = document.offset(*first)
        end = start if last is None else document.offset(*last)
        if end < start:
            raise PositionProblem(if_reversed, remedy="Swap the two.")
        found.append((start, end))
    return found


def _refuse_overlap(options: argparse.Namespace, spans: Sequence[Offsets]) -> None:
    order = sorted(range(len(spans)), key=lambda i: spans[i])
    for a, b in itertools.pairwise(order):
        if spans[b][0] < spans[a][1] or spans[a] == spans[b]:
            one, other = (":".join(map(str, options.spans[i][0])) for i in (a, b))
            raise PositionProblem(
                f"the spans at {one} and {other} overlap", remedy="Give each text to one span."
            )


def _request(
    options: argparse.Namespace, document: Document, spans: Sequence[Offsets], window: Window
) -> wire.InfillRequest:
    def in_window(ranges: Sequence[Offsets]) -> list[wire.Span]:
        return [wire.Span(start=start - window.at, end=end - window.at) for start, end in ranges]

    repair = options.repair
    if repair is not None:
        repair = in_window(_offsets(document, repair, "a range of --repair ends before it starts"))
    return wire.InfillRequest(
        text=window.text,
        spans=in_window(spans),
        path=material.shown(options.file),
        instruction=_readable("--instruction", options.instruction),
        context=[material.read(path) for path in options.context] or None,
        pins=_pins(options) or None,
        draft=[_readable("--draft", text) or None for text in options.draft] or None,
        repair=repair,
        n=options.n,
        boldness=options.boldness,
        seed=options.seed,
        deadline_ms=options.deadline_ms,
        think=options.think,
    )


def _pins(options: argparse.Namespace) -> list[wire.Pin]:
    given = (
        ("start", "--starts-with", options.starts_with),
        ("end", "--ends-with", options.ends_with),
    )
    return [
        wire.Pin.model_validate({"span": number, "at": at, "text": _readable(flag, text)})
        for at, flag, texts in given
        for number, text in enumerate(texts)
        if text
    ]


def _readable(flag: str, text: str | None) -> str | None:
    """The text of a flag; the shell may hand over bytes that are none."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise UsageProblem(f"{flag} is not UTF-8", remedy="Give it as text.") from None
    return text


def _refuse_other_spans(reply: wire.InfillReply, spans: Sequence[Offsets]) -> None:
    # What is written goes where it was asked for, or nowhere.
    for choice in reply.choices:
        if [(span.start, span.end) for span in choice.spans] != list(spans):
            raise ServerProblem(
                200, "not_infilld", "the answer is for other spans", "Run: infilld status"
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


def _show(answers: list[list[str]]) -> None:
    """Print one text as it is, or several with a line above each."""
    is_terminal = sys.stdout.isatty()
    is_one = len(answers) == len(answers[0]) == 1
    for number, texts in enumerate(answers, start=1):
        for place, text in enumerate(texts, start=1):
            names = [f"{number} of {len(answers)}"] if len(answers) > 1 else []
            names += [f"span {place} of {len(texts)}"] if len(texts) > 1 else []
            head = "" if is_one else f"--- {', '.join(names)}\n"
            tail = "\n" if not is_one or (is_terminal and not text.endswith("\n")) else ""
            # A terminal is shown no commands; what is piped away is exact, to the byte.
            shown = harmless(text.replace("\r\n", "\n")) if is_terminal else text
            sys.stdout.flush()
            sys.stdout.buffer.write(f"{head}{shown}{tail}".encode())
    sys.stdout.flush()
