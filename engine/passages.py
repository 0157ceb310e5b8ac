"""What is filled together: spans of a request, with the text that stays between them.

    before [ span ] between [ span ] after

Pins become part of the text that stays: a span that must start with "self." is a gap behind
"self.", and its result is the pin and the fill.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from infilld.engine.lines import line_end, unix
from infilld.engine.request import InfillRequest, Span


@dataclass(frozen=True, kw_only=True)
class Target:
    """One span that is filled.

    Attributes:
        number: of the span in the request.
        span: what is replaced, in code points of the request's text.
        selection: its text now. start, end: pinned text of the result. draft: text to start from,
            without the pins; None: there is none. All with LF line ends.
        is_suspect: the selection is probably wrong, and nothing else is: it is not started from.
        may_stay: the selection may turn out to be the answer.
    """

    number: int
    span: Span
    selection: str = ""
    start: str = ""
    end: str = ""
    draft: str | None = None
    is_suspect: bool = False
    may_stay: bool = False


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Targets in the order of the document, and the text around them, with LF line ends.

    Attributes:
        before, after: of all. between: what follows each target but the last.
        head: text that follows the last target on the canvas where that is not `after`: the rest
            of a long selection.
    """

    before: str
    targets: tuple[Target, ...]
    between: tuple[str, ...]
    after: str
    head: str | None = None

    def around(self, number: int, fills: Sequence[str]) -> tuple[str, str]:
        """Text before and behind target number `number`.

        Args:
            number: counted from 0. fills: of the targets before it; those behind it hold what
                they hold now.
        """
        before = self.before
        for fill, between in zip(fills[:number], self.between[:number], strict=True):
            before += fill + between
        after = self.after if self.head is None else self.head + self.after
        for target, between in zip(
            reversed(self.targets[number + 1 :]), reversed(self.between[number:]), strict=True
        ):
            after = between + target.selection + after
        return before, after


def targets_of(request: InfillRequest) -> list[Target]:
    """The spans of a request, in the order of the document."""
    pins = {(pin.span, pin.at): unix(pin.text) for pin in request.pins}
    drafts = request.drafts or (None,) * len(request.spans)
    targets = []
    for number, (span, draft) in enumerate(zip(request.spans, drafts, strict=True)):
        start, end = pins.get((number, "start"), ""), pins.get((number, "end"), "")
        inner = None
        if draft is not None:
            # A draft is the whole result; one that lacks a pin is taken for the rest of it.
            inner = unix(draft).removeprefix(start).removesuffix(end)
        # Pins stay: what may change lies between them.
        old = unix(request.text[span.start : span.end])
        selection = old.removeprefix(start)
        selection = selection.removesuffix(end) if end else selection
        targets.append(
            Target(number=number, span=span, selection=selection, start=start, end=end, draft=inner)
        )
    return sorted(targets, key=lambda target: (target.span.start, target.span.end))


def passage_of(text: str, targets: Sequence[Target]) -> Passage:
    """Targets, in the order of the document, as one passage of a request's text."""
    first, last = targets[0], targets[-1]
    between = tuple(
        one.end + unix(text[one.span.end : other.span.start]) + other.start
        for one, other in itertools.pairwise(targets)
    )
    return Passage(
        before=unix(text[: first.span.start]) + first.start,
        targets=tuple(targets),
        between=between,
        after=last.end + unix(text[last.span.end :]),
    )


def composed(
    request: InfillRequest, number: int, pieces: Sequence[tuple[Target, str | None]]
) -> str:
    """New text of a span: of each piece the text with the pins around it, and all else as it is.

    Args:
        request: the span is of. number: of the span.
        pieces: targets in the span, in order, with their texts; None: it stays as it is.
    """
    span, parts = request.spans[number], []
    at = span.start
    for target, text in pieces:
        parts.append(request.text[at : target.span.start])
        if text is None:
            parts.append(request.text[target.span.start : target.span.end])
        else:
            newline = line_end(request.text, target.span.start)
            parts.append(unix(target.start + text + target.end).replace("\n", newline))
        at = target.span.end
    parts.append(request.text[at : span.end])
    return "".join(parts)
