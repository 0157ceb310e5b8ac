"""One passage on its encoded prompt: denoise its canvas, read the fills, have them judged.

    hypotheses ─denoise─▶ rows ─▶ texts ┐
    found texts, what was known before ─┴─trim─▶ candidates ─score─▶ weigh ─check─▶ choices

The second line is `judging.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from infilld.engine.canvas import CanvasLayout, Draft, Gap, read_gap
from infilld.engine.choices import GapResult
from infilld.engine.config import SamplerConfig
from infilld.engine.draft import DraftReader
from infilld.engine.draws import SeededDraws
from infilld.engine.judging import Judge, Row, Watch
from infilld.engine.passes import CanvasModel, CanvasPass, Work, together
from infilld.engine.plan import CanvasPlan, FillMethod, GapPlan, steps_for
from infilld.engine.prefixes import Prefix
from infilld.engine.ranking import Calibration, Candidate
from infilld.engine.reading import Ask, Bans, Belief, Reading
from infilld.engine.sampler import Denoised, Step, denoising
from infilld.engine.schedule import temperature
from infilld.engine.scorer import continue_greedily
from infilld.engine.stopping import AllOf, AnyOf, LowEntropy, Stable, StopRule
from infilld.engine.tokenizer import Tokenizer

# Mean over the gap alone; the reference's 0.005 is a mean over 256 rows of which most are certain.
_SURE = AllOf((Stable(passes=1), LowEntropy(mean_nats=0.05)))
# Unsure, but nothing changes any more.
_PLATEAU = AnyOf((_SURE, Stable(passes=2)))
# When the deadline strikes, text up to the first token below this probability is shown.
_SHOWN_PROBABILITY = 0.5
# Of several exact lengths so many are refined after the first pass.
_REFINED_LENGTHS = 3


@dataclass(frozen=True)
class _Start:
    """Starting canvases [R, L]; what the first pass is told; positions held [R, L]."""

    canvas: Tensor
    belief: Belief | None
    held: Tensor | None


@dataclass(kw_only=True)
class Filling:
    """One passage being filled.

    Attributes:
        model, tokenizer, sampler, method, calibration: what fills it, and how.
        filler: token of no text; None: there is none.
        plan: its layout. prefix: the encoded prompt. seed: of every draw.
        boldness: of the request. language: of the document. watch: see there.
        passes, canvas_tokens: spent so far.
        is_finished: no deadline cut the refining short.
    """

    model: CanvasModel
    tokenizer: Tokenizer
    sampler: SamplerConfig
    method: FillMethod
    calibration: Calibration | None
    filler: int | None
    plan: CanvasPlan
    prefix: Prefix
    seed: int
    boldness: float | None
    language: str | None
    watch: Watch
    passes: int = field(default=0, init=False)
    canvas_tokens: int = field(default=0, init=False)
    is_finished: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        """Start the draws and the drafts."""
        self._draws = SeededDraws(self.seed, self.model.device)
        # The sampler's own filler can be forbidden, to see what exact lengths are worth.
        self._filler = None if self.plan.lengths else self.filler
        newlines = [gap.newline for gap in self.plan.gaps]
        self._reader = DraftReader(self.tokenizer, self._filler, newlines, self.watch.shows_tokens)
        self._causal: list[Candidate] = []

    def work(self) -> Work[list[GapResult]]:
        """Denoise, and judge what came out; one result for each target."""
        self._causal = self._causal_draft()
        rows: list[Row] = []
        if not self.plan.is_settled:
            if self.plan.lengths:
                rows = yield from self._by_lengths()
            else:
                rows = yield from self._growing()
        judge = Judge(
            model=self.model,
            tokenizer=self.tokenizer,
            method=self.method,
            calibration=self.calibration,
            plan=self.plan,
            prefix=self.prefix,
            boldness=self.boldness,
            language=self.language,
            watch=self.watch,
            causal=self._causal,
        )
        return (yield from judge.work(rows))

    # The canvas.

    def _growing(self) -> Work[list[Row]]:
        """Rows of the canvas; gaps that end without a filler are doubled and go on from there."""
        layout = self.plan.layout
        starts = self._starts(layout)
        denoised = yield from self._denoised(layout, starts)
        rows = self._rows(denoised, layout)
        while not self.watch.is_late():
            full = [
                number
                for number in range(len(layout.gaps))
                if all(row.is_open[number] for row in rows)
            ]
            grown = layout.grown(full, self.model.config.canvas_tokens)
            if grown is None:
                break
            starts = [
                [
                    _longer(denoised.tokens[row, place].tolist(), gap.tokens)
                    for place, gap in zip(layout.slices, grown.gaps, strict=True)
                ]
                for row in range(len(rows))
            ]
            layout = grown
            denoised = yield from self._denoised(layout, starts)
            rows = self._rows(denoised, layout)
        return rows

    def _by_lengths(self) -> Work[list[Row]]:
        """Rows of the lengths that look best after one pass, for models without a filler."""
        (gap,), (given,) = self.plan.layout.gaps, self.plan.layout.given
        drafts = {len(draft.tokens): draft for draft in reversed(self.plan.gaps[0].drafts)}
        lengths = sorted({*self.plan.lengths, *(n for n in drafts if n <= gap.limit_tokens)})
        layouts = {n: CanvasLayout((_exactly(gap, n),), (given,)) for n in lengths if n}
        begun = {n: self._canvas(layout, [[None]]) for n, layout in layouts.items()}
        passes = [
            CanvasPass(begun[n].canvas, self.prefix.cache, begun[n].belief, self._first_ask(layout))
            for n, layout in layouts.items()
        ]
        readings = dict(zip(layouts, (yield passes), strict=True))
        self.passes += 1
        self.watch.check()
        support = {n: _support(readings[n], n, bool(given)) for n in layouts}
        best = sorted(layouts, key=lambda n: -support[n])[:_REFINED_LENGTHS]
        works = [self._denoised(layouts[n], [[None]], first=(begun[n], readings[n])) for n in best]
        drafted = [n for n in drafts if n in layouts]
        works += [self._denoised(layouts[n], [[drafts[n]]]) for n in drafted]
        all_denoised = yield from together(works)
        return [
            row
            for n, denoised in zip([*best, *drafted], all_denoised, strict=True)
            for row in self._rows(denoised, layouts[n])
        ]

    def _starts(self, layout: CanvasLayout) -> list[list[Draft | None]]:
        """What each hypothesis starts from, gap by gap; None: noise."""
        drafts = [list(gap.drafts) for gap in self.plan.gaps]
        drafts[0] += [Draft(each.tokens) for each in self._causal]
        most = max(map(len, drafts))
        starts: list[list[Draft | None]] = [
            [own[row] if row < len(own) else None for own in drafts] for row in range(most)
        ]
        return starts + [[None] * len(layout.gaps)] * self.plan.noise_rows

    def _canvas(self, layout: CanvasLayout, starts: Sequence[Sequence[Draft | None]]) -> "_Start":
        """Starting canvases."""
        rows, vocab = len(starts), self.model.config.vocab_tokens
        canvas = self._draws.first_canvas(rows, layout.tokens, vocab)
        pins = layout.pins(rows, self.model.device)
        canvas, known = pins.impose(canvas), pins.mask.clone()
        for row, drafts in enumerate(starts):
            for draft, gap, place in zip(drafts, layout.gaps, layout.slices, strict=True):
                if draft is None:
                    continue
                tokens = list(draft.tokens[: gap.tokens])
                meant = list(draft.known or [True] * len(tokens))[: gap.tokens]
                if self._filler is not None:
                    spare = gap.tokens - len(tokens)
                    tokens, meant = tokens + [self._filler] * spare, meant + [True] * spare
                at = torch.arange(place.start, place.start + len(tokens), device=canvas.device)
                at = at[torch.tensor(meant, dtype=torch.bool, device=canvas.device)]
                chosen = [token for token, is_meant in zip(tokens, meant, strict=True) if is_meant]
                canvas[row, at] = torch.tensor(chosen, dtype=torch.int64, device=canvas.device)
                known[row, at] = True
        held = known & ~pins.mask if self.method.holds_drafts else None
        if not self.method.tells_given:
            return _Start(canvas, None, held)
        return _Start(canvas, Belief.of_known(canvas, known), held)

    def _denoised(
        self,
        layout: CanvasLayout,
        starts: Sequence[Sequence[Draft | None]],
        *,
        first: tuple["_Start", Reading] | None = None,
    ) -> Work[Denoised]:
        """Refine the canvases; `first` is the start and the reading of a pass that was done."""
        rows = len(starts)
        start, reading = (self._canvas(layout, starts), None) if first is None else first
        self.watch.check()
        before = self.passes
        most = min(self.sampler.max_steps, steps_for(layout, self.plan.most_steps))
        stop: StopRule = _PLATEAU if self.method.plateau else _SURE
        denoised = yield from denoising(
            self.prefix.cache,
            start.canvas,
            replace(self.sampler, max_steps=most),
            self._draws,
            vocab_tokens=self.model.config.vocab_tokens,
            stop=stop,
            pins=layout.pins(rows, self.model.device),
            banned=self._bans(layout),
            greedy=not self.method.samples,
            belief=start.belief,
            belief_tokens=self.model.belief_tokens,
            held=start.held,
            is_draft=any(draft is not None for row in starts for draft in row),
            reading=reading,
            on_step=lambda step: self._watch(step, layout, before),
            is_late=self.watch.is_late,
        )
        # Canvases side by side share their passes.
        self.passes = max(self.passes, before + denoised.passes - (first is not None))
        self.canvas_tokens += layout.tokens * rows
        self.is_finished = self.is_finished and not self.watch.is_late()
        return denoised

    def _first_ask(self, layout: CanvasLayout) -> Ask:
        """What the first pass of a length is asked: also how likely what is given is behind it."""
        most = min(self.sampler.max_steps, steps_for(layout, self.plan.most_steps))
        pins = layout.pins(1, self.model.device)
        return Ask(
            temperature=temperature(0, replace(self.sampler, max_steps=most)),
            pins=pins,
            banned=self._bans(layout),
            draws=self._draws if self.method.samples else None,
            top=self.model.belief_tokens,
            weighed=pins.tokens,
        )

    def _bans(self, layout: CanvasLayout) -> Bans:
        vocab, never = self.model.config.vocab_tokens, self._never_written()
        banned = layout.banned(self.tokenizer, vocab, never=never, filler=self._filler)
        return banned.to(self.model.device)

    def _never_written(self) -> Sequence[int]:
        filler = {self._filler}
        return sorted({*self.plan.prompt.banned, *self.tokenizer.control_ids} - filler - self._ends)

    @property
    def _ends(self) -> frozenset[int]:
        """Tokens that may end a fill, where nothing is pinned behind it."""
        is_open = not self.plan.prompt.suffix_follows
        return frozenset(self.plan.prompt.ends) if is_open else frozenset()

    def _watch(self, step: Step, layout: CanvasLayout, before: int) -> None:
        self.watch.check()
        if self.watch.on_drafts is not None:
            self.watch.on_drafts(self._reader.read(step, layout), before + step.index + 1)

    def _causal_draft(self) -> list[Candidate]:
        """What the encoder writes by itself, as one candidate, or none."""
        if not self.plan.causal_tokens or self.plan.is_settled or self.watch.is_late():
            return []
        gap = self.plan.layout.gaps[0]
        # The first position may have to write the stem again; the others may not end the line.
        banned = CanvasLayout((_exactly(gap, 2),), ((),)).banned(
            self.tokenizer,
            self.model.config.vocab_tokens,
            never=sorted(self.tokenizer.control_ids),
            filler=None,
        )
        tokens = continue_greedily(
            self.model,
            self.prefix,
            banned.dense().to(self.model.device),
            frozenset(self.tokenizer.newline_ids),
            self.plan.causal_tokens,
        )
        if len(tokens) < max(1, gap.min_tokens):
            return []
        text = self._text(tokens, gap.stem)
        return [Candidate(text, tuple(tokens), is_causal=True)] if text is not None else []

    # What came out.

    def _rows(self, denoised: Denoised, layout: CanvasLayout) -> list[Row]:
        return [self._row(denoised, row, layout) for row in range(len(denoised.tokens))]

    def _row(self, denoised: Denoised, number: int, layout: CanvasLayout) -> Row:
        row = Row([], [])
        for gap, plan, place in zip(layout.gaps, self.plan.gaps, layout.slices, strict=True):
            tokens: list[int] = denoised.tokens[number, place].tolist()
            places = read_gap(tokens, self._filler)
            ended = next((at for at in places if tokens[at] in self._ends), None)
            row.is_open.append(len(places) == gap.tokens and ended is None)
            if ended is not None:
                places = [at for at in places if at < ended]
            if not bool(denoised.converged[number]) and self.watch.is_late():
                low = math.log(_SHOWN_PROBABILITY)
                logs: list[float] = denoised.log_probability[number, place].tolist()
                end = next((at for at in places if logs[at] < low), gap.tokens)
                # Of an old text no beginning may be left: all of it is new, or none.
                is_old = bool(plan.target.selection)
                places = [] if is_old else [at for at in places if at < end]
            kept = [tokens[at] for at in places]
            text = self._text(kept, gap.stem) or ""
            row.texts.append(self._ended(text, plan, is_ended=ended is not None))
        return row

    def _text(self, tokens: Sequence[int], stem: str) -> str | None:
        """Text of a fill; None where it does not begin with the stem."""
        text = self.tokenizer.text(tokens)
        return text[len(stem) :] if text.startswith(stem) else None

    def _ended(self, text: str, plan: GapPlan, *, is_ended: bool) -> str:
        """Text up to the line that ends an answer, where nothing is pinned behind it.

        Its last line ends as that of the selection does.
        """
        prompt = self.plan.prompt
        if prompt.suffix_follows:
            return text
        at = f"\n{text}".find(f"\n{prompt.closing}") if prompt.closing else -1
        if at < 0 and not is_ended:
            return text
        text = (text if at < 0 else text[:at]).removesuffix("\n")
        return text + "\n" * plan.target.selection.endswith("\n")


def _longer(tokens: list[int], length: int) -> Draft:
    """What a canvas wrote, with noise in the positions that it gained."""
    more = length - len(tokens)
    return Draft((*tokens, *[0] * more), (*[True] * len(tokens), *[False] * more))


def _exactly(gap: Gap, tokens: int) -> Gap:
    """The gap with just so many tokens."""
    return replace(gap, tokens=tokens, limit_tokens=tokens, min_tokens=min(gap.min_tokens, tokens))


def _support(reading: Reading, length: int, has_given: bool) -> float:
    """How well a length fits after one pass over one row: the larger, the better.

    Mean of the best log-probabilities in the gap, and of the pinned tokens behind it.
    """
    inner = float(reading.log_probability[0, :length].mean())
    if not has_given or reading.weighed is None:
        return inner
    return inner + float(reading.weighed[0, length:].mean())
