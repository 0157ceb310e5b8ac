"""The causal prompt of an infill: what the model reads before it sees the canvas.

    <bos> <|fim_suffix|> S <|fim_prefix|> P

The suffix stands first, so that typing only appends, and the prefix cache keeps everything else.
P ends at the span; its window starts at an anchor that moves in hops, for the same reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from infilld.engine.errors import CheckpointMismatch
from infilld.engine.tokenizer import Tokenizer

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
SUFFIX_MARK, PREFIX_MARK, FILLER = "<|fim_suffix|>", "<|fim_prefix|>", "<|filler|>"

# Characters a token stands for in source code, at most: enough text is tokenized, no more.
_CHARS_PER_TOKEN = 6
# A window moves by this share of itself, so that the prefix cache survives most keystrokes.
_HOP = 0.25
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


@dataclass(frozen=True)
class InfillPrompt:
    """Attributes: ids of the prompt; suffix ids in it; whether the suffix was cut short."""

    ids: tuple[int, ...]
    suffix: tuple[int, ...]
    suffix_is_cut: bool


def infill_prompt(
    tokenizer: Tokenizer, controls: Controls, prefix: str, suffix: str, budget_tokens: int
) -> InfillPrompt:
    """The prompt for a span between prefix and suffix, in at most `budget_tokens`.

    Far text is left out: the end of the suffix and the start of the prefix.
    """
    room = budget_tokens - 3
    suffix_room = max(1, int(room * _SUFFIX_SHARE))
    near = suffix[: suffix_room * _CHARS_PER_TOKEN]
    ids = tokenizer.encode(near)
    is_cut = len(near) < len(suffix) or len(ids) > suffix_room
    suffix_ids = ids[:suffix_room]
    prefix_ids = _last_tokens(tokenizer, prefix, room - len(suffix_ids))
    return InfillPrompt(tuple(controls.arrange(suffix_ids, prefix_ids)), tuple(suffix_ids), is_cut)


def _last_tokens(tokenizer: Tokenizer, text: str, room: int) -> list[int]:
    """Ids of the end of text, at most `room`, from an anchored start."""
    limit = room * _CHARS_PER_TOKEN
    while True:
        ids = tokenizer.encode(text[window_start(text, limit) :])
        if len(ids) <= room:
            return ids
        if limit < 2 * room:
            return ids[-room:]
        limit = int(limit * (1 - _HOP))


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
