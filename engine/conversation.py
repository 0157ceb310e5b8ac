"""What is asked of the engine in a conversation and what it answers: records, as in `request.py`.

An answer of any length is written canvas after canvas; what stands on a finished canvas is final.
"""

from dataclasses import dataclass, field
from typing import Literal

from infilld.engine.errors import RequestError, UnknownOption
from infilld.engine.request import (
    MAX_ALTERNATIVES,
    CanvasToken,
    Grammar,
    Reason,
    Timings,
    Usage,
    refuse_bad_bounds,
    refuse_lone_surrogates,
)

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length", "deadline"]

MAX_MESSAGES = 4096
MAX_STOPS, MAX_STOP_CHARS = 64, 1024


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """The next turn of a conversation.

    Attributes:
        messages: oldest first.
        alternatives: how many answers are wanted.
        max_tokens: of an answer, thoughts apart; None: what the context has room for.
        stop: texts before the first of which an answer ends.
        grammar: what the answer must match; thoughts are free. None: nothing.
        greedy: accepted positions take the most probable token, not a sample.
        think: the model may reason before it answers.
        deadline_ms: from arrival; an answer ends with what is final by then. None: no deadline.
        seed: of every random draw; None: drawn and returned.
        shows_tokens: whoever watches gets the tokens of the canvas, too.
        document, background: as for an infill.
    """

    messages: tuple[Message, ...]
    alternatives: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None
    greedy: bool = False
    think: bool = False
    deadline_ms: float | None = None
    seed: int | None = None
    shows_tokens: bool = False
    document: str | None = None
    background: bool = False

    def __post_init__(self) -> None:
        """Refuse what no model could serve.

        Raises:
            RequestError: no message, or too many; BadText: a lone surrogate; UnknownOption: a
            bound or a count that means nothing.
        """
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            raise RequestError(
                f"{len(self.messages)} messages", remedy=f"Give 1 to {MAX_MESSAGES} messages."
            )
        for number, message in enumerate(self.messages):
            refuse_lone_surrogates(message.content, f"message {number}")
        if len(self.stop) > MAX_STOPS:
            raise UnknownOption(
                f"{len(self.stop)} stops", remedy=f"Give at most {MAX_STOPS} stop texts."
            )
        for number, text in enumerate(self.stop):
            if len(text) > MAX_STOP_CHARS:
                raise UnknownOption(
                    f"stop {number} has {len(text)} characters",
                    remedy=f"A stop text has at most {MAX_STOP_CHARS} characters.",
                )
            refuse_lone_surrogates(text, f"stop {number}")
            if not text:
                raise UnknownOption(f"stop {number} is empty", remedy="Leave it out.")
        if not 1 <= self.alternatives <= MAX_ALTERNATIVES:
            raise UnknownOption(
                f"n is {self.alternatives}", remedy=f"Ask for 1 to {MAX_ALTERNATIVES} answers."
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UnknownOption(
                f"max_tokens is {self.max_tokens}", remedy="max_tokens is 1 or more."
            )
        refuse_bad_bounds(self.deadline_ms, self.seed)


@dataclass(frozen=True)
class ChatAnswer:
    """One answer: its text, what was thought before it, why it ends there, and tokens of both."""

    text: str
    thoughts: str
    finish: Finish
    tokens: int = 0


@dataclass(frozen=True)
class ChatUpdate:
    """The first answer as far as it is written.

    Attributes:
        seq: counts updates of this request from 0.
        canvas: counts canvases of the answer from 0.
        passes: forwards done so far for this request.
        text: of the answer, final: later ones begin with it.
        thoughts: final, likewise.
        draft: what stands on the canvas now, behind what is final; replaced by the next.
        tokens: the canvas position by position, for requests that show them.
    """

    seq: int
    canvas: int
    passes: int
    text: str
    thoughts: str
    draft: str
    tokens: tuple[CanvasToken, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChatResult:
    """The answer. No answers is an answer too: `reason` and `why` say why."""

    id: str
    seed: int
    answers: tuple[ChatAnswer, ...] = ()
    reason: Reason = "ok"
    why: str = ""
    usage: Usage = field(default_factory=Usage)
    timings: Timings = field(default_factory=Timings)
