"""One gap on its encoded prompt: plan it, denoise it, read the fills, score them.

The encoder scores what the canvas wrote: the canvas's own last probabilities are near 1 whatever
it settled on, the causal likelihood of the finished text is not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.canvas import (
    GapCanvas,
    GapKind,
    banned_tokens,
    first_gap_tokens,
    head_of,
    read_gap,
)
from infilld.engine.config import ModelConfig, SamplerConfig
from infilld.engine.draft import DraftReader
from infilld.engine.draws import SeededDraws
from infilld.engine.errors import GapTooLong
from infilld.engine.found import Found
from infilld.engine.lines import line_end, unix
from infilld.engine.model import DiffusionGemma
from infilld.engine.prompt import Controls, InfillPrompt
from infilld.engine.request import (
    Alternative,
    CanvasUpdate,
    InfillRequest,
    InfillResult,
    Reason,
    Span,
    SpanFill,
)
from infilld.engine.sampler import Denoised, Step, denoise
from infilld.engine.scorer import score
from infilld.engine.stopping import AllOf, LowEntropy, Stable
from infilld.engine.tokenizer import Tokenizer

# Mean over the gap alone; the reference's 0.005 is a mean over 256 rows of which most are certain.
_STOP = AllOf((Stable(passes=1), LowEntropy(mean_nats=0.05)))
# When the deadline strikes, text up to the first token below this probability is shown.
_SHOWN_PROBABILITY = 0.5
# Room behind the longest draft.
_DRAFT_SPARE = 4
# Suffix tokens that must follow a fill: enough to tell where it has to end.
_JUDGED_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class FillMethod:
    """How gaps are filled. The defaults are best; the others are there to be compared.

    Attributes:
        found_drafts: hypotheses that start from found drafts, at most.
        pins_suffix: the canvas holds the first tokens of the suffix, pinned.
    """

    found_drafts: int = 2
    pins_suffix: bool = True


@dataclass(frozen=True, kw_only=True)
class GapPlan:
    """How a span is going to be filled.

    Attributes:
        span: what is replaced. canvas: the gap it starts with, and the pinned head.
        limit_tokens: longest the gap may grow. min_tokens: fewest tokens of text.
        drafts: tokens of the drafts that hypotheses start from, the likeliest first.
        alternatives: hypotheses that start from noise, and fills that are wanted.
        judged: suffix tokens by which fills are scored.
        one_line: no line end may be written. newline: of the document there.
    """

    span: Span
    canvas: GapCanvas
    limit_tokens: int
    min_tokens: int
    drafts: tuple[tuple[int, ...], ...]
    alternatives: int
    judged: tuple[int, ...]
    one_line: bool
    newline: str

    @property
    def rows(self) -> int:
        """Hypotheses, R."""
        return len(self.drafts) + self.alternatives


def plan_gap(
    request: InfillRequest,
    span: Span,
    kind: GapKind,
    prompt: InfillPrompt,
    tokenizer: Tokenizer,
    controls: Controls,
    config: ModelConfig,
    *,
    found: Sequence[Found] = (),
    pins_suffix: bool = True,
) -> GapPlan:
    """Lay out the gap of a span, with a hypothesis for each draft that was found.

    Raises:
        GapTooLong: a bound, or the selection, does not fit a canvas.
    """
    selection = request.text[span.start : span.end]
    head = head_of(prompt, controls)
    pinned = head if pins_suffix else ()
    room = max(1, config.canvas_tokens - len(pinned))
    selected = _selected_tokens(selection, room, tokenizer)
    first = first_gap_tokens(kind, selected, room, request.min_tokens, request.max_tokens)
    limit = request.max_tokens or room
    drafts = [tuple(tokenizer.encode(draft.text)[:limit]) for draft in found]
    # A filler behind the longest draft leaves room to lengthen it.
    longest = max((len(draft) + _DRAFT_SPARE for draft in drafts), default=0)
    return GapPlan(
        span=span,
        canvas=GapCanvas(min(limit, max(first, longest)), pinned),
        limit_tokens=limit,
        min_tokens=request.min_tokens or 0,
        drafts=tuple(dict.fromkeys(drafts)),
        alternatives=request.alternatives,
        judged=head[:_JUDGED_TOKENS],
        # Rewriting several lines may need several lines, whatever follows on the last one.
        one_line=kind == "in_line" and "\n" not in unix(selection),
        newline=line_end(request.text, span.start),
    )


def _selected_tokens(selection: str, room: int, tokenizer: Tokenizer) -> int | None:
    """Tokens of a selection; None for a gap.

    A selection that cannot fit whatever its tokens are is refused before it is tokenized: that
    would hold up every other thread for as long as it takes.
    """
    if not selection:
        return None
    least = -(-len(selection.encode()) // tokenizer.longest_bytes)
    if least > room:
        raise GapTooLong(f"the selection needs at least {least} tokens, the canvas holds {room}")
    return len(tokenizer.encode(unix(selection)))


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
        on_canvas, check, is_late: see `Hooks`.
    """

    model: DiffusionGemma
    tokenizer: Tokenizer
    sampler: SamplerConfig
    controls: Controls
    plan: GapPlan
    cache: PrefixCache
    seed: int
    on_canvas: Callable[[CanvasUpdate], None] | None
    check: Callable[[], None]
    is_late: Callable[[], bool]
    _updates: int = field(default=0, init=False)
    _passes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Start the draws and the draft."""
        self._draws = SeededDraws(self.seed, self.model.device)
        self._canvas = self.plan.canvas
        self._reader = DraftReader(self.tokenizer, self.controls.filler, self.plan.newline)

    def finish(self, result: InfillResult) -> InfillResult:
        """Denoise, and put the fills or the reason into the result."""
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
            canvas_tokens=self._canvas.canvas_tokens * self.plan.rows,
            passes=self._passes,
        )
        kept = {fill.text: fill for fill in reversed(fills) if fill.text}
        reason, why = self._reason(bool(kept))
        alternatives = self._scored(list(kept.values()))
        return replace(result, alternatives=alternatives, reason=reason, why=why, usage=usage)

    def _scored(self, fills: list[_Fill]) -> tuple[Alternative, ...]:
        """The likeliest fills, best first: every one is scored up to the same suffix tokens."""
        judged = list(self.plan.judged)
        logs = score(self.model, self.cache, [fill.tokens + judged for fill in fills])
        ranked = sorted(zip(logs, fills, strict=True), key=lambda pair: -float(pair[0].sum()))
        start, end = self.plan.span.start, self.plan.span.end
        found = []
        for each, fill in ranked[: self.plan.alternatives]:
            mean = float(each.mean())
            span = SpanFill(start, end, fill.text, math.exp(mean))
            found.append(Alternative((span,), mean))
        return tuple(found)

    def _reason(self, is_any: bool) -> tuple[Reason, str]:
        if is_any:
            return "ok", ""
        if self.is_late():
            return "deadline", "The deadline struck before any text was certain."
        return "empty", "The model wrote no text for this span."

    def _denoise(self, draft: Tensor | None) -> tuple[Denoised, list[_Fill]]:
        rows, vocab = self.plan.rows, self.model.config.vocab_tokens
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

    def _seed_drafts(self, canvas: Tensor) -> None:
        """Put the found drafts into the first rows of a canvas [R, L], fillers behind them."""
        gap = self._canvas.gap_tokens
        for row, draft in enumerate(self.plan.drafts):
            canvas[row, :gap] = self.controls.filler
            canvas[row, : len(draft)] = torch.tensor(draft, device=canvas.device)

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
        text = self.tokenizer.text(kept).replace("\n", self.plan.newline)
        return _Fill(text, kept, is_open)
