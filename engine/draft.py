"""The drafts of gaps while they are being denoised: their text, and how much of it is settled."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from infilld.engine.canvas import CanvasLayout, read_gap
from infilld.engine.request import CanvasToken, DraftSpan
from infilld.engine.sampler import Step
from infilld.engine.tokenizer import Tokenizer

# A position is settled when its argmax stayed the same and is at least this probable.
_SETTLED_PROBABILITY = 0.9


@dataclass(frozen=True)
class CanvasDraft:
    """What a canvas holds after a step.

    Attributes:
        spans: the draft of each gap. is_revised: text that was settled is taken back.
        tokens: position by position, if wanted; `span` counts the gaps of this canvas.
    """

    spans: tuple[DraftSpan, ...]
    is_revised: bool = False
    tokens: tuple[CanvasToken, ...] = ()


@dataclass
class DraftReader:
    """Reads steps as drafts of the row that is best now; one reader for a whole canvas.

    With several rows no text is called settled: which of them comes first is known only when all
    are finished and scored. A token may be: that says no more than what its own row holds on to.

    Attributes:
        tokenizer: vocabulary. filler: id of the filler token; None: there is none.
        newlines: line end of the document at each gap. shows_tokens: whether tokens are wanted.
    """

    tokenizer: Tokenizer
    filler: int | None
    newlines: Sequence[str]
    shows_tokens: bool = False
    _argmax: torch.Tensor | None = field(default=None, init=False)
    _shown: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Nothing is shown yet."""
        self._shown = [""] * len(self.newlines)

    def read(self, step: Step, layout: CanvasLayout) -> CanvasDraft:
        """The drafts of this step."""
        free = torch.zeros(layout.tokens, dtype=torch.bool, device=step.argmax.device)
        for place in layout.slices:
            free[place] = True
        row = _best_row(step, free, self.filler)
        before, self._argmax = self._argmax, step.argmax
        is_steady = steady(step, row, before)
        is_alone = len(step.argmax) == 1
        drafts, is_revised = [], False
        for number, (gap, place) in enumerate(zip(layout.gaps, layout.slices, strict=True)):
            tokens: list[int] = step.argmax[row, place].tolist()
            places = read_gap(tokens, self.filler)
            text = self._text([tokens[i] for i in places], gap.stem, number)
            is_held: list[bool] = is_steady[place].tolist() if is_alone else [False] * gap.tokens
            lead = next((i for i, settled in enumerate(is_held) if not settled), gap.tokens)
            settled = self._text([tokens[i] for i in places if i < lead], gap.stem, number)
            shown = self._shown[number]
            revised = not text.startswith(shown)
            if revised or len(settled) > len(shown):
                # Settled text never shrinks unless it is taken back.
                shown = settled if text.startswith(settled) else ""
            self._shown[number] = shown
            drafts.append(DraftSpan(text, len(shown)))
            is_revised = is_revised or revised
        tokens_shown: tuple[CanvasToken, ...] = ()
        if self.shows_tokens:
            tokens_shown = self._tokens(step, row, is_steady, layout)
        return CanvasDraft(tuple(drafts), is_revised, tokens_shown)

    def _tokens(
        self, step: Step, row: int, is_steady: torch.Tensor, layout: CanvasLayout
    ) -> tuple[CanvasToken, ...]:
        """A row position by position: the gaps, and what is given behind each."""
        found = canvas_tokens(step, row, is_steady, self.tokenizer, self.filler)
        shown: list[CanvasToken] = []
        gaps = zip(layout.gaps, layout.given, layout.slices, self.newlines, strict=True)
        for number, (gap, given, place, newline) in enumerate(gaps):
            stem = gap.stem
            for each in found[place]:
                # What the first token writes again stands before the gap already.
                text, stem = each.text.removeprefix(stem), ""
                shown.append(replace(each, text=text.replace("\n", newline), span=number))
            for each in found[place.stop : place.stop + len(given)]:
                text = each.text.replace("\n", newline)
                shown.append(replace(each, text=text, entropy_nats=0.0, state="given"))
        return tuple(shown)

    def _text(self, tokens: list[int], stem: str, number: int) -> str:
        text = self.tokenizer.text(tokens).removeprefix(stem)
        return text.replace("\n", self.newlines[number])


def _best_row(step: Step, free: torch.Tensor, filler: int | None) -> int:
    """The row whose text is the most probable, a token on average, in the positions [L] `free`.

    Fillers are certain in nearly every row: counted too, they would let a short text win, whatever
    it says. A row that writes nothing comes last.
    """
    is_text = free & (step.argmax != (-1 if filler is None else filler))
    sums = torch.where(is_text, step.log_probability, 0.0).sum(-1)
    means = sums / is_text.sum(-1).clamp(min=1)
    return int(torch.where(is_text.any(-1), means, -torch.inf).argmax())


def steady(step: Step, row: int, before: torch.Tensor | None) -> torch.Tensor:
    """Positions [L] bool of a row that are certain and did not change.

    Args:
        step: that was done. row: of it. before: argmax of the step before [R, L]; None: no step.
    """
    if before is None or before.shape != step.argmax.shape:
        return torch.zeros_like(step.accepted[row])
    certain = step.log_probability[row].exp() >= _SETTLED_PROBABILITY
    return certain & (before[row] == step.argmax[row])


def canvas_tokens(
    step: Step, row: int, is_steady: torch.Tensor, tokenizer: Tokenizer, filler: int | None
) -> list[CanvasToken]:
    """The free positions of a row as they can be shown; what is given looks like them.

    Args:
        step: that was done. row: of it. is_steady: see `steady`.
        tokenizer: vocabulary. filler: id of the filler token; None: there is none.
    """
    tokens: list[int] = step.argmax[row].tolist()
    entropies: list[float] = step.entropy_nats[row].tolist()
    settled: list[bool] = is_steady.tolist()
    accepted: list[bool] = step.accepted[row].tolist()
    shown = []
    for at, token in enumerate(tokens):
        state: Literal["settled", "accepted", "noise"] = "accepted" if accepted[at] else "noise"
        shown.append(
            CanvasToken(
                text=tokenizer.decode([token]).decode(errors="replace"),
                entropy_nats=entropies[at],
                state="settled" if settled[at] else state,
                is_filler=token == filler,
            )
        )
    return shown
