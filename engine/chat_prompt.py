r"""The prompt of an instruction-tuned checkpoint: a question, and the start of its own answer.

    user's turn    the task, context, the code after the gap
    model's turn   ```lang \n P

The answer goes on where the document does, so the gap is the next thing the model writes and
typing only appends. For a rewrite, and for an infill that is thought about, the user's turn shows
the code on both sides with a mark in it, and the answer begins a few lines before the mark.

Nothing a user wrote is read for control tokens: the template is rendered around a stand-in, and
its own text alone is.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from infilld.engine.errors import CheckpointMismatch, ContextTooLong, RequestError, Unsupported
from infilld.engine.fences import TITLES, fence_for, marks_for, tag_of
from infilld.engine.lines import unix
from infilld.engine.packing import Chunk, Packed, Packer, one_line, ranked
from infilld.engine.prompt import EOS, PAD, InfillPrompt, PromptParts, refuse_long
from infilld.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from infilld.engine.chat import ChatTemplate

THOUGHT_START, THOUGHT_END = "<|channel>", "<channel|>"

# Stands for the user's text while the template is rendered: private characters, no blanks.
_STAND_IN = "\uf8ffuser\uf8ff"
_SUFFIX_SHARE, _SUFFIX_TOKENS = 0.25, 1024
# Longest window of the prefix: more says little about the gap and costs every first request.
_PREFIX_TOKENS = 4096
# Lines that an answer repeats before a mark, and the share of the prompt they may take.
_LEAD_LINES, _LEAD_SHARE = 8, 0.125
# Below this much room for the document nothing useful could be written.
_LEAST_ROOM = 16

_INFILL = (
    "Write the missing code of a file. Reply with one code block: "
    "the code before the gap, the missing code, then the code after the gap, unchanged.\n"
)
_END = (
    "Write the end of a file. Reply with one code block: the code that is there, then the rest.\n"
)
_MARKED_GAP = (
    "Write the code that is missing in a file at {open}. Reply with one code block: "
    "the lines before it, the missing code, then the lines after it, unchanged.\n"
)
_REWRITE = (
    "Rewrite the part of a file between {open} and {close} as the instruction says. "
    "Reply with one code block: the lines before that part, unchanged, then its new code. "
    "End there.\n"
)


@dataclass(frozen=True)
class _Frame:
    """What the template writes before and after the user's text; the token that ends a turn."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    turn_end: int


class ChatLayout:
    """The layout of a chat template, with an answer that has begun.

    Attributes:
        template: of the checkpoint. ends: tokens that end an answer.

    Raises:
        CheckpointMismatch: the template does not show the user's text once, or ends no turn.
    """

    filler: None = None
    follows_instructions = True

    def __init__(self, tokenizer: Tokenizer, template: "ChatTemplate") -> None:
        self._tokenizer, self.template = tokenizer, template
        self._packer = Packer(tokenizer)
        self._frame = lru_cache(2)(self._framed)
        turn_end = self._frame(False).turn_end
        ends = [turn_end, tokenizer.control(EOS), tokenizer.control(PAD)]
        self.ends = tuple(dict.fromkeys(end for end in ends if end is not None))
        self._banned = tuple(sorted(tokenizer.control_ids - set(self.ends)))

    def write(self, parts: PromptParts, budget_tokens: int) -> InfillPrompt:
        """As `PromptLayout.write`."""
        thought_ends: tuple[int, ...] = ()
        if parts.think:
            channel_end = self._tokenizer.control(THOUGHT_END)
            if channel_end is None or self._frame(True) == self._frame(False):
                raise Unsupported(
                    "the chat template of the loaded model cannot switch thinking",
                    remedy="Ask without thinking.",
                )
            thought_ends = (channel_end,)
        page = _Page(self._packer, self._frame(parts.think), parts, budget_tokens)
        marked = parts.think or parts.instruction is not None
        written = page.marked() if marked else page.open()
        ids = [*page.frame.before, *written.question, *page.frame.after]
        fence = self._packer.encode(page.fence)
        last = "" if parts.suffix.endswith("\n") else "\n"
        return InfillPrompt(
            ids=(*ids, *page.opening, *written.lead),
            suffix=tuple(written.suffix),
            suffix_is_cut=written.suffix_is_cut,
            suffix_end=(*self._packer.encode(last + page.fence), page.frame.turn_end),
            suffix_follows=parts.instruction is None,
            answer_at=len(ids),
            thought_ends=thought_ends,
            # Single backticks are code: a fence of several tokens is known by its text alone.
            ends=(*self.ends, *fence) if len(fence) == 1 else self.ends,
            closing=page.fence,
            banned=self._banned,
            used=written.used,
        )

    def _framed(self, think: bool) -> _Frame:
        messages = [{"role": "user", "content": _STAND_IN}]
        try:
            text = self.template.render(messages, enable_thinking=think)
        except RequestError as error:
            raise CheckpointMismatch(f"no infill can be asked in this template: {error}") from None
        before, *after = text.split(_STAND_IN)
        if len(after) != 1:
            raise CheckpointMismatch(f"the chat template shows a user's text {len(after)} times")
        ids = self._tokenizer.encode_template(after[0])
        turn_end = next((token for token in ids if token in self._tokenizer.control_ids), None)
        if turn_end is None:
            raise CheckpointMismatch("the chat template ends a user's turn with no control token")
        return _Frame(tuple(self._tokenizer.encode_template(before)), tuple(ids), turn_end)


@dataclass(frozen=True)
class _Written:
    """Ids of the question, of the suffix in it, of the answer's start; contexts that are in it."""

    question: list[int]
    suffix: list[int]
    suffix_is_cut: bool
    lead: list[int]
    used: tuple[int, ...]


class _Page:
    """One prompt while it is written.

    Attributes:
        fence: longer than any in the document. opening: ids of its first line.
    """

    def __init__(
        self, packer: Packer, frame: _Frame, parts: PromptParts, budget_tokens: int
    ) -> None:
        self._packer, self._parts, self._budget = packer, parts, budget_tokens
        self.frame = frame
        self.fence = fence_for(parts.prefix, parts.selection, parts.suffix)
        self._header = f"{self.fence}{tag_of(parts.path, parts.language)}\n"
        self.opening = packer.encode(self._header)
        self._named = f" of {one_line(parts.path)}" if parts.path else ""

    def open(self) -> _Written:
        """The code after the gap in the question, the code before it in the answer."""
        parts, encode = self._parts, self._packer.encode
        task = encode(_INFILL if parts.suffix else _END)
        header = encode(f"\nThe code after the gap{self._named}:\n{self._header}")
        footer = encode(f"\n{self.fence}")
        if not parts.suffix:
            header = encode(f"\nThe end{self._named} is missing.\n" if self._named else "")
            footer = ()
        room = self._room(task, header, footer)
        suffix, is_cut = self._suffix(room)
        packed = self._packed(room - len(suffix))
        question = [*task, *packed.context, *header, *suffix, *footer]
        return _Written(question, suffix, is_cut, packed.prefix, packed.used)

    def marked(self) -> _Written:
        """All the code in the question, with a mark in it; the answer repeats its last lines."""
        parts, packer, encode = self._parts, self._packer, self._packer.encode
        opening, closing = self._marks()
        asked: tuple[int, ...] = ()
        shown = encode(opening)
        text = _MARKED_GAP
        if parts.instruction is not None:
            text = _REWRITE
            asked = encode(f"\nThe instruction:\n{unix(parts.instruction).strip()}\n")
            refuse_long(asked, self._budget)
            shown = encode(f"{opening}{parts.selection}{closing}")
        task = encode(text.format(open=opening, close=closing))
        header = encode(f"\nThe code{self._named}:\n{self._header}")
        footer = encode(f"\n{self.fence}")
        room = self._room(task, asked, header, footer)
        if len(shown) + _LEAST_ROOM > room:
            raise ContextTooLong(
                f"the selection needs {len(shown)} tokens, {room - _LEAST_ROOM} fit",
                remedy="Select less.",
            )
        room -= len(shown)
        lead, _ = packer.last_tokens(_last_lines(parts.prefix), int(room * _LEAD_SHARE))
        room -= len(lead)
        suffix, is_cut = self._suffix(room)
        packed = self._packed(room - len(suffix))
        code = [*header, *packed.prefix, *shown, *suffix, *footer]
        question = [*task, *asked, *packed.context, *code]
        return _Written(question, suffix, is_cut, lead, packed.used)

    def _room(self, *needed: tuple[int, ...]) -> int:
        fixed = sum(map(len, (self.frame.before, self.frame.after, self.opening, *needed)))
        if self._budget - fixed < _LEAST_ROOM:
            raise ContextTooLong(
                f"the question alone needs {fixed} tokens, {self._budget - _LEAST_ROOM} fit",
                remedy="Use a model that reads longer prompts.",
            )
        return self._budget - fixed

    def _suffix(self, room: int) -> tuple[list[int], bool]:
        most = min(_SUFFIX_TOKENS, int(room * _SUFFIX_SHARE))
        return self._packer.first_tokens(self._parts.suffix, most)

    def _packed(self, room: int) -> Packed:
        chunks = []
        wanted = self._parts.instruction is not None
        for number, context in ranked(self._parts.context, diagnostics=wanted):
            text = unix(context.text).strip("\n") + "\n"
            fence = fence_for(text)
            title = one_line(context.path) or "elsewhere"
            head = f"\n{TITLES[context.kind].format(title)}:\n{fence}\n"
            chunks.append(Chunk(number, head, text, f"{fence}\n"))
        return self._packer.pack(self._parts.prefix, chunks, room, _PREFIX_TOKENS)

    def _marks(self) -> tuple[str, str]:
        """Texts that mark a place in the document and do not occur in it."""
        parts = self._parts
        name = "selection" if parts.instruction is not None else "gap"
        return marks_for(name, parts.prefix + parts.selection + parts.suffix)


def _last_lines(prefix: str) -> str:
    """The last lines of a prefix, and what stands on the line where it ends."""
    start = len(prefix)
    for _ in range(_LEAD_LINES + 1):
        start = prefix.rfind("\n", 0, start)
        if start < 0:
            return prefix
    return prefix[start + 1 :]
