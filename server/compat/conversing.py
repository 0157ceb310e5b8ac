"""What every dialect asks of a conversation, as the engine's record.

Dialects differ in names and in the shape of their answers; roles, the thinking switch and limits
mean the same in all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from infilld.engine.conversation import ChatAnswer, ChatResult, Finish, Message, Role
from infilld.engine.errors import UnknownOption, Unsupported
from infilld.server.compat.fields import Body, Number
from infilld.server.http.problems import short
from infilld.server.wire import MAX_DEADLINE_MS, MAX_TOKENS, Text

# What a tool said is something the model is told, so it stands where a user speaks.
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "tool": "user",
    "function": "user",
    "assistant": "assistant",
}
# Less than a pass on any machine: what is asked for sooner could only be nothing.
MIN_DEADLINE_MS = 10.0
FINISH: Mapping[Finish, str] = {"stop": "stop", "length": "length", "deadline": "length"}
NO_THOUGHT = frozenset({"none", "instant", "minimal", "off"})
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


class Part(Body):
    """A part of a message's content."""

    type: str = "text"
    text: Text = ""


class Turn(Body):
    """A message; `images` are Ollama's."""

    role: str
    content: Text | list[Part] | None = None
    images: list[Any] | None = None


def to_messages(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """The messages of a conversation.

    Raises:
        UnknownOption: a role nobody has. Unsupported: content that is not text.
    """
    return tuple(Message(_role(turn), _text(turn)) for turn in turns)


def _role(turn: Turn) -> Role:
    try:
        return ROLES[turn.role]
    except KeyError:
        known = ", ".join(ROLES)
        raise UnknownOption(
            f"the role {short(turn.role)!r}", remedy=f"Use one of {known}."
        ) from None


def _text(turn: Turn) -> str:
    refuse_images(turn.images)
    if turn.content is None or isinstance(turn.content, str):
        return turn.content or ""
    for part in turn.content:
        if part.type not in _TEXT_PARTS:
            raise Unsupported(
                f"a message has a part of type {short(part.type)!r}",
                remedy="Send parts of type text; this model reads nothing else.",
            )
    return "".join(part.text for part in turn.content)


def refuse_images(images: Sequence[object] | None) -> None:
    """Refuse images.

    Raises:
        Unsupported: there are some.
    """
    if images:
        raise Unsupported("there are images", remedy="Send text; this model reads no images.")


def refuse_tools(tools: Sequence[object] | None, choice: object) -> None:
    """Refuse tools that may be called.

    Raises:
        Unsupported: always, where there are tools.
    """
    if tools and choice != "none":
        raise Unsupported(
            "tools cannot be called by this engine",
            remedy='Leave tools out or send "tool_choice": "none"; '
            "for an answer in a given shape use response_format.",
        )


def wants_thoughts(body: Mapping[str, Any]) -> bool:
    """Whether the model may reason first, in any of the ways clients say so.

    The first that is there decides: `chat_template_kwargs.enable_thinking`, `think`, `thinking`
    with a `type`, `reasoning_effort`, `reasoning.effort`.
    """
    options = body.get("chat_template_kwargs")
    if isinstance(options, Mapping) and isinstance(options.get("enable_thinking"), bool):
        return bool(options["enable_thinking"])
    think, thinking, reasoning = (body.get(key) for key in ("think", "thinking", "reasoning"))
    if think is not None:
        return _is_wish(think)
    if isinstance(thinking, Mapping):
        return thinking.get("type") in ("enabled", "adaptive")
    if thinking is not None:
        return _is_wish(thinking)
    effort = body.get("reasoning_effort")
    if effort is None and isinstance(reasoning, Mapping):
        effort = reasoning.get("effort")
    return effort is not None and _is_wish(effort)


def _is_wish(value: object) -> bool:
    if isinstance(value, str):
        return value.lower() not in NO_THOUGHT and value != ""
    return value is True


def limit(*wishes: int | None) -> int | None:
    """The first limit that is given, in tokens; None where it is negative, as for no limit."""
    found = next((wish for wish in wishes if wish is not None), -1)
    return None if found < 0 else min(found, MAX_TOKENS)


def deadline(wish_ms: Number | None, *more_ms: Number | None) -> float | None:
    """The first wish and what is added to it, in ms; None where it is 0 or less."""
    if wish_ms is None or not wish_ms > 0:
        return None
    total = wish_ms + sum(each for each in more_ms if each is not None and each > 0)
    return min(max(total, MIN_DEADLINE_MS), float(MAX_DEADLINE_MS))


def extension(result: ChatResult) -> dict[str, str]:
    """What is said beside the dialect's own keys, as of an infill (`Answered.extension`)."""
    return {"id": result.id, "reason": result.reason, "why": result.why}


def answers_of(result: ChatResult) -> tuple[ChatAnswer, ...]:
    """The answers; an empty one where there is none."""
    if result.answers:
        return result.answers
    return (ChatAnswer("", "", "deadline" if result.reason == "deadline" else "stop"),)


class Growing:
    """A text that only grows, given out piece by piece."""

    def __init__(self) -> None:
        self.text = ""

    def grow(self, text: str) -> str:
        """What is new in the text; nothing where it does not begin with what was given out."""
        if not text.startswith(self.text):
            return ""
        piece, self.text = text[len(self.text) :], text
        return piece
