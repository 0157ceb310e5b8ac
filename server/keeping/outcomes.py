"""How a job ended, without any of its text: what records are kept of."""

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from infilld.engine import errors
from infilld.engine.conversation import ChatRequest, ChatResult
from infilld.engine.languages import language_of
from infilld.engine.request import InfillRequest, Timings, Usage
from infilld.server.jobs import AnyRequest, AnyResult, Event

log = logging.getLogger(__name__)

Kind = Literal["infill", "rewrite", "repair", "chat", "warm"]
KINDS: Sequence[Kind] = ("infill", "rewrite", "repair", "chat", "warm")
SUPERSEDED = "superseded"

# What a client calls a language or a route is its own words; only names are kept.
_A_NAME = re.compile(r"[A-Za-z0-9_+#./-]{1,40}", re.ASCII)
# Their messages are about this machine. Those of bad requests may quote what was sent.
_ABOUT_US = (errors.ModelError, errors.Unavailable, errors.Cancelled, errors.UnknownId)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended.

    Attributes:
        id: of the job; empty where it was refused.
        at: Unix time, s.
        route: by which it came.
        kind: `warm` only encoded a prompt, `repair` and `rewrite` changed text that was there,
            `infill` filled gaps, `chat` went on with a conversation.
        language: as the engine names it; None: not known.
        reason: `ok`, why there is no answer, or the code of an error.
        why: one sentence, without source text.
        is_failure: it ended with an error.
        has_document: a newer request may supersede it.
        deadline_ms: from arrival.
        usage, timings: of the result; zeros without one.
        chars: code points of every answer, the best first.
    """

    id: str
    at: float
    route: str
    kind: Kind
    language: str | None
    reason: str
    why: str
    is_failure: bool
    has_document: bool
    deadline_ms: float | None
    usage: Usage
    timings: Timings
    chars: tuple[int, ...]


class Keeper(Protocol):
    """Keeps records of outcomes; called on the event loop, must return at once."""

    def answered(self, outcome: Outcome) -> None:
        """A job has ended, or was refused."""

    def told(self, job_id: str, event: Event, choice: int, chars: int | None) -> None:
        """A client said what became of an answer."""


class Records:
    """An `Observer` that hands on what it is told; a keeper that breaks harms nobody else."""

    def __init__(self, keepers: Sequence[Keeper]) -> None:
        self._keepers = tuple(keepers)

    def answered(
        self, job_id: str, route: str, request: AnyRequest, outcome: AnyResult | BaseException
    ) -> None:
        """As `Observer`."""
        found = outcome_of(job_id, route, request, outcome)
        self._each(lambda keeper: keeper.answered(found))

    def told(self, job_id: str, event: Event, choice: int, chars: int | None) -> None:
        """As `Observer`."""
        self._each(lambda keeper: keeper.told(job_id, event, choice, chars))

    def _each(self, tell: Callable[[Keeper], None]) -> None:
        for keeper in self._keepers:
            try:
                tell(keeper)
            except Exception:
                log.exception("%s does not keep records", type(keeper).__name__)


def outcome_of(
    job_id: str, route: str, request: AnyRequest, outcome: AnyResult | BaseException
) -> Outcome:
    """What is kept of a job and its result, or of what it ended with."""
    is_failure = isinstance(outcome, BaseException)
    return Outcome(
        id=job_id,
        at=time.time(),
        route=_name(route) or "other",
        kind=kind_of(request),
        language=_language(request),
        reason=_code(outcome) if isinstance(outcome, BaseException) else outcome.reason,
        why=_why(outcome) if isinstance(outcome, BaseException) else outcome.why,
        is_failure=is_failure,
        has_document=request.document is not None,
        deadline_ms=request.deadline_ms,
        usage=Usage() if isinstance(outcome, BaseException) else outcome.usage,
        timings=Timings() if isinstance(outcome, BaseException) else outcome.timings,
        chars=() if isinstance(outcome, BaseException) else _chars(outcome),
    )


def kind_of(request: AnyRequest) -> Kind:
    """What kind of work a request asks for."""
    if isinstance(request, ChatRequest):
        return "chat"
    assert isinstance(request, InfillRequest)
    if request.warm:
        return "warm"
    if request.repair is not None:
        return "repair"
    is_gap = all(span.start == span.end for span in request.spans)
    return "infill" if is_gap else "rewrite"


def _language(request: AnyRequest) -> str | None:
    if isinstance(request, ChatRequest):
        return None
    return _name(language_of(request.path, request.language))


def _chars(result: AnyResult) -> tuple[int, ...]:
    if isinstance(result, ChatResult):
        return tuple(len(answer.text) for answer in result.answers)
    return tuple(sum(len(span.text) for span in each.spans) for each in result.alternatives)


def _code(error: BaseException) -> str:
    return error.code if isinstance(error, errors.InfilldError) else "internal"


def _why(error: BaseException) -> str:
    if isinstance(error, _ABOUT_US):
        return str(error)
    remedy = type(error).remedy if isinstance(error, errors.InfilldError) else ""
    return remedy or f"It failed with {type(error).__name__}."


def _name(text: str | None) -> str | None:
    return text if text is not None and _A_NAME.fullmatch(text) else None
