"""What clients of other servers ask and get, whatever their dialect calls it.

A dialect reads its body into `Asked`, and writes its reply from the `Shaped` texts that come back.
What such a client asks too much of is made less instead of refused: it cannot know this model.

No text of an infill is final before its result: a canvas may take back what it called settled, and
checks may leave nothing. Streams of these dialects can only append, so they send a text when it is
finished; whoever wants to watch it becoming asks `/v1/infill`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastapi import Request

from infilld.engine.request import Context, Grammar, InfillRequest, InfillResult, ScoredToken, Span
from infilld.server.compat.markers import Divided, divided
from infilld.server.http.answering import answer
from infilld.server.jobs import Jobs
from infilld.server.wire import MAX_CONTEXT_ITEMS

Finish = Literal["stop", "length"]

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
# The engine's `HEAD_TOKENS`, which comes with tensors. A gap with more has no place on a canvas.
PINNED_TOKENS = 16
# Where the worker does not know its canvas, since nothing is loaded yet.
_USUAL_CANVAS_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One gap to fill.

    Attributes:
        prefix, suffix: text before and behind it, of any length.
        context: from elsewhere. path: file name. language: language identifier.
        n: how many answers are wanted.
        max_tokens: most tokens of an answer; None: the engine's choice, 0: only warm up.
        min_tokens: fewest.
        stop: texts before the first of which an answer ends.
        n_indent: an answer ends before a line that is indented less; 0: wherever it likes.
        seed: of every random draw; None: drawn.
        deadline_ms: from arrival; None: no deadline.
        grammar: what an answer must match. warm: only encode the prompt.
        document: key under which a newer request supersedes this one; None, where the dialect has
            no such key: two clients may ask at once, and one that gave up closes its connection.
    """

    prefix: str
    suffix: str = ""
    context: Sequence[Context] = ()
    path: str | None = None
    language: str | None = None
    n: int = 1
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n_indent: int = 0
    seed: int | None = None
    deadline_ms: float | None = None
    grammar: Grammar | None = None
    warm: bool = False
    document: str | None = None

    def to_engine(self, canvas_tokens: int) -> InfillRequest:
        """The engine's record, for a canvas of so many tokens.

        Raises:
            RequestError: a lone surrogate, or a number that means nothing.
        """
        prefix, suffix = self.prefix, self.suffix
        if prefix.endswith("\r") and suffix.startswith("\n"):
            # A line end is not divided: the cursor stands before it.
            prefix, suffix = prefix[:-1], "\r" + suffix
        most = None if self.max_tokens is None else max(1, min(self.max_tokens, canvas_tokens))
        least = self.min_tokens and max(0, min(self.min_tokens, most or canvas_tokens))
        return InfillRequest(
            text=prefix + suffix,
            spans=(Span(len(prefix), len(prefix)),),
            document=self.document,
            path=self.path,
            language=self.language,
            context=tuple(self.context)[:MAX_CONTEXT_ITEMS],
            alternatives=self.n,
            min_tokens=least,
            max_tokens=most,
            deadline_ms=self.deadline_ms,
            seed=self.seed,
            warm=self.warm or self.max_tokens == 0,
            grammar=self.grammar,
        )


def gap_of(prompt: str, suffix: str | None) -> Divided:
    """Prefix and suffix of a prompt, which may have both between markers where no suffix comes."""
    found = None if suffix else divided(prompt)
    return Divided(prompt, suffix or "") if found is None else found


@dataclass(frozen=True)
class Shaped:
    """A text as the client gets it.

    Attributes:
        text: up to where it was cut. finish: `length` where the bound on tokens ended it.
        tokens: how many were written, with those that were cut off.
        scored: the tokens of `text`; None where they are not known, or a cut divides one.
        stopped_by: the text of `stop` before which it was cut; None: no such.
        is_cut_by_indent: it was cut before a line that is indented less.
    """

    text: str = ""
    finish: Finish = "stop"
    tokens: int = 0
    scored: tuple[ScoredToken, ...] | None = ()
    stopped_by: str | None = None
    is_cut_by_indent: bool = False


@dataclass(frozen=True)
class Answered:
    """A result, and its texts: the best first, one that is empty where there is none."""

    result: InfillResult
    choices: tuple[Shaped, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(choice.tokens for choice in self.choices)

    @property
    def extension(self) -> dict[str, str]:
        """What is said beside the dialect's own keys: why there is no text, and under which id."""
        result = self.result
        return {"id": result.id, "reason": result.reason, "why": result.why}


def canvas_tokens(jobs: Jobs) -> int:
    """Tokens of a canvas of the loaded model, beside the suffix that is pinned on it."""
    told = jobs.worker.describe().get("canvas_tokens")
    whole = told if isinstance(told, int) and told > 0 else _USUAL_CANVAS_TOKENS
    return max(1, whole - PINNED_TOKENS)


def wanted_of(jobs: Jobs, asked: Asked) -> InfillRequest:
    """The engine's record of what is asked of the loaded model.

    Raises:
        RequestError: see `Asked.to_engine`.
    """
    return asked.to_engine(canvas_tokens(jobs))


async def ask(jobs: Jobs, asked: Asked, request: Request) -> Answered:
    """Wait for the answer, or for the client to go away.

    Raises:
        InfilldError: see `answering.answer` and `Asked.to_engine`.
    """
    wanted = wanted_of(jobs, asked)
    return shaped(asked, wanted, await answer(jobs, wanted, request))


def shaped(asked: Asked, wanted: InfillRequest, result: InfillResult) -> Answered:
    """A result as the client gets it; `wanted` is what the engine was asked."""
    choices = []
    for rank, alternative in enumerate(result.alternatives):
        (fill,) = alternative.spans
        count = len(fill.tokens)
        if not count and rank == 0:
            count = result.usage.text_tokens
        choices.append(shape(asked, fill.text, fill.tokens, count, wanted.max_tokens))
    if not choices:
        choices = [Shaped(finish="length" if asked.max_tokens == 0 else "stop")]
    return Answered(result, tuple(choices))


def shape(
    asked: Asked,
    text: str,
    scored: tuple[ScoredToken, ...],
    tokens: int,
    max_tokens: int | None,
) -> Shaped:
    """A text, cut where the client wants it to end.

    Args:
        asked: says where. text: whole. scored: its tokens; empty: not known.
        tokens: how many it has. max_tokens: how many it could have.
    """
    at, stopped_by = _stop_at(text, asked.stop)
    dedent = _dedent_at(text[:at], asked.n_indent)
    if dedent is not None:
        at, stopped_by = dedent, None
    is_full = at == len(text) and max_tokens is not None and tokens >= max_tokens
    return Shaped(
        text=text[:at],
        finish="length" if is_full else "stop",
        tokens=tokens,
        scored=_tokens_of(text[:at], scored),
        stopped_by=stopped_by,
        is_cut_by_indent=dedent is not None,
    )


def _stop_at(text: str, stop: Sequence[str]) -> tuple[int, str | None]:
    """Where the first of these texts begins, and which it is; of two at one place the longer."""
    found = [(at, -len(each), each) for each in stop if (at := text.find(each)) >= 0]
    at, _, which = min(found, default=(len(text), 0, None))
    return at, which


def _dedent_at(text: str, n_indent: int) -> int | None:
    """Where the line end stands before the first later line with less indentation.

    A blank line has none to judge, and goes with the line that is cut.
    """
    if n_indent <= 0:
        return None
    first, *later = _LINE.findall(text) or [""]
    kept = at = len(first)
    for line in later:
        code = line.strip()
        if code and len(line) - len(line.lstrip(" \t")) < n_indent:
            return len(text[:kept].rstrip("\r\n"))
        at += len(line)
        kept = at if code else kept
    return None


def _tokens_of(text: str, scored: tuple[ScoredToken, ...]) -> tuple[ScoredToken, ...] | None:
    """The first tokens, which are exactly this text."""
    length = 0
    for count, token in enumerate(scored):
        if length >= len(text):
            scored = scored[:count]
            break
        length += len(token.text)
    return scored if "".join(token.text for token in scored) == text else None
