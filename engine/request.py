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


ContextKind = Literal["open", "recent", "definition", "diagnostic", "clipboard"]

# An hour: longer than anybody waits, and short enough for the arithmetic of clocks.
MAX_DEADLINE_MS = 3_600_000
MAX_ALTERNATIVES = 8
# More gaps than anybody sees at once; each costs a place on a canvas.
MAX_SPANS = 64


def refuse_lone_surrogates(text: str, name: str) -> None:
    """Refuse a text that cannot be encoded.

    Raises:
        BadText: it has a lone surrogate; the message says where in what is called `name`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadText(f"lone surrogate at code point {error.start} of {name}") from None


def refuse_bad_bounds(deadline_ms: float | None, seed: int | None) -> None:
    """Refuse a deadline or a seed out of range.

    Raises:
        UnknownOption: it is.
    """
    if deadline_ms is not None and not 0 < deadline_ms <= MAX_DEADLINE_MS:
        raise UnknownOption(
            f"deadline_ms is {deadline_ms}",
            remedy=f"Give a deadline above 0 and up to {MAX_DEADLINE_MS} ms.",
        )
    if seed is not None and not 0 <= seed < 2**63:
        raise UnknownOption(f"seed is {seed}", remedy="Give a seed from 0 to 9223372036854775807.")


@dataclass(frozen=True)
class Span:
    """Half-open code-point range `[start, end)` that may change; empty means a gap."""

    start: int
    end: int


@dataclass(frozen=True)
class Context:
    """Material from elsewhere: its path, its text, and where it comes from."""

    path: str
    text: str
    kind: ContextKind = "open"


@dataclass(frozen=True)
class Pin:
    """Text that the result of span number `span` must start or end with."""

    span: int
    at: Literal["start", "end"]
    text: str


@dataclass(frozen=True)
class Grammar:
    """What a text must match, all of it.

    `kind` says how `text` is written: a JSON schema, a regular expression (Rust's syntax), Lark as
    llguidance reads it, or GBNF as llama.cpp does. `json` asks for any JSON object; its text is
    empty.
    """

    kind: Literal["json", "json_schema", "regex", "lark", "gbnf"]
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class InfillRequest:
    """One infill, rewrite or repair.

    Attributes:
        text: the document, or a window of it.
        spans: what may change, in code points of `text`.
        document: key under which a newer request supersedes this one, and finds what was computed
            for it; None: nothing does.
        path: file name. language: language identifier.
        instruction: what to do with the selected text.
        context: from elsewhere; what helps is read, as far as there is room.
        pins: what results must start and end with.
        drafts: one for each span, or none at all; the canvas starts from it instead of noise.
        repair: suspected text within the spans, in code points of `text`: all other text of the
            spans is kept. Empty: what the model finds unlikely is suspected. None: no repair.
        alternatives: how many different fills are wanted.
        min_tokens: fewest tokens of a fill; None: 0.
        max_tokens: most tokens of a fill; None: chosen from the kind of gap.
        boldness: 0 shows only what is nearly certain, 1 whatever is not broken; None: the
            model's own, which is 0.5.
        deadline_ms: from arrival; None: no deadline.
        seed: of every random draw; None: drawn and returned.
        think: the model may reason before it writes.
        warm: only encode the prompt.
        background: every other request goes first.
        grammar: what the text of the only span must match; None: nothing.
        shows_tokens: whoever watches gets the tokens of the canvas, too.
    """

    text: str
    spans: tuple[Span, ...]
    document: str | None = None
    path: str | None = None
    language: str | None = None
    instruction: str | None = None
    context: tuple[Context, ...] = ()
    pins: tuple[Pin, ...] = ()
    drafts: tuple[str | None, ...] = ()
    repair: tuple[Span, ...] | None = None
    alternatives: int = 1
    min_tokens: int | None = None
    max_tokens: int | None = None
    boldness: float | None = None
    deadline_ms: float | None = None
    seed: int | None = None
    think: bool = False
    warm: bool = False
    background: bool = False
    grammar: Grammar | None = None
    shows_tokens: bool = False

    def __post_init__(self) -> None:
        """Refuse what no model could serve.

        Raises:
            RequestError: no span, or too many; BadText: a lone surrogate; SpanOutOfRange,
            SpansOverlap; UnknownOption: a bound, a pin or a count that means nothing.
        """
        self._refuse_bad_text()
        self._refuse_bad_spans()
        self._refuse_bad_pins()
        self._refuse_bad_grammar()
        if not 1 <= self.alternatives <= MAX_ALTERNATIVES:
            raise UnknownOption(
                f"n is {self.alternatives}", remedy=f"Ask for 1 to {MAX_ALTERNATIVES} alternatives."
            )
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
        if self.boldness is not None and not 0 <= self.boldness <= 1:
            raise UnknownOption(
                f"boldness is {self.boldness}", remedy="Give a boldness from 0 (shy) to 1 (bold)."
            )
        refuse_bad_bounds(self.deadline_ms, self.seed)

    def _refuse_bad_text(self) -> None:
        parts = {
            "text": self.text,
            "instruction": self.instruction,
            **{f"context {i}": each.text for i, each in enumerate(self.context)},
            **{f"the path of context {i}": each.path for i, each in enumerate(self.context)},
            **{f"pin {i}": each.text for i, each in enumerate(self.pins)},
            **{f"draft {i}": each for i, each in enumerate(self.drafts)},
        }
        for name, part in parts.items():
            refuse_lone_surrogates(part or "", name)

    def _refuse_bad_spans(self) -> None:
        if not self.spans:
            raise RequestError("no span to fill", remedy="Give at least one span.")
        if len(self.spans) > MAX_SPANS:
            raise RequestError(
                f"{len(self.spans)} spans", remedy=f"Give up to {MAX_SPANS} spans in one request."
            )
        for index, span in enumerate(self.spans):
            if not 0 <= span.start <= span.end <= len(self.text):
                raise SpanOutOfRange(
                    f"span {index} is [{span.start}, {span.end}), "
                    f"the text has {len(self.text)} code points"
                )
            for place in (span.start, span.end):
                if self.text[place - 1 : place + 1] == "\r\n" and place > 0:
                    raise SpanOutOfRange(
                        f"span {index} begins or ends within the line end at {place - 1}",
                        remedy="Put it before or behind both characters of the CRLF.",
                    )
        _refuse_overlap(self.spans)
        if self.drafts and len(self.drafts) != len(self.spans):
            raise UnknownOption(
                f"{len(self.drafts)} drafts for {len(self.spans)} spans",
                remedy="Give one draft for each span, null where there is none.",
            )
        if self.repair is None:
            return
        if any(span.start == span.end for span in self.spans):
            raise UnknownOption(
                "an empty span cannot be repaired", remedy="Select the text that is to be repaired."
            )
        for suspect in self.repair:
            if not any(
                span.start <= suspect.start < suspect.end <= span.end for span in self.spans
            ):
                raise SpanOutOfRange(
                    f"the suspected text [{suspect.start}, {suspect.end}) is not part of a span",
                    remedy="Give ranges of at least one character within the spans.",
                )

    def _refuse_bad_pins(self) -> None:
        taken = set()
        for index, pin in enumerate(self.pins):
            if not 0 <= pin.span < len(self.spans):
                raise UnknownOption(
                    f"pin {index} is for span {pin.span} of {len(self.spans)}",
                    remedy="Spans are counted from 0.",
                )
            if (pin.span, pin.at) in taken:
                raise UnknownOption(
                    f"pin {index} is a second {pin.at} for span {pin.span}",
                    remedy="Give one start and one end at most.",
                )
            taken.add((pin.span, pin.at))

    def _refuse_bad_grammar(self) -> None:
        """Refuse what a text cannot have beside a grammar."""
        if self.grammar is None:
            return
        others = {
            "several spans": len(self.spans) > 1,
            "pins": bool(self.pins),
            "a draft": any(draft is not None for draft in self.drafts),
            "a repair": self.repair is not None,
            "min_tokens": bool(self.min_tokens),
        }
        for name, is_there in others.items():
            if is_there:
                raise UnknownOption(
                    f"a grammar with {name}",
                    remedy="Send one span, and nothing else that says what its text is.",
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
class ScoredToken:
    """A token's text, and its causal log-probability, nats."""

    text: str
    log_probability: float


@dataclass(frozen=True)
class SpanFill:
    """New text of one span; `start` and `end` are offsets in the request's text.

    `confidence` is the calibrated chance that it is right, 0 to 1; the geometric mean probability
    of its tokens where the model has no calibration. `tokens` are those of the text, in order;
    none where it was not scored as a whole, as a span of several pieces is not.
    """

    start: int
    end: int
    text: str
    confidence: float
    tokens: tuple[ScoredToken, ...] = ()


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
class CanvasToken:
    """A position of the canvas.

    Attributes:
        text: of its most probable token; empty for a filler, U+FFFD for a part of a character.
        entropy_nats: of the position; 0 where given.
        state: `given` is pinned, `settled` certain and unchanged, `accepted` kept its proposal,
            `noise` will be drawn anew.
        span: number of the span it belongs to; None: it is given.
        is_filler: no text is wanted there.
    """

    text: str
    entropy_nats: float
    state: Literal["given", "settled", "accepted", "noise"]
    span: int | None = None
    is_filler: bool = False


@dataclass(frozen=True)
class CanvasUpdate:
    """The hypothesis that is best now.

    Attributes:
        seq: counts updates of this request from 0.
        canvas: counts canvases of a long answer from 0.
        passes: forwards done so far for this request.
        spans: whole draft text of each span.
        revised: a settled prefix was taken back.
        tokens: the canvas position by position, for requests that show them.
    """

    seq: int
    canvas: int
    passes: int
    spans: tuple[DraftSpan, ...]
    revised: bool = False
    tokens: tuple[CanvasToken, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens and forwards this request cost; `text_tokens` are those of the best answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    canvas_tokens: int = 0
    passes: int = 0
    text_tokens: int = 0


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
