"""Training examples: one causal sequence with several canvases hanging on it.

    encoder  <bos> [<|fim_suffix|> S <|fim_prefix|>] piece 0 | piece 1 | piece 2 …
    canvas i                                               ▲ cut i: [ middle, fillers | head ]

Text is cut at random characters and each piece tokenized alone, because that is how a prefix ends
under a cursor. A canvas continues at its cut: its positions follow the encoder tokens before it,
and it may see those alone.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infilld.engine.prompt import Controls
from infilld.engine.tokenizer import Tokenizer

# Label of a position that is not scored.
IGNORED = -100
_SEQUENCES_WITH_SUFFIX = 0.8
# Heads are as long as the engine pins them, or shorter.
_HEAD_TOKENS = (2, 16)
_FULL_HEADS = 0.5
# Fillers behind the first few of a gap are "spare".
_NEAR_FILLERS = 3
_MIDDLES = (("rest_of_line", 0.4), ("line", 0.2), ("lines", 0.2), ("chars", 0.2))
_TRIES = 20
_EMPTY_MIDDLES = 0.1
_CHARS_PER_TOKEN = 3.3
_LAST_CUT_CHARS = 80
# Encoder tokens before the cut, middle ids, head ids.
_Canvas = tuple[int, list[int], list[int]]
# Texts from which the characters of a token are measured.
_MEASURED_TEXTS = 50


@dataclass(frozen=True, kw_only=True)
class ExampleShape:
    """Sizes of a batch.

    Attributes:
        sequences: B. encoder_tokens: N. canvases: C for each sequence.
        gap_tokens: length of every gap; canvas_tokens: gap plus the longest head.
        suffix_tokens: longest suffix in the prompt.
    """

    sequences: int
    encoder_tokens: int
    canvases: int
    gap_tokens: int
    suffix_tokens: int = 96

    @property
    def canvas_tokens(self) -> int:
        """Length of a canvas row, L."""
        return self.gap_tokens + _HEAD_TOKENS[1]


@dataclass(frozen=True)
class Batch:
    """One batch, clean.

    Attributes:
        encoder: [B, N] int64, pad at the end. encoder_labels: next tokens [B, N], or IGNORED.
        canvas: [B, C, L] int64, pad at the end. starts: [B, C] encoder tokens each may see.
        gap: [B, C, L] bool. head: [B, C, L] bool; what is neither is padding.
        spare: [B, C, L] bool, fillers well behind the end of the fill.
    """

    encoder: Tensor
    encoder_labels: Tensor
    canvas: Tensor
    starts: Tensor
    gap: Tensor
    head: Tensor
    spare: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch elsewhere."""
        return Batch(
            *(getattr(self, name).to(device, non_blocking=True) for name in self.__annotations__)
        )

    def split(self, parts: int) -> "list[Batch]":
        """The same sequences in so many batches, or fewer where there are not enough."""
        tensors = [getattr(self, name).chunk(parts) for name in self.__annotations__]
        return [Batch(*pieces) for pieces in zip(*tensors, strict=True)]


@dataclass(frozen=True)
class Cut:
    """A span `[start, end)` of a text, in characters, to be filled."""

    start: int
    end: int


def choose_cut(text: str, at: int, rng: random.Random) -> Cut:
    """A span around `at`, of one of the usual kinds: rest of line, line, lines, characters."""
    kind = rng.choices([k for k, _ in _MIDDLES], [w for _, w in _MIDDLES])[0]
    line_start, line_end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
    line_end = len(text) if line_end < 0 else line_end
    if kind == "chars":
        return Cut(at, min(len(text), at + rng.randint(1, 40)))
    if kind == "rest_of_line":
        return Cut(at, line_end)
    # The cursor stands behind the indent, where an editor puts it.
    start = line_start + len(text[line_start:line_end]) - len(text[line_start:line_end].lstrip())
    for _ in range(rng.randint(1, 3) if kind == "lines" else 0):
        following = text.find("\n", line_end + 1)
        line_end = len(text) if following < 0 else following
    return Cut(start, line_end)


class ExampleBuilder:
    """Makes batches from texts.

    Args:
        texts: training files. tokenizer: vocabulary. controls: its control tokens.
        weights: how often each text is taken; None: by its length.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Tokenizer,
        controls: Controls,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not texts:
            raise ValueError("no text to make examples from")
        self._texts, self._tokenizer, self._controls = texts, tokenizer, controls
        self._rng = random.Random()
        self._sizes = list(itertools.accumulate(weights or [len(text) for text in texts]))
        sample = "".join(text[:4000] for text in self._rng.choices(texts, k=_MEASURED_TEXTS))
        # A window is cut so that it just fills the encoder.
        self._chars_per_token = 0.95 * len(sample) / max(1, len(tokenizer.encode(sample)))

    def batch(self, shape: ExampleShape, rng: random.Random) -> Batch:
        """A random batch."""
        self._rng = rng
        rows = [self._sequence(shape) for _ in range(shape.sequences)]
        encoder = torch.zeros(shape.sequences, shape.encoder_tokens, dtype=torch.int64)
        labels = torch.full_like(encoder, IGNORED)
        size = (shape.sequences, shape.canvases, shape.canvas_tokens)
        canvas = torch.zeros(size, dtype=torch.int64)
        gap, head, spare = torch.zeros(3, *size, dtype=torch.bool)
        starts = torch.ones(size[:2], dtype=torch.int64)
        for b, (ids, canvases) in enumerate(rows):
            encoder[b, : len(ids)] = torch.tensor(ids)
            labels[b, : len(ids) - 1] = torch.tensor(ids[1:])
            for c, (start, middle, after) in enumerate(canvases):
                starts[b, c] = start
                filled = middle + [self._controls.filler] * (shape.gap_tokens - len(middle))
                canvas[b, c, : shape.gap_tokens] = torch.tensor(filled)
                gap[b, c, : shape.gap_tokens] = True
                spare[b, c, len(middle) + _NEAR_FILLERS : shape.gap_tokens] = True
                end = shape.gap_tokens + len(after)
                canvas[b, c, shape.gap_tokens : end] = torch.tensor(after, dtype=torch.int64)
                head[b, c, shape.gap_tokens : end] = True
        return Batch(encoder, labels, canvas, starts, gap, head, spare)

    def _sequence(self, shape: ExampleShape) -> tuple[list[int], list[_Canvas]]:
        """Encoder ids, and the canvases on them.

        The prompt ends at the last cut, and its suffix is what follows there: as in the engine,
        and no text is both read and predicted.
        """
        text = self._rng.choices(self._texts, cum_weights=self._sizes)[0]
        length = int(shape.encoder_tokens * _CHARS_PER_TOKEN)
        start = self._rng.randrange(max(1, len(text) - length // 3))
        start = text.rfind("\n", 0, start) + 1
        cuts = self._cuts(text, start, min(len(text), start + length), shape)
        before, after = [self._controls.bos], text[cuts[-1].end :] if cuts else ""
        if self._rng.random() < _SEQUENCES_WITH_SUFFIX:
            suffix = self._tokenizer.encode(after[: 6 * shape.suffix_tokens])
            suffix = suffix[: self._rng.randint(0, shape.suffix_tokens)]
            before = self._controls.arrange(suffix, ())
        prefix: list[int] = []
        canvases: list[_Canvas] = []
        for cut in cuts:
            prefix += self._tokenizer.encode(text[start : cut.start])
            start = cut.start
            canvases.append((len(prefix), *self._middle_and_head(text, cut, shape)))
        # What is too much goes at the front, as the engine's window does.
        lost = max(0, len(before) + len(prefix) - shape.encoder_tokens)
        shift = len(before) - lost
        kept = [(at + shift, middle, head) for at, middle, head in canvases if at > lost]
        return before + prefix[lost:], kept

    def _cuts(self, text: str, start: int, end: int, shape: ExampleShape) -> list[Cut]:
        """Cuts that begin in `[start, end)` of text and fit the gap, in order; one near the end."""
        cuts: list[Cut] = []
        for _ in range(_TRIES * shape.canvases):
            if len(cuts) == shape.canvases:
                break
            first = start if cuts else max(start, end - _LAST_CUT_CHARS)
            cut = choose_cut(text, self._rng.randrange(first, end), self._rng)
            if cut.start == cut.end:
                # An empty middle teaches silence, but a few are enough.
                if self._rng.random() < _EMPTY_MIDDLES:
                    cuts.append(cut)
            elif len(self._tokenizer.encode(text[cut.start : cut.end])) <= shape.gap_tokens:
                cuts.append(cut)
        return sorted(cuts, key=lambda cut: cut.start)

    def _middle_and_head(
        self, text: str, cut: Cut, shape: ExampleShape
    ) -> tuple[list[int], list[int]]:
        middle = self._tokenizer.encode(text[cut.start : cut.end])[: shape.gap_tokens]
        wanted = _HEAD_TOKENS[1]
        if self._rng.random() >= _FULL_HEADS:
            wanted = self._rng.randint(*_HEAD_TOKENS)
        head = self._tokenizer.encode(text[cut.end : cut.end + 8 * wanted])
        if cut.end + 8 * wanted >= len(text):
            head = [*head, self._controls.eos]
        return middle, head[:wanted]
