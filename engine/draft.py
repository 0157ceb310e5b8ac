"""The draft of a gap while it is being denoised: its text, and how much of it is settled."""

from dataclasses import dataclass, field

import torch

from infilld.engine.canvas import GapCanvas, read_gap
from infilld.engine.request import DraftSpan
from infilld.engine.sampler import Step
from infilld.engine.tokenizer import Tokenizer

# A position is settled when its argmax stayed the same and is at least this probable.
_SETTLED_PROBABILITY = 0.9


@dataclass
class DraftReader:
    """Reads steps as drafts of the row that is best now; one reader per canvas.

    Attributes:
        tokenizer: vocabulary. canvas: layout of the rows. filler: id of the filler token.
        newline: line end of the document.
    """

    tokenizer: Tokenizer
    canvas: GapCanvas
    filler: int
    newline: str = "\n"
    _argmax: torch.Tensor | None = field(default=None, init=False)
    _shown: str = field(default="", init=False)

    def read(self, step: Step) -> tuple[DraftSpan, bool]:
        """The draft of this step, and whether it takes back text that was settled."""
        gap = self.canvas.gap_tokens
        row = int(step.log_probability[:, :gap].mean(-1).argmax())
        tokens: list[int] = step.argmax[row, :gap].tolist()
        steady = torch.zeros(gap, dtype=torch.bool)
        if self._argmax is not None:
            certain = step.log_probability[row, :gap].exp() >= _SETTLED_PROBABILITY
            steady = ((self._argmax[row, :gap] == step.argmax[row, :gap]) & certain).cpu()
        self._argmax = step.argmax
        places = read_gap(tokens, self.filler)
        text = self._text([tokens[i] for i in places])
        lead = next((i for i in range(gap) if not steady[i]), gap)
        settled = self._text([tokens[i] for i in places if i < lead])
        revised = not text.startswith(self._shown)
        if revised or len(settled) > len(self._shown):
            # Settled text never shrinks unless it is taken back.
            self._shown = settled if text.startswith(settled) else ""
        return DraftSpan(text, len(self._shown)), revised

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.text(tokens).replace("\n", self.newline)
