"""The causal prompt of an infill: what the model reads before it sees the canvas.

Which layout a checkpoint is asked in is decided by `layout_of`. In all of them what is typed comes
last, so that the prefix cache keeps everything else. The one here is that of a vocabulary made for
infilling; `chat_prompt.py` has the other.

    <bos> <|fim_suffix|> S <|fim_prefix|> context P
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from infilld.engine.comments import as_comment
from infilld.engine.errors import CheckpointMismatch, ContextTooLong, Unsupported
from infilld.engine.lines import unix
from infilld.engine.packing import Chunk, Packer, one_line, ranked
from infilld.engine.request import Context
from infilld.engine.tokenizer import Tokenizer

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SUFFIX_MARK, PREFIX_MARK, FILLER = "<|fim_suffix|>", "<|fim_prefix|>", "<|filler|>"

# Share of the prompt that the suffix may take.
_SUFFIX_SHARE = 0.25


@dataclass(frozen=True)
class Controls:
    """Ids of the control tokens an infill needs."""

    bos: int
    eos: int
    suffix_mark: int
    prefix_mark: int
    filler: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Controls | None":
        """The controls of a vocabulary; None where it was not made for infilling.

        Raises:
            CheckpointMismatch: some of them are there and some are not.
        """
        names = (BOS, EOS, SUFFIX_MARK, PREFIX_MARK, FILLER)
        ids = {name: tokenizer.control(name) for name in names}
        marks = [ids[name] for name in (SUFFIX_MARK, PREFIX_MARK, FILLER)]
        if all(mark is None for mark in marks):
            return None
        if absent := [name for name, index in ids.items() if index is None]:
            raise CheckpointMismatch(f"tokenizer.json lacks the control tokens {absent}")
        return cls(*(index for index in ids.values() if index is not None))

    def arrange(self, suffix: Sequence[int], prefix: Sequence[int]) -> list[int]:
        """Prompt ids of suffix and prefix ids."""
        return [self.bos, self.suffix_mark, *suffix, self.prefix_mark, *prefix]


@dataclass(frozen=True, kw_only=True)
class PromptParts:
    """What is asked, as text with LF line ends.

    Attributes:
        prefix, suffix: the document before and after the span.
        selection: the span's text now. It is shown for a rewrite; an infill writes it anew.
        instruction: what to do with the selection; None: an infill.
        context: material from elsewhere.
        language: language identifier. path: file name.
        think: the model may write thoughts before its answer.
    """

    prefix: str
    suffix: str
    selection: str = ""
    instruction: str | None = None
    context: Sequence[Context] = ()
    language: str | None = None
    path: str | None = None
    think: bool = False


@dataclass(frozen=True)
class InfillPrompt:
    """A prompt that ends at the span, and what its reader has to know.

    Attributes:
        ids: of the prompt.
        suffix: ids of the near suffix, to be pinned behind the gap.
        suffix_is_cut: more of the document follows them.
        suffix_end: ids that follow the suffix where it is not cut.
        suffix_follows: the answer goes on with the suffix. Where it does not, it ends by itself.
        answer_at: where in `ids` the answer begins that is given to the model as its own; None:
            there is none.
        thought_ends: tokens that end the thoughts, which the model writes at `answer_at` before
            the rest of the prompt is read; empty: it does not think.
        ends: tokens that end an answer.
        closing: a line that begins with this text ends an answer too; empty: no line does.
        banned: control tokens that stand for nothing in a gap.
        used: numbers of the contexts that are in the prompt, whole or cut.
    """

    ids: tuple[int, ...]
    suffix: tuple[int, ...]
    suffix_is_cut: bool
    suffix_end: tuple[int, ...] = ()
    suffix_follows: bool = True
    answer_at: int | None = None
    thought_ends: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    closing: str = ""
    banned: tuple[int, ...] = ()
    used: tuple[int, ...] = ()


class PromptLayout(Protocol):
    """How a checkpoint is asked.

    Attributes:
        filler: token that stands for no text in a gap; None: there is none.
        follows_instructions: the model was taught to.
    """

    @property
    def filler(self) -> int | None: ...  # noqa: D102

    @property
    def follows_instructions(self) -> bool: ...  # noqa: D102

    def write(self, parts: PromptParts, budget_tokens: int) -> InfillPrompt:
        """The prompt, in at most `budget_tokens`: far text is left out.

        Raises:
            ContextTooLong: what cannot be left out does not fit.
            Unsupported: the model cannot do this.
        """
        ...


class FimLayout:
    """The layout of a vocabulary with marks for suffix and prefix.

    An instruction is a comment between P and its last line: nobody types during a rewrite.
    """

    follows_instructions = False

    def __init__(self, tokenizer: Tokenizer, controls: Controls) -> None:
        self._controls = controls
        self._packer = Packer(tokenizer)
        self._longest_bytes = tokenizer.longest_bytes
        # A gap ends in fillers; an end of the text is pinned behind it, never written.
        self._banned = tuple(sorted(tokenizer.control_ids - {controls.filler}))

    @property
    def filler(self) -> int | None:
        """Token that stands for no text in a gap."""
        return self._controls.filler

    def write(self, parts: PromptParts, budget_tokens: int) -> InfillPrompt:
        """As `PromptLayout.write`."""
        if parts.think:
            raise Unsupported("the loaded model does not think", remedy="Ask without thinking.")
        controls, packer = self._controls, self._packer
        prefix, behind = parts.prefix, list[int]()
        room = budget_tokens - 3
        if parts.instruction is not None:
            prefix, behind = self._instructed(parts, parts.instruction, budget_tokens)
            room -= len(behind)
        suffix_room = max(min(1, room), int(room * _SUFFIX_SHARE))
        suffix, is_cut = packer.first_tokens(parts.suffix, suffix_room)
        packed = packer.pack(prefix, self._chunks(parts), room - len(suffix))
        return InfillPrompt(
            ids=tuple(controls.arrange(suffix, [*packed.context, *packed.prefix, *behind])),
            suffix=tuple(suffix),
            suffix_is_cut=is_cut,
            suffix_end=(controls.eos,),
            ends=(controls.eos,),
            banned=self._banned,
            used=packed.used,
        )

    def _instructed(
        self, parts: PromptParts, instruction: str, budget_tokens: int
    ) -> tuple[str, list[int]]:
        """The prefix up to the line of the selection, and ids of the instruction and that line."""
        before, end, line = parts.prefix.rpartition("\n")
        first = line or parts.selection.partition("\n")[0]
        indent = first[: len(first) - len(first.lstrip())]
        comment = as_comment(unix(instruction).strip(), parts.language, parts.path, indent)
        # A text that cannot be short enough is not tokenized: that would hold up everybody.
        least = -(-len(comment.encode()) // self._longest_bytes)
        refuse_long(range(least), budget_tokens)
        ids = self._packer.encode(comment)
        refuse_long(ids, budget_tokens)
        started, _ = self._packer.last_tokens(line, budget_tokens // 8)
        return before + end, [*ids, *started]

    def _chunks(self, parts: PromptParts) -> list[Chunk]:
        chunks = []
        for number, context in ranked(parts.context, diagnostics=parts.instruction is not None):
            title = one_line(context.path) or context.kind
            text = unix(context.text).strip("\n") + "\n"
            if context.kind == "diagnostic":
                title, text = f"{title}:\n{text}", "\n"
            head = as_comment(title.strip("\n"), parts.language, parts.path)
            chunks.append(Chunk(number, head, text))
        return chunks


def refuse_long(instruction: Sequence[int], budget_tokens: int) -> None:
    """Refuse an instruction of more than half the prompt.

    Raises:
        ContextTooLong: the instruction is longer.
    """
    room = budget_tokens // 2
    if len(instruction) > room:
        raise ContextTooLong(
            f"the instruction needs {len(instruction)} tokens, {room} fit",
            remedy="Shorten the instruction.",
        )
