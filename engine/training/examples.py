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
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from infilld.engine.canvas import HEAD_TOKENS
from infilld.engine.prompt import Controls
from infilld.engine.tokenizer import Tokenizer
from infilld.engine.training.canvases import CanvasRow, CanvasWriter, Cut, choose_cut
from infilld.engine.training.copying import IGNORED, Renamer, repeated_phrases

_SEQUENCES_WITH_SUFFIX = 0.8
_TRIES = 20
_EMPTY_MIDDLES = 0.1
_CHARS_PER_TOKEN = 3.3
_LAST_CUT_CHARS = 80
# Encoder tokens before the cut, and the canvas.
_Canvas = tuple[int, CanvasRow]
# Texts from which the characters of a token are measured.
_MEASURED_TEXTS = 50


@dataclass(frozen=True, kw_only=True)
class ExampleShape:
    """Sizes of a batch.

    Attributes:
        sequences: B. encoder_tokens: N. canvases: C for each sequence; 0: the encoder alone.
        gap_tokens: longest gap. head_tokens: longest head.
        suffix_tokens: longest suffix in the prompt.
        repeated: share of the sequences that are repeated random phrases; only without canvases.
        renamed: share of the others whose names are exchanged.
    """

    sequences: int
    encoder_tokens: int
    canvases: int
    gap_tokens: int
    head_tokens: int = HEAD_TOKENS
    suffix_tokens: int = 96
    repeated: float = 0.0
    renamed: float = 0.25

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        if self.repeated and self.canvases:
            raise ValueError("repeated phrases have no text to cut canvases from")

    @property
    def canvas_tokens(self) -> int:
        """Length of a canvas row, L."""
        return self.gap_tokens + self.head_tokens


@dataclass(frozen=True)
class Batch:
    """One batch, clean.

    Attributes:
        encoder: [B, N] int64, pad at the end. encoder_labels: next tokens [B, N], or IGNORED.
        canvas: [B, C, L] int64, pad at the end. starts: [B, C] encoder tokens each may see.
        gap: [B, C, L] bool. head: [B, C, L] bool; what is neither is padding.
        spare: [B, C, L] bool, fillers well behind the end of the fill.
        first: [B, C, L] int64, what canvases start from that are `drafted`: [B, C] bool.
    """

    encoder: Tensor
    encoder_labels: Tensor
    canvas: Tensor
    starts: Tensor
    gap: Tensor
    head: Tensor
    spare: Tensor
    first: Tensor
    drafted: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch elsewhere."""
        return Batch(
            *(getattr(self, name).to(device, non_blocking=True) for name in self.__annotations__)
        )

    def split(self, parts: int) -> "list[Batch]":
        """The same sequences in so many batches, or fewer where there are not enough."""
        tensors = [getattr(self, name).chunk(parts) for name in self.__annotations__]
        return [Batch(*pieces) for pieces in zip(*tensors, strict=True)]


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
        self._writer = CanvasWriter(tokenizer, controls)
        self._renamer = Renamer(texts, random.Random(0))
        self._sizes = list(itertools.accumulate(weights or [len(text) for text in texts]))
        sample = "".join(text[:4000] for text in self._rng.choices(texts, k=_MEASURED_TEXTS))
        # A window is cut so that it just fills the encoder.
        self._chars_per_token = 0.95 * len(sample) / max(1, len(tokenizer.encode(sample)))

    def batch(self, shape: ExampleShape, rng: random.Random) -> Batch:
        """A random batch."""
        self._rng = rng
        rows = [self._row(shape) for _ in range(shape.sequences)]
        encoder = torch.zeros(shape.sequences, shape.encoder_tokens, dtype=torch.int64)
        labels = torch.full_like(encoder, IGNORED)
        size = (shape.sequences, shape.canvases, shape.canvas_tokens)
        canvas, first = torch.zeros(2, *size, dtype=torch.int64)
        drafted = torch.zeros(size[:2], dtype=torch.bool)
        gap, head, spare = torch.zeros(3, *size, dtype=torch.bool)
        starts = torch.ones(size[:2], dtype=torch.int64)
        for b, (ids, following, canvases) in enumerate(rows):
            encoder[b, : len(ids)] = torch.tensor(ids)
            labels[b, : len(following)] = torch.tensor(following)
            for c, (start, row) in enumerate(canvases):
                starts[b, c] = start
                used = len(row.ids)
                canvas[b, c, :used] = torch.tensor(row.ids)
                gap[b, c, :used] = torch.tensor(row.gap)
                head[b, c, :used] = ~gap[b, c, :used]
                spare[b, c, :used] = torch.tensor(row.spare)
                if row.first is not None:
                    first[b, c, :used] = torch.tensor(row.first)
                    drafted[b, c] = True
        return Batch(encoder, labels, canvas, starts, gap, head, spare, first, drafted)

    def _row(self, shape: ExampleShape) -> tuple[list[int], list[int], list[_Canvas]]:
        """Encoder ids, the labels of the first of them, and the canvases."""
        if self._rng.random() < shape.repeated:
            first = max(astuple(self._controls)) + 1
            vocab = self._tokenizer.vocab_tokens
            return (*repeated_phrases(shape.encoder_tokens, first, vocab, self._rng), [])
        ids, canvases = self._sequence(shape)
        return ids, ids[1:], canvases

    def _sequence(self, shape: ExampleShape) -> tuple[list[int], list[_Canvas]]:
        """Encoder ids, and the canvases on them.

        The prompt ends at the last cut, and its suffix is what follows there: as in the engine,
        and no text is both read and predicted.
        """
        text = self._rng.choices(self._texts, cum_weights=self._sizes)[0]
        length = int(shape.encoder_tokens * _CHARS_PER_TOKEN)
        start = self._rng.randrange(max(1, len(text) - length // 3))
        start = text.rfind("\n", 0, start) + 1
        if self._rng.random() < shape.renamed:
            # What is read of it, and no more: the window and the suffix behind it.
            text = self._renamer.rename(text[start : start + 2 * length], self._rng)
            start = 0
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
            if shape.canvases:
                is_last = cut is cuts[-1]
                room = (shape.gap_tokens, shape.head_tokens)
                row = self._writer.write(text, cut, *room, self._rng, is_last=is_last)
                canvases.append((len(prefix), row))
        # What is too much goes at the front, as the engine's window does.
        lost = max(0, len(before) + len(prefix) - shape.encoder_tokens)
        shift = len(before) - lost
        kept = [(at + shift, row) for at, row in canvases if at > lost]
        return before + prefix[lost:], kept

    def _cuts(self, text: str, start: int, end: int, shape: ExampleShape) -> list[Cut]:
        """Cuts that begin in `[start, end)` of text and fit the gap, in order; one near the end."""
        cuts: list[Cut] = []
        # Without canvases one cut still tells where the prompt ends.
        wanted = max(1, shape.canvases)
        for _ in range(_TRIES * wanted):
            if len(cuts) == wanted:
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
