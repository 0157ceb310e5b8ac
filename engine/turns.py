"""The prompt of a conversation: its turns as the model was trained to read them.

A chat template writes them with its marks. A model without one is asked in source code:

    # what was said, as comment lines
    code that was said, as it is
    # the last question
    ▁ and the model continues the source

Nothing that was said is read for control tokens: a template is rendered around stand-ins, and its
own text alone is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from infilld.engine.chat_prompt import THOUGHT_END, THOUGHT_START, ChatLayout
from infilld.engine.comments import as_comment
from infilld.engine.conversation import Message, Role
from infilld.engine.errors import CheckpointMismatch, ContextTooLong, RequestError, Unsupported
from infilld.engine.languages import STARTER_LANGUAGE
from infilld.engine.lines import unix
from infilld.engine.packing import window_start
from infilld.engine.prompt import PromptLayout, PromptParts
from infilld.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from infilld.engine.chat import ChatTemplate

# Private characters, no blanks: a template that trims a turn leaves them.
_STAND_IN = re.compile("\uf8ff(\\d+)\uf8ff")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_FENCES = re.compile(r"^[^\S\n]*(`{3,}|~{3,})", re.MULTILINE)
# How far before the first line that is read an open fence is looked for.
_LOOKED_BACK_CHARS = 1 << 20
# A source continues for ever: an answer ends where two lines in a row are blank, or after a canvas.
_SOURCE_END = "\n\n\n"


@dataclass(frozen=True)
class ThoughtMarks:
    """Tokens around thoughts. Behind the first stands a name, up to the end of its line."""

    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class TurnPrompt:
    """A prompt that ends where an answer begins, and what its reader has to know.

    Attributes:
        ids: of the prompt.
        ends: tokens that end an answer.
        marks: around thoughts; None: the model has none.
        is_thinking: the prompt ends within thoughts; is_named: behind their name.
        closing: texts before which an answer ends too.
        most_tokens: of an answer, where nobody says; None: what the context has room for.
    """

    ids: tuple[int, ...]
    ends: frozenset[int]
    marks: ThoughtMarks | None = None
    is_thinking: bool = False
    is_named: bool = False
    closing: tuple[str, ...] = ()
    most_tokens: int | None = None


class Turns(Protocol):
    """How a checkpoint is asked for the next turn."""

    @property
    def can_think(self) -> bool:
        """Whether `think` may be asked for."""

    def write(self, messages: Sequence[Message], *, think: bool, room_tokens: int) -> TurnPrompt:
        """The prompt of a conversation, in at most `room_tokens`.

        Raises:
            ContextTooLong: it does not fit. Unsupported: the model cannot do this.
            RequestError: the model knows no such conversation.
        """
        ...


def turns_of(tokenizer: Tokenizer, layout: PromptLayout, canvas_tokens: int) -> Turns:
    """The turns of a checkpoint, from the layout of its infills."""
    if isinstance(layout, ChatLayout):
        return TemplateTurns(tokenizer, layout.template, layout.ends)
    return SourceTurns(layout, canvas_tokens, tokenizer.longest_bytes)


class TemplateTurns:
    """The turns of a chat template.

    Args:
        tokenizer: vocabulary. template: of the checkpoint. ends: tokens that end a turn.
    """

    def __init__(self, tokenizer: Tokenizer, template: "ChatTemplate", ends: Sequence[int]) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._ends = frozenset(ends)

    def write(self, messages: Sequence[Message], *, think: bool, room_tokens: int) -> TurnPrompt:
        """As `Turns.write`; nothing is left out."""
        if think and not self.can_think:
            raise Unsupported(
                "the chat template of the loaded model cannot switch thinking",
                remedy="Leave the thinking out.",
            )
        text = sum(len(each.content.encode()) for each in messages)
        if text > room_tokens * self._tokenizer.longest_bytes:
            # It cannot fit, whatever its tokens are, and to tokenize it would hold up everybody.
            raise _too_long("more", room_tokens)
        ids = self._ids(messages, think)
        if len(ids) > room_tokens:
            raise _too_long(str(len(ids)), room_tokens)
        marks, behind = self._marks, list[int]()
        if marks is not None:
            last = max((at for at, token in enumerate(ids) if token == marks.start), default=-1)
            behind = ids[last + 1 :] if last >= 0 and marks.end not in ids[last:] else []
            is_thinking = last >= 0 and marks.end not in ids[last:]
        else:
            is_thinking = False
        return TurnPrompt(
            ids=tuple(ids),
            ends=self._ends,
            marks=marks,
            is_thinking=is_thinking,
            is_named="\n" in self._tokenizer.text(behind),
        )

    @cached_property
    def _marks(self) -> ThoughtMarks | None:
        start, end = map(self._tokenizer.control, (THOUGHT_START, THOUGHT_END))
        return None if start is None or end is None else ThoughtMarks(start, end)

    @cached_property
    def can_think(self) -> bool:
        """As `Turns.can_think`: the template has marks for thoughts, and switches them."""
        probe = [Message("user", "?")]
        return self._marks is not None and self._ids(probe, True) != self._ids(probe, False)

    def _ids(self, messages: Sequence[Message], think: bool) -> list[int]:
        turns, said = [], []
        for number, message in enumerate(messages):
            core = message.content.strip()
            # Blanks around a turn are the template's to keep or to trim.
            before, _, after = (
                message.content.partition(core) if core else (message.content, "", "")
            )
            stand_in = f"\uf8ff{number}\uf8ff" if core else ""
            turns.append({"role": message.role, "content": before + stand_in + after})
            said.append(core)
        pieces = _STAND_IN.split(self._template.render(turns, enable_thinking=think))
        shown = set(map(int, pieces[1::2]))
        for number, core in enumerate(said):
            if core and number not in shown:
                raise RequestError(
                    f"the chat template of the loaded model leaves message {number} out",
                    remedy="Send the roles in the order the model knows.",
                )
        if any(number >= len(said) for number in shown):
            raise CheckpointMismatch("the chat template writes private characters of its own")
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            # Every second piece is the number of what was said.
            encode = self._tokenizer.encode if number % 2 else self._tokenizer.encode_template
            ids += encode(said[int(piece)] if number % 2 else piece)
        return ids


class SourceTurns:
    """Turns as source code, for a model that continues it and was never taught to answer.

    What users and systems say becomes comment lines, the code between their fences stays code, and
    answers stand as they are. The prompt is that of an infill at the end of that source, with
    nothing behind it; where it is too long, its beginning is left out. An answer is what the model
    writes next: up to a filler, by which it says that no more text is wanted, or to two blank
    lines, and one canvas long at most where nobody says how long.

    Args:
        layout: of the checkpoint's infills. canvas_tokens: of its canvas.
        longest_bytes: of its tokens.
    """

    can_think = False

    def __init__(self, layout: PromptLayout, canvas_tokens: int, longest_bytes: int) -> None:
        self._layout, self._canvas_tokens = layout, canvas_tokens
        self._longest_bytes = longest_bytes

    def write(self, messages: Sequence[Message], *, think: bool, room_tokens: int) -> TurnPrompt:
        """As `Turns.write`."""
        # More cannot fit, and to write it would hold up everybody.
        source = _source(messages, room_tokens * self._longest_bytes)
        parts = PromptParts(
            prefix=source, suffix="", language=STARTER_LANGUAGE, path=None, think=think
        )
        prompt = self._layout.write(parts, room_tokens)
        filler = self._layout.filler
        ends = frozenset(prompt.ends) | (frozenset() if filler is None else {filler})
        return TurnPrompt(
            ids=prompt.ids, ends=ends, closing=(_SOURCE_END,), most_tokens=self._canvas_tokens
        )


def _source(messages: Sequence[Message], most_chars: int) -> str:
    """The end of a conversation as lines of source."""
    texts = [unix(each.content).strip("\n") for each in messages]
    left_out = window_start("\n".join(texts), most_chars)
    turns = []
    for message, text in zip(messages, texts, strict=True):
        if left_out <= len(text):
            turns.append(_turn(message.role, text, left_out))
        left_out = max(0, left_out - len(text) - 1)
    return "".join(turns)


def _turn(role: Role, text: str, start: int) -> str:
    """A turn from a line start on as lines of source."""
    shown = text[start:]
    if role == "assistant":
        return f"{shown}\n"
    lines: list[str] = []
    fence = ""
    for mark in _FENCES.findall(text, max(0, start - _LOOKED_BACK_CHARS), start):
        fence = _fence_behind(fence, mark)
    for line in shown.split("\n"):
        found = _FENCE.match(line)
        if found and (not fence or found[1].startswith(fence)):
            fence = _fence_behind(fence, found[1])
        elif fence:
            lines.append(f"{line}\n")
        else:
            lines.append(as_comment(line, STARTER_LANGUAGE, None))
    return "".join(lines)


def _fence_behind(fence: str, mark: str) -> str:
    """The fence that is open behind a mark of one; none: an empty string."""
    if not fence:
        return mark
    return "" if mark.startswith(fence) else fence


def _too_long(tokens: str, room_tokens: int) -> ContextTooLong:
    return ContextTooLong(
        f"the conversation needs {tokens} tokens, {room_tokens} fit",
        remedy="Leave earlier turns out, or shorten them.",
    )
