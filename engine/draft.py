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
    """Reads steps as drafts of the row that is best now; one reader for a whole request.

    With several rows nothing is called settled: which of them comes first is known only when all
    are finished and scored.

    Attributes:
        tokenizer: vocabulary. filler: id of the filler token. newline: line end of the document.
    """

    tokenizer: Tokenizer
    filler: int
    newline: str = "\n"
    _argmax: torch.Tensor | None = field(default=None, init=False)
    _shown: str = field(default="", init=False)

    def read(self, step: Step, canvas: GapCanvas) -> tuple[DraftSpan, bool]:
        """The draft of this step, and whether it takes back text that was settled."""
        gap = canvas.gap_tokens
        row = int(step.log_probability[:, :gap].mean(-1).argmax())
        tokens: list[int] = step.argmax[row, :gap].tolist()
        places = read_gap(tokens, self.filler)
        text = self._text([tokens[i] for i in places])
        lead = self._lead(step, gap)
        settled = self._text([tokens[i] for i in places if i < lead])
        revised = not text.startswith(self._shown)
        if revised or len(settled) > len(self._shown):
            # Settled text never shrinks unless it is taken back.
            self._shown = settled if text.startswith(settled) else ""
        return DraftSpan(text, len(self._shown)), revised

    def _lead(self, step: Step, gap: int) -> int:
        """Length of the steady and certain start of a lone row."""
        before, self._argmax = self._argmax, step.argmax
        if before is None or before.shape != step.argmax.shape or len(step.argmax) > 1:
            return 0
        certain = step.log_probability[0, :gap].exp() >= _SETTLED_PROBABILITY
        steady: list[bool] = (certain & (before[0, :gap] == step.argmax[0, :gap])).tolist()
        return next((i for i, is_steady in enumerate(steady) if not is_steady), gap)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.text(tokens).replace("\n", self.newline)
