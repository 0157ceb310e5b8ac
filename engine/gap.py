"""One gap on its encoded prompt: denoise it as planned, read the fills, weigh them.

The encoder scores what the canvas wrote: the canvas's own last probabilities are near 1 whatever
it settled on, the causal likelihood of the finished text is not.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.canvas import banned_tokens, read_gap
from infilld.engine.config import SamplerConfig
from infilld.engine.draft import DraftReader
from infilld.engine.draws import SeededDraws
from infilld.engine.model import DiffusionGemma
from infilld.engine.plan import GapPlan
from infilld.engine.prompt import Controls
from infilld.engine.ranking import Calibration, Candidate, Weighed, weigh
from infilld.engine.request import (
    Alternative,
    CanvasUpdate,
    InfillResult,
    Reason,
    SpanFill,
)
from infilld.engine.sampler import Denoised, Step, denoise
from infilld.engine.scorer import continue_greedily, score
from infilld.engine.stopping import AllOf, LowEntropy, Stable
from infilld.engine.syntax import Surroundings
from infilld.engine.tokenizer import Tokenizer

# Mean over the gap alone; the reference's 0.005 is a mean over 256 rows of which most are certain.
_STOP = AllOf((Stable(passes=1), LowEntropy(mean_nats=0.05)))
# When the deadline strikes, text up to the first token below this probability is shown.
_SHOWN_PROBABILITY = 0.5


@dataclass
class _Fill:
    """One row's fill: its text and tokens, and whether the gap was full, without a filler."""

    text: str
    tokens: list[int]
    is_open: bool


@dataclass(kw_only=True)
class GapRun:
    """One gap being filled.

    Attributes:
        model, tokenizer, sampler, controls: what fills it.
        plan: its layout. cache: the encoded prompt. seed: of every draw.
        on_canvas, on_weighed, check, is_late: see `Hooks`.
        calibration: of the model; None: confidence is likelihood, and all of it is shown.
        surroundings: of the span; None: nothing is held back.
    """

    model: DiffusionGemma
    tokenizer: Tokenizer
    sampler: SamplerConfig
    controls: Controls
    plan: GapPlan
    cache: PrefixCache
    seed: int
    calibration: Calibration | None
    surroundings: Surroundings | None
    on_canvas: Callable[[CanvasUpdate], None] | None
    on_weighed: Callable[[list[Weighed]], None]
    check: Callable[[], None]
    is_late: Callable[[], bool]
    _causal: list[Candidate] = field(default_factory=list, init=False)
    _updates: int = field(default=0, init=False)
    _passes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Start the draws and the draft."""
        self._draws = SeededDraws(self.seed, self.model.device)
        self._canvas = self.plan.canvas
        self._reader = DraftReader(self.tokenizer, self.controls.filler, self.plan.newline)

    def finish(self, result: InfillResult) -> InfillResult:
        """Denoise, and put the fills or the reason into the result."""
        self._causal = self._causal_draft()
        denoised, fills = self._denoise(None)
        limit = self.plan.limit_tokens
        while all(fill.is_open for fill in fills) and self._canvas.gap_tokens < limit:
            if self.is_late():
                break
            draft = denoised.tokens[:, : self._canvas.gap_tokens]
            self._canvas = self._canvas.grown(min(limit, 2 * self._canvas.gap_tokens))
            denoised, fills = self._denoise(draft)
        usage = replace(
            result.usage,
            canvas_tokens=self._canvas.canvas_tokens * self._rows,
            passes=self._passes,
        )
        candidates = self._candidates(fills)
        judged = list(self.plan.judged)
        logs = score(self.model, self.cache, [[*each.tokens, *judged] for each in candidates])
        weighed = weigh(candidates, logs, self.calibration)
        self.on_weighed(weighed)
        shown, reason, why = self._shown(weighed)
        return replace(result, alternatives=shown, reason=reason, why=why, usage=usage)

    def _candidates(self, fills: list[_Fill]) -> list[Candidate]:
        """Every text once: what the hypotheses wrote, what was found, what was expected."""
        written = Counter(fill.text for fill in fills if fill.text)
        tokens = {fill.text: tuple(fill.tokens) for fill in reversed(fills)}
        # A draft comes with its own tokens; what a canvas made of it may be the same text.
        drafts = {draft.text: draft for draft in (*self._causal, *self.plan.found) if draft.text}
        evidence = {draft.text: draft.evidence for draft in self.plan.found}
        causal = {draft.text for draft in self._causal}
        return [
            Candidate(
                text,
                drafts[text].tokens if text in drafts else tokens[text],
                rows=written[text] / len(fills),
                evidence=evidence.get(text, 0.0),
                is_causal=text in causal,
            )
            for text in dict.fromkeys((*written, *drafts))
        ]

    def _shown(self, weighed: list[Weighed]) -> tuple[tuple[Alternative, ...], Reason, str]:
        """The best candidates, as many as are wanted, or why there are none."""
        if not weighed:
            if self.is_late():
                return (), "deadline", "The deadline struck before any text was certain."
            return (), "empty", "The model wrote no text for this span."
        kept, reason, why = self._held_back(weighed)
        start, end = self.plan.span.start, self.plan.span.end
        shown = []
        for each in kept[: self.plan.alternatives]:
            text = each.candidate.text.replace("\n", self.plan.newline)
            span = SpanFill(start, end, text, each.confidence)
            shown.append(Alternative((span,), each.score))
        return tuple(shown), reason, why

    def _held_back(self, weighed: list[Weighed]) -> tuple[list[Weighed], Reason, str]:
        """What is left when the improbable and the breaking are taken out, and the reason if none.

        Only as many are parsed as are wanted.
        """
        if self.surroundings is None:
            return weighed, "ok", ""
        least = 0.0 if self.calibration is None else self.calibration.show_above
        likely = [each for each in weighed if each.confidence >= least]
        if not likely:
            best = weighed[0].confidence
            return [], "low_confidence", f"The best text is right with a chance of {best:.0%}."
        kept: list[Weighed] = []
        for each in likely:
            if len(kept) == self.plan.alternatives:
                break
            if not self.surroundings.are_broken_by(each.candidate.text):
                kept.append(each)
        if not kept:
            return [], "does_not_parse", "Every likely text would break the syntax around it."
        return kept, "ok", ""

    def _denoise(self, draft: Tensor | None) -> tuple[Denoised, list[_Fill]]:
        rows, vocab = self._rows, self.model.config.vocab_tokens
        canvas = self._draws.first_canvas(rows, self._canvas.canvas_tokens, vocab)
        if draft is not None:
            canvas[:, : draft.shape[1]] = draft
        else:
            self._seed_drafts(canvas)
        banned = banned_tokens(
            self.tokenizer,
            self.controls,
            self._canvas,
            vocab,
            one_line=self.plan.one_line,
            min_tokens=self.plan.min_tokens,
        )
        self.check()
        denoised = denoise(
            self.model,
            self.cache,
            canvas,
            replace(self.sampler, max_steps=self._max_steps()),
            self._draws,
            stop=_STOP,
            pins=self._canvas.pins(rows, self.model.device),
            banned=banned.to(self.model.device),
            greedy=True,
            on_step=self._watch,
            is_late=self.is_late,
        )
        self._passes += denoised.passes
        return denoised, [self._fill(denoised, row) for row in range(rows)]

    @property
    def _drafts(self) -> list[Candidate]:
        """What hypotheses start from; the others start from noise."""
        return [*self.plan.found[: self.plan.drafted], *self._causal]

    @property
    def _rows(self) -> int:
        """Hypotheses, R."""
        return len(self._drafts) + self.plan.alternatives

    def _causal_draft(self) -> list[Candidate]:
        """What the encoder writes by itself, as one candidate, or none."""
        if not self.plan.causal_tokens or self.is_late():
            return []
        banned = torch.zeros(self.model.config.vocab_tokens, dtype=torch.bool)
        banned[sorted(self.tokenizer.control_ids)] = True
        banned[self.tokenizer.vocab_tokens :] = True
        banned[list(self.tokenizer.carriage_return_ids)] = True
        tokens = continue_greedily(
            self.model,
            self.cache,
            banned.to(self.model.device),
            frozenset(self.tokenizer.newline_ids),
            self.plan.causal_tokens,
        )
        if len(tokens) < max(1, self.plan.min_tokens):
            return []
        return [Candidate(self.tokenizer.text(tokens), tuple(tokens), is_causal=True)]

    def _seed_drafts(self, canvas: Tensor) -> None:
        """Put the drafts into the first rows of a canvas [R, L], fillers behind them."""
        gap = self._canvas.gap_tokens
        for row, draft in enumerate(self._drafts):
            canvas[row, :gap] = self.controls.filler
            tokens = torch.tensor(draft.tokens[:gap], device=canvas.device)
            canvas[row, : len(tokens)] = tokens

    def _max_steps(self) -> int:
        """Steps for this gap; few for a short one, since the temperature falls over all of them."""
        wanted = 4 + math.ceil(self._canvas.gap_tokens / 6)
        return min(self.sampler.max_steps, max(6, min(24, wanted)))

    def _watch(self, step: Step) -> None:
        self.check()
        if self.on_canvas is not None:
            span, revised = self._reader.read(step, self._canvas)
            passes = self._passes + step.index + 1
            self.on_canvas(CanvasUpdate(self._updates, 0, passes, (span,), revised))
            self._updates += 1

    def _fill(self, denoised: Denoised, row: int) -> _Fill:
        gap = self._canvas.gap_tokens
        tokens: list[int] = denoised.tokens[row, :gap].tolist()
        places = read_gap(tokens, self.controls.filler)
        is_open = len(places) == gap
        if not bool(denoised.converged[row]) and self.is_late():
            low = math.log(_SHOWN_PROBABILITY)
            logs: list[float] = denoised.log_probability[row, :gap].tolist()
            end = next((place for place in places if logs[place] < low), gap)
            places = [place for place in places if place < end]
        kept = [tokens[place] for place in places]
        return _Fill(self.tokenizer.text(kept), kept, is_open)
