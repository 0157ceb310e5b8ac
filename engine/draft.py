"""The drafts of gaps while they are being denoised: their text, and how much of it is settled."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from infilld.engine.canvas import CanvasLayout, read_gap
from infilld.engine.request import DraftSpan
from infilld.engine.sampler import Step
from infilld.engine.tokenizer import Tokenizer

# A position is settled when its argmax stayed the same and is at least this probable.
_SETTLED_PROBABILITY = 0.9


@dataclass
class DraftReader:
    """Reads steps as drafts of the row that is best now; one reader for a whole canvas.

    With several rows nothing is called settled: which of them comes first is known only when all
    are finished and scored.

    Attributes:
        tokenizer: vocabulary. filler: id of the filler token; None: there is none.
        newlines: line end of the document at each gap.
    """

    tokenizer: Tokenizer
    filler: int | None
    newlines: Sequence[str]
    _argmax: torch.Tensor | None = field(default=None, init=False)
    _shown: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Nothing is shown yet."""
        self._shown = [""] * len(self.newlines)

    def read(self, step: Step, layout: CanvasLayout) -> tuple[list[DraftSpan], bool]:
        """The drafts of this step, and whether it takes back text that was settled."""
        free = torch.zeros(layout.tokens, dtype=torch.bool, device=step.argmax.device)
        for place in layout.slices:
            free[place] = True
        row = int(step.log_probability[:, free].mean(-1).argmax())
        is_steady = self._steady(step)
        drafts, is_revised = [], False
        for number, (gap, place) in enumerate(zip(layout.gaps, layout.slices, strict=True)):
            tokens: list[int] = step.argmax[row, place].tolist()
            places = read_gap(tokens, self.filler)
            text = self._text([tokens[i] for i in places], gap.stem, number)
            steady: list[bool] = is_steady[place].tolist()
            lead = next((i for i, settled in enumerate(steady) if not settled), gap.tokens)
            settled = self._text([tokens[i] for i in places if i < lead], gap.stem, number)
            shown = self._shown[number]
            revised = not text.startswith(shown)
            if revised or len(settled) > len(shown):
                # Settled text never shrinks unless it is taken back.
                shown = settled if text.startswith(settled) else ""
            self._shown[number] = shown
            drafts.append(DraftSpan(text, len(shown)))
            is_revised = is_revised or revised
        return drafts, is_revised

    def _steady(self, step: Step) -> torch.Tensor:
        """Positions [L] of a lone row that are certain and did not change."""
        before, self._argmax = self._argmax, step.argmax
        if before is None or before.shape != step.argmax.shape or len(step.argmax) > 1:
            return torch.zeros_like(step.accepted[0])
        certain = step.log_probability[0].exp() >= _SETTLED_PROBABILITY
        return certain & (before[0] == step.argmax[0])

    def _text(self, tokens: list[int], stem: str, number: int) -> str:
        text = self.tokenizer.text(tokens).removeprefix(stem)
        return text.replace("\n", self.newlines[number])
