"""What fits a prompt: windows of a document, and material from elsewhere.

Whatever is cut moves in hops: somebody who types changes the end of the prompt and nothing else,
until a whole hop has been added. The prefix cache lives on that.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from infilld.engine.request import Context, ContextKind
from infilld.engine.tokenizer import Tokenizer

# Characters a token stands for in source code, at most: enough text is tokenized, no more.
_CHARS_PER_TOKEN = 6
# A window moves by this share of itself, so that the prefix cache survives most keystrokes.
_HOP = 0.25
# Share of what the suffix leaves over that the prefix may take from context.
_PREFIX_SHARE = 2 / 3
# The same context comes with every keystroke: its tokens are remembered.
_REMEMBERED_TEXTS = 128
# What says most about the missing code comes first.
_RANKS: dict[ContextKind, int] = {
    "definition": 0,
    "recent": 1,
    "open": 1,
    "clipboard": 2,
    "diagnostic": 3,
}


@dataclass(frozen=True)
class Chunk:
    """Context number `index` as a prompt shows it; only `text` may be cut, at line ends."""

    index: int
    head: str
    text: str
    tail: str = ""


@dataclass(frozen=True)
class Packed:
    """Token ids of prefix and context, and the numbers of the contexts that are in there."""

    prefix: list[int]
    context: list[int]
    used: tuple[int, ...]


def ranked(contexts: Sequence[Context], *, diagnostics: bool) -> list[tuple[int, Context]]:
    """Contexts with their numbers, the most useful first: each text once, none that is blank.

    Where two are as useful, the caller's order stays.
    """
    wanted = [
        (number, context)
        for number, context in enumerate(contexts)
        if context.text.strip() and (diagnostics or context.kind != "diagnostic")
    ]
    wanted.sort(key=lambda item: _RANKS[item[1].kind])
    first = {(c.kind == "diagnostic", c.text): number for number, c in reversed(wanted)}
    return [(number, c) for number, c in wanted if number in first.values()]


class Packer:
    """Turns text into no more tokens than there is room for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._remembered = lru_cache(_REMEMBERED_TEXTS)(lambda text: tuple(tokenizer.encode(text)))

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a text that is likely to come again."""
        return self._remembered(text)

    def first_tokens(self, text: str, room: int) -> tuple[list[int], bool]:
        """Ids of the start of text, at most `room`, and whether some of it was left out."""
        near = text[: max(0, room) * _CHARS_PER_TOKEN]
        ids = self._tokenizer.encode(near)
        return ids[: max(0, room)], len(near) < len(text) or len(ids) > room

    def last_tokens(self, text: str, room: int) -> tuple[list[int], bool]:
        """Ids of the end of text, at most `room`, from an anchored start; whether it was cut."""
        limit = fitting = room * _CHARS_PER_TOKEN
        while limit > 0:
            start = window_start(text, limit)
            if len(text) - start <= fitting:
                ids = self._tokenizer.encode(text[start:])
                if len(ids) <= room:
                    return ids, start > 0
                # What the last tokens stand for is all that can fit: longer windows are not tried.
                fitting = len(self._tokenizer.text(ids[-room:]))
            limit = int(limit * (1 - _HOP))
        return [], bool(text)

    def pack(
        self, prefix: str, chunks: Sequence[Chunk], room: int, most_prefix: int | None = None
    ) -> Packed:
        """The end of a prefix and as much context as it leaves room for, in `room` tokens.

        The prefix comes first, up to its share and up to `most_prefix`. What it leaves over
        shrinks in hops, and then the context at the end goes first.
        """
        wanted = sum(self._tokens(chunk, room) for chunk in chunks)
        share = max(int(room * _PREFIX_SHARE), room - wanted)
        if most_prefix is not None:
            share = min(share, most_prefix)
        ids, is_cut = self.last_tokens(prefix, share)
        hop = max(1, int(share * _HOP))
        reserved = share if is_cut else min(share, -(-len(ids) // hop) * hop)
        context, used = self._fitting(chunks, room - reserved)
        return Packed(ids, context, used)

    def _tokens(self, chunk: Chunk, room: int) -> int:
        """Tokens of a chunk as it is; at least more than `room` where it is longer."""
        near = chunk.text[: room * _CHARS_PER_TOKEN]
        more = len(chunk.text) - len(near)
        return more + sum(len(self.encode(part)) for part in (chunk.head, near, chunk.tail))

    def _fitting(self, chunks: Sequence[Chunk], room: int) -> tuple[list[int], tuple[int, ...]]:
        ids: list[int] = []
        used: list[int] = []
        for chunk in chunks:
            head, tail = self.encode(chunk.head), self.encode(chunk.tail)
            left = room - len(ids) - len(head) - len(tail)
            if left > 0 and (text := self._lines(chunk.text, left)):
                ids += [*head, *text, *tail]
                used.append(chunk.index)
        return ids, tuple(used)

    def _lines(self, text: str, room: int) -> Sequence[int]:
        """Ids of the first lines of text that fit; none where not even one does."""
        near = text[: room * _CHARS_PER_TOKEN]
        ids = self.encode(near)
        if len(near) == len(text) and len(ids) <= room:
            return ids
        near = self._tokenizer.text(ids[:room])
        while end := near.rfind("\n") + 1:
            ids = self.encode(near[:end])
            if len(ids) <= room:
                return ids
            near = near[: end - 1]
        return ()


def window_start(text: str, limit_chars: int) -> int:
    """Where the last `limit_chars` or fewer of text begin: at a line start, moving in hops.

    As text grows at its end the start stays where it is until a whole hop has been added.
    """
    over = len(text) - limit_chars
    if over <= 0:
        return 0
    hop = max(1, int(limit_chars * _HOP))
    start = -(-over // hop) * hop
    line = text.find("\n", start, start + hop)
    return start if line < 0 else line + 1


def one_line(name: str) -> str:
    """A path or a name without anything that could end its line."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", name).split())
