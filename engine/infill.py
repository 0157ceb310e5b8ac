"""From a request to its answer: targets, passages, prompts, canvases, choices.

request ─▶ targets ─▶ passages ─plan─▶ prompt ─encode─▶ prefix ─Filling─▶ choices ┐
               ▲         └───── side by side, a canvas for each ─────┘            │
               └─ repair: doubtful tokens; long rewrite: piece after piece ◀──────┴─▶ answer,
                                                                                 or a reason
"""

import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from infilld.engine.choices import GapResult, text_tokens, with_choices
from infilld.engine.config import SamplerConfig
from infilld.engine.constrained import ConstrainedFiller
from infilld.engine.conversation import ChatRequest, ChatResult
from infilld.engine.draft import CanvasDraft
from infilld.engine.errors import GapTooLong, UnknownOption
from infilld.engine.filling import Filling
from infilld.engine.follow import Followed, Memory, State
from infilld.engine.generation import Converser
from infilld.engine.judging import Watch
from infilld.engine.languages import STARTER_LANGUAGE, language_of
from infilld.engine.layout import layout_of
from infilld.engine.lines import unix
from infilld.engine.pace import Pace
from infilld.engine.passages import Passage, Target, passage_of, targets_of
from infilld.engine.passes import CanvasModel, Work, drive, together
from infilld.engine.plan import CanvasPlan, FillMethod, Planner
from infilld.engine.prefixes import PrefixPool
from infilld.engine.prompt import Controls, PromptLayout
from infilld.engine.ranking import Calibration, Weighed
from infilld.engine.repair import doubted, pointed_at
from infilld.engine.request import (
    CanvasUpdate,
    InfillRequest,
    InfillResult,
    Span,
    Timings,
    Usage,
)
from infilld.engine.scorer import score
from infilld.engine.shown import Shown
from infilld.engine.tokenizer import Tokenizer
from infilld.engine.writing import thinking

# Prompts are cut to this many tokens even where the model could read more.
_PROMPT_TOKENS = 4096
# Passages of one request that are filled at once.
_SIDE_BY_SIDE = 4
# Canvases of text in which a repair looks for what is unlikely, and places it mends at once.
_MOST_DOUBTED_PIECES, _MOST_DOUBTED = 16, 32
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a caller may watch and stop.

    Attributes:
        on_canvas: gets a draft after every pass; None: nobody watches.
        on_weighed: gets every candidate of every gap, the best first, before one is chosen.
        check: called before encoding, between its pieces, before denoising and after every pass;
            what it raises ends the request.
        deadline_at: `time.monotonic()` reading, seconds; None: no deadline.
    """

    on_canvas: Callable[[CanvasUpdate], None] | None = None
    on_weighed: Callable[[list[Weighed]], None] = lambda weighed: None
    check: Callable[[], None] = lambda: None
    deadline_at: float | None = None

    def is_late(self, needed_s: float = 0.0) -> bool:
        """Whether the deadline has struck, or will before so many seconds have gone."""
        return self.deadline_at is not None and time.monotonic() + needed_s >= self.deadline_at


class _Struck(Exception):
    """The deadline struck before there was a canvas to show."""


@dataclass(frozen=True)
class _Filled:
    """Results for the targets of a passage, in order, and what they cost."""

    results: list[GapResult]
    usage: Usage


@dataclass(kw_only=True)
class _Job:
    """One request on its way.

    Attributes:
        request, hooks, seed: see there. language: of the document, as far as it is known.
        shown: to whoever watches.
    """

    request: InfillRequest
    hooks: Hooks
    seed: int
    language: str | None
    shown: Shown
    encode_s: float = field(default=0.0, init=False)


class Infiller:
    """Serves infill requests with one model; not for several threads.

    Args:
        model: weights. tokenizer: its vocabulary. sampler: its generation configuration.
        method: how gaps are filled. calibration: of the model's confidence, if it has one.
        layout: of its prompts; None: that of its infill marks.

    Raises:
        Unsupported: no layout is known for the model.
    """

    def __init__(
        self,
        model: CanvasModel,
        tokenizer: Tokenizer,
        sampler: SamplerConfig,
        method: FillMethod | None = None,
        calibration: Calibration | None = None,
        layout: PromptLayout | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.method, self.calibration = method or FillMethod(), calibration
        self.layout = layout or layout_of(tokenizer, None)
        self.controls = Controls.of(tokenizer)
        self.pace = Pace()
        self._prefixes = PrefixPool(model)
        self._converser = Converser(model, tokenizer, sampler, self.layout, self._prefixes)
        self._memory = Memory()
        self._planner = Planner(
            tokenizer, self.layout, model.config, self.prompt_tokens, self.method
        )
        self._constrained = ConstrainedFiller(
            model,
            tokenizer,
            sampler,
            self._planner,
            self._prefixes,
            self.layout.filler,
            self._converser.grammar_tokens,
        )

    @property
    def can_think(self) -> bool:
        """Whether the model may be asked to think before it answers."""
        return self._converser.can_think

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt that is encoded."""
        return min(_PROMPT_TOKENS, max(8, self.model.context_tokens))

    @property
    def awaits_prefix(self) -> bool:
        """Whether work waits until other work gives an encoded prefix back."""
        return self._prefixes.is_awaited

    def infill(self, request: InfillRequest, hooks: Hooks | None = None) -> InfillResult:
        """Fill the spans of a request; see `work`."""
        return drive(self.model, self.work(request, hooks))

    def work(self, request: InfillRequest, hooks: Hooks | None = None) -> Work[InfillResult]:
        """Fill the spans of a request, as work that can share its passes with others.

        Raises:
            Unsupported: more than the loaded model can do.
            GapTooLong: the fill would not fit a canvas. ContextTooLong: the prompt not the model.
            ModelError: the model's output means nothing.
        """
        started = time.monotonic()
        seed = secrets.randbits(63) if request.seed is None else request.seed
        language = language_of(request.path, request.language, unnamed=STARTER_LANGUAGE)
        hooks = hooks or Hooks()
        shown = Shown(request, hooks.on_canvas)
        job = _Job(request=request, hooks=hooks, seed=seed, language=language, shown=shown)
        result = InfillResult(id=secrets.token_hex(8), seed=seed)
        if "\0" in request.text:
            why = "The text looks binary: it holds NUL characters."
            return replace(result, reason="filtered", why=why)
        result = yield from self._answered(job, result)
        total = time.monotonic() - started
        timings = Timings(
            encode_ms=1e3 * job.encode_s,
            denoise_ms=1e3 * (total - job.encode_s),
            total_ms=1e3 * total,
        )
        return replace(result, timings=timings)

    def conversing(self, request: ChatRequest, hooks: Hooks) -> Work[ChatResult]:
        """Write the next turn of a conversation; see `Converser.work`."""
        return self._converser.work(request, hooks)

    def forget(self) -> None:
        """Drop every encoded prefix, and what was computed for documents."""
        self._prefixes.clear()
        self._memory.clear()

    def _answered(self, job: _Job, result: InfillResult) -> Work[InfillResult]:
        """The result with its alternatives, or with the reason for none."""
        targets = targets_of(job.request)
        if job.request.warm:
            targets = targets[:1]
        elif job.request.grammar is not None:
            return (yield from self._matching(job, targets[0], result))
        elif job.request.repair is not None:
            targets = yield from self._suspected(job, targets)
            if not targets:
                why = "Nothing in the selected text looks wrong."
                return replace(result, reason="empty", why=why)
        split = {target: self._pieces(job, target) for target in targets}
        if job.request.warm:
            split = {target: pieces[:1] for target, pieces in split.items()}
        long = {target: pieces for target, pieces in split.items() if len(pieces) > 1}
        job.shown.begin([piece for pieces in split.values() for piece in pieces])
        short = [target for target in targets if target not in long]
        works = []
        for passage in self._planner.passages(job.request, short):
            # Planned before anything is computed: what cannot fit is refused, not tried.
            followed = self._followed(job, passage)
            plan = self._planner.plan(job.request, passage, followed)
            works.append(self._filled(job, plan))
        works += [self._rewritten(job, target, pieces) for target, pieces in long.items()]
        filled: list[_Filled] = []
        passes = 0
        # A few at a time: each holds an encoded prompt, and others want their turn.
        for some in _batches(works, _SIDE_BY_SIDE):
            done = yield from together(some)
            # Canvases side by side share their passes.
            passes += max(each.usage.passes for each in done)
            filled += done
        results = [one for each in filled for one in each.results]
        usage = Usage(
            prompt_tokens=sum(each.usage.prompt_tokens for each in filled),
            cached_tokens=sum(each.usage.cached_tokens for each in filled),
            canvas_tokens=sum(each.usage.canvas_tokens for each in filled),
            passes=passes,
            text_tokens=text_tokens(results),
        )
        ordered = [*short, *(piece for target in long for piece in long[target])]
        return replace(with_choices(job.request, result, ordered, results), usage=usage)

    def _matching(self, job: _Job, target: Target, result: InfillResult) -> Work[InfillResult]:
        """The result with texts that match the request's grammar."""
        job.shown.begin([target])

        def on_draft(draft: CanvasDraft, passes: int) -> None:
            job.shown.show([target], draft, passes)

        is_watched = job.hooks.on_canvas is not None
        filled = yield from self._constrained.work(
            job.request, target, job.hooks, job.seed, on_draft if is_watched else None
        )
        job.encode_s = filled.encode_s
        results = [filled.result]
        usage = replace(filled.usage, text_tokens=text_tokens(results))
        return replace(with_choices(job.request, result, [target], results), usage=usage)

    def _pieces(self, job: _Job, target: Target) -> list[Target]:
        """A selection that is too long for a canvas, in pieces of whole lines."""
        if not target.selection or target.is_suspect:
            return [target]
        raw = job.request.text[target.span.start : target.span.end]
        lengths = self._planner.pieces(_LINE.findall(raw))
        if len(lengths) == 1:
            return [target]
        if target.draft is not None:
            raise UnknownOption(
                "a draft for a selection of several canvases",
                remedy="Leave the draft out, or select less.",
            )
        pieces, at = [], target.span.start
        for number, length in enumerate(lengths):
            span = Span(at, at + length)
            piece = Target(
                number=target.number,
                span=span,
                selection=unix(job.request.text[span.start : span.end]),
                start=target.start if number == 0 else "",
                end=target.end if number == len(lengths) - 1 else "",
            )
            pieces.append(piece)
            at += length
        return pieces

    def _rewritten(self, job: _Job, target: Target, pieces: Sequence[Target]) -> Work[_Filled]:
        """A long selection, canvas after canvas; each sees what was written before it."""
        results: list[GapResult] = []
        costs: list[Usage] = []
        whole = passage_of(job.request.text, [target])
        before = whole.before
        for number, piece in enumerate(pieces):
            if results and job.hooks.is_late():
                why = "The deadline struck before all of the selection was written."
                nothing = GapResult(choices=(), reason="deadline", why=why, texts=())
                results += [nothing] * (len(pieces) - number)
                break
            rest = "".join(later.selection for later in pieces[number + 1 :])
            passage = Passage(
                before=before, targets=(piece,), between=(), after=whole.after, head=rest or None
            )
            filled = yield from self._filled(job, self._planner.plan(job.request, passage))
            (result,) = filled.results
            results.append(result)
            costs.append(filled.usage)
            before += result.choices[0].text if result.choices else piece.selection
            written = result.choices[0].text if result.choices else None
            job.shown.finish(piece, written, filled.usage.passes)
        return _Filled(results, _sum(costs))

    def _followed(self, job: _Job, passage: Passage) -> Followed | None:
        """What is known of a gap from before the last keystroke."""
        document = job.request.document
        if document is None or not self.method.follows or not _can_follow(job.request, passage):
            return None
        return self._memory.follow(document, passage.before, passage.after, _asked(job.request))

    def _filled(self, job: _Job, plan: CanvasPlan) -> Work[_Filled]:
        """Encode a prompt, and fill its passage."""
        request, hooks = job.request, job.hooks
        usage = Usage(prompt_tokens=len(plan.prompt_ids))

        def struck(why: str) -> _Filled:
            nothing = GapResult(choices=(), reason="deadline", why=why, texts=())
            return _Filled([nothing] * len(plan.gaps), usage)

        def check() -> None:
            hooks.check()
            if hooks.is_late(pace.piece_s):
                if not hooks.is_late():
                    pace.ease()
                raise _Struck

        # The times of what is suspended for others say nothing.
        pace = Pace() if request.background else self.pace
        began = time.monotonic()
        try:
            check()
            ids = plan.prompt_ids
            if plan.prompt.thought_ends and not request.warm:
                ids = yield from thinking(
                    self.model,
                    self.tokenizer,
                    self.sampler,
                    self._prefixes,
                    plan.prompt,
                    job.seed,
                    check,
                )
            encoding = self._prefixes.encoding(ids, pace.timed(check))
            prefix, cached = yield from encoding
        except _Struck:
            return struck("The deadline struck before the first pass.")
        finally:
            job.encode_s = max(job.encode_s, time.monotonic() - began)
        try:
            usage = replace(usage, cached_tokens=cached)
            if request.warm:
                why = "Only the prompt was encoded, as asked."
                nothing = GapResult(choices=(), reason="empty", why=why, texts=())
                return _Filled([nothing] * len(plan.gaps), usage)
            if hooks.is_late(pace.needed_s(passes=0 if plan.is_settled else 1)):
                if not hooks.is_late():
                    pace.ease()
                return struck("The deadline left no time for a pass.")
            targets = plan.passage.targets
            on_drafts = None
            if hooks.on_canvas is not None:

                def on_drafts(draft: CanvasDraft, passes: int) -> None:
                    job.shown.show(targets, draft, passes)

            run = Filling(
                model=self.model,
                tokenizer=self.tokenizer,
                sampler=self.sampler,
                method=self.method,
                calibration=self.calibration,
                filler=self.layout.filler,
                plan=plan,
                prefix=prefix,
                seed=job.seed,
                boldness=request.boldness,
                language=job.language,
                watch=Watch(
                    shows_tokens=request.shows_tokens,
                    on_drafts=on_drafts,
                    on_weighed=hooks.on_weighed,
                    check=hooks.check,
                    is_late=lambda: hooks.is_late(pace.needed_s(passes=1)),
                    until=hooks.deadline_at,
                ),
            )
            results = yield from pace.passes(run.work())
        finally:
            self._prefixes.give_back(prefix)
        self._remember(job, plan, run, results)
        job.shown.settle(targets, results, run.passes)
        usage = replace(usage, canvas_tokens=run.canvas_tokens, passes=run.passes)
        return _Filled(results, usage)

    def _remember(
        self, job: _Job, plan: CanvasPlan, run: Filling, results: Sequence[GapResult]
    ) -> None:
        """Keep what was computed for the next keystroke."""
        document, passage = job.request.document, plan.passage
        if document is None or not _can_follow(job.request, passage):
            return
        (result,) = results
        shown = result.choices[0].text if result.choices else None
        texts = tuple(dict.fromkeys(([] if shown is None else [shown]) + list(result.texts)))
        state = State(
            before=passage.before,
            after=passage.after,
            texts=texts,
            shown=shown,
            is_settled=run.is_finished,
            asked=_asked(job.request),
        )
        self._memory.keep(document, state)

    def _suspected(self, job: _Job, targets: Sequence[Target]) -> Work[list[Target]]:
        """The parts of the targets that are to be repaired."""
        request = job.request
        if request.pins or request.drafts:
            raise UnknownOption(
                "a repair with pins or drafts", remedy="Send the repair without them."
            )
        if request.repair:
            return [
                part
                for target in targets
                for part in pointed_at(target, request.text, request.repair)
            ]
        found: list[Target] = []
        for target in targets:
            pieces = self._pieces(job, target)
            if len(pieces) > _MOST_DOUBTED_PIECES:
                raise GapTooLong(
                    f"what is unlikely is looked for in {_MOST_DOUBTED_PIECES} canvases of text "
                    "at most",
                    remedy="Select less, or say what is to be repaired.",
                )
            for piece in pieces:
                prompt = self._planner.prompt(request, passage_of(request.text, [piece]))
                prefix, _ = yield from self._prefixes.encoding(prompt.ids, job.hooks.check)
                try:
                    ids = self.tokenizer.encode(piece.selection)
                    (logs,) = score(self.model, prefix, [ids])
                finally:
                    self._prefixes.give_back(prefix)
                found += doubted(piece, request.text, logs, self.tokenizer)
        return found[:_MOST_DOUBTED]


def _asked(request: InfillRequest) -> tuple[object, ...]:
    """What the texts of a gap depend on, beside the text around it."""
    bounds = (request.min_tokens, request.max_tokens)
    return (request.language, request.path, request.context, request.think, *bounds)


def _batches(works: Sequence[Work[_Filled]], count: int) -> list[Sequence[Work[_Filled]]]:
    return [works[start : start + count] for start in range(0, len(works), count)]


def _can_follow(request: InfillRequest, passage: Passage) -> bool:
    """Whether what is typed next is likely to continue this gap."""
    (target, *others) = passage.targets
    is_plain = request.instruction is None and request.repair is None
    return is_plain and not others and len(request.spans) == 1 and not target.selection


def _sum(costs: Sequence[Usage]) -> Usage:
    return Usage(
        prompt_tokens=max(each.prompt_tokens for each in costs),
        cached_tokens=costs[0].cached_tokens,
        canvas_tokens=sum(each.canvas_tokens for each in costs),
        passes=sum(each.passes for each in costs),
    )
