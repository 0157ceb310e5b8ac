"""What is asked of the engine and what it answers: plain records, no tensors, no HTTP."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from infilld.engine.errors import (
    BadText,
    RequestError,
    SpanOutOfRange,
    SpansOverlap,
    UnknownOption,
)

Reason = Literal[
    "ok",
    "empty",
    "low_confidence",
    "repeats_suffix",
    "repeats_prefix",
    "repetition",
    "unbalanced",
    "does_not_parse",
    "deadline",
    "superseded",
    "filtered",
]


# An hour: longer than anybody waits, and short enough for the arithmetic of clocks.
MAX_DEADLINE_MS = 3_600_000


@dataclass(frozen=True)
class Span:
    """Half-open code-point range `[start, end)` that may change; empty means a gap."""

    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class InfillRequest:
    """One infill or rewrite.

    Attributes:
        text: the document, or a window of it.
        spans: what may change, in code points of `text`.
        document: key under which a newer request supersedes this one; None: nothing does.
        path: file name. language: language identifier. Both are taken for what is to come; no
            prompt or filter reads them yet.
        instruction: what to do with the selected text.
        alternatives: how many different fills are wanted.
        min_tokens: fewest tokens of a fill; None: 0.
        max_tokens: most tokens of a fill; None: chosen from the kind of gap.
        deadline_ms: from arrival; None: no deadline.
        seed: of every random draw; None: drawn and returned.
        warm: only encode the prompt.
    """

    text: str
    spans: tuple[Span, ...]
    document: str | None = None
    path: str | None = None
    language: str | None = None
    instruction: str | None = None
    alternatives: int = 1
    min_tokens: int | None = None
    max_tokens: int | None = None
    deadline_ms: float | None = None
    seed: int | None = None
    warm: bool = False

    def __post_init__(self) -> None:
        """Refuse what no model could serve.

        Raises:
            RequestError: no span; BadText: a lone surrogate; SpanOutOfRange, SpansOverlap;
            UnknownOption: a bound or a count outside its range.
        """
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise BadText(f"lone surrogate at code point {error.start} of text") from None
        if not self.spans:
            raise RequestError("no span to fill", remedy="Give at least one span.")
        for index, span in enumerate(self.spans):
            if not 0 <= span.start <= span.end <= len(self.text):
                raise SpanOutOfRange(
                    f"span {index} is [{span.start}, {span.end}), "
                    f"the text has {len(self.text)} code points"
                )
        _refuse_overlap(self.spans)
        if not 1 <= self.alternatives <= 8:
            raise UnknownOption(f"n is {self.alternatives}", remedy="Ask for 1 to 8 alternatives.")
        low, high = self.min_tokens, self.max_tokens
        if (low is not None and low < 0) or (high is not None and high < 1):
            raise UnknownOption(
                f"min_tokens {low}, max_tokens {high}",
                remedy="min_tokens is 0 or more, max_tokens 1 or more.",
            )
        if low is not None and high is not None and low > high:
            raise UnknownOption(
                f"min_tokens {low} is more than max_tokens {high}", remedy="Swap the two bounds."
            )
        if self.deadline_ms is not None and not 0 < self.deadline_ms <= MAX_DEADLINE_MS:
            raise UnknownOption(
                f"deadline_ms is {self.deadline_ms}",
                remedy=f"Give a deadline above 0 and up to {MAX_DEADLINE_MS} ms.",
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UnknownOption(
                f"seed is {self.seed}", remedy="Give a seed from 0 to 9223372036854775807."
            )


def _refuse_overlap(spans: Sequence[Span]) -> None:
    order = sorted(range(len(spans)), key=lambda i: (spans[i].start, spans[i].end))
    for a, b in itertools.pairwise(order):
        # Two empty spans at one place would have no order between them.
        if spans[b].start < spans[a].end or spans[a] == spans[b]:
            raise SpansOverlap(
                f"span {a} [{spans[a].start}, {spans[a].end}) and "
                f"span {b} [{spans[b].start}, {spans[b].end}) overlap"
            )


@dataclass(frozen=True)
class SpanFill:
    """New text of one span; `start` and `end` are offsets in the request's text.

    `confidence` is the geometric mean probability of the fill's tokens, 0 to 1.
    """

    start: int
    end: int
    text: str
    confidence: float


@dataclass(frozen=True)
class Alternative:
    """One answer for all spans; `score` is the mean causal log-probability of a token, nats."""

    spans: tuple[SpanFill, ...]
    score: float


@dataclass(frozen=True)
class DraftSpan:
    """A span's text as the canvas has it now; the first `settled` code points are final."""

    text: str
    settled: int


@dataclass(frozen=True)
class CanvasUpdate:
    """The hypothesis that is best now.

    Attributes:
        seq: counts updates of this request from 0.
        canvas: counts canvases of a long answer from 0.
        passes: forwards done so far for this request.
        spans: whole draft text of each span.
        revised: a settled prefix was taken back.
    """

    seq: int
    canvas: int
    passes: int
    spans: tuple[DraftSpan, ...]
    revised: bool = False


@dataclass(frozen=True)
class Usage:
    """Tokens and forwards this request cost."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    canvas_tokens: int = 0
    passes: int = 0


@dataclass(frozen=True)
class Timings:
    """Milliseconds of each phase."""

    queue_ms: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class InfillResult:
    """The answer. No alternatives is an answer too: `reason` and `why` say why."""

    id: str
    seed: int
    alternatives: tuple[Alternative, ...] = ()
    reason: Reason = "ok"
    why: str = ""
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
