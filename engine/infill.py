"""From a request to a fill: prompt, canvas, denoise, read back.

text, span ─▶ prompt ─encode▶ cache ┐
suffix head ─▶ canvas ──────────┴▶ denoise ─▶ rows ─▶ fills, best first, or a reason
▲ gap full: twice as long, from the draft ┘
"""

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.canvas import (
    GapCanvas,
    banned_tokens,
    first_gap_tokens,
    gap_kind,
    head_of,
    read_gap,
)
from infilld.engine.config import SamplerConfig
from infilld.engine.draft import DraftReader
from infilld.engine.draws import SeededDraws
from infilld.engine.errors import Unsupported
from infilld.engine.model import DiffusionGemma
from infilld.engine.prompt import Controls, InfillPrompt, infill_prompt
from infilld.engine.request import (
    Alternative,
    CanvasUpdate,
    InfillRequest,
    InfillResult,
    Reason,
    Span,
    SpanFill,
    Timings,
    Usage,
)
from infilld.engine.sampler import Denoised, Step, denoise
from infilld.engine.scorer import score
from infilld.engine.stopping import AllOf, AnyOf, Deadline, LowEntropy, Stable, StopRule
from infilld.engine.tokenizer import Tokenizer

# Mean over the gap alone; the reference's 0.005 is a mean over 256 rows of which most are certain.
_STOP_MEAN_NATS = 0.05
# Prompts are cut to this many tokens even where the model could read more.
_PROMPT_TOKENS = 4096
# When the deadline strikes, text up to the first token below this probability is shown.
_SHOWN_PROBABILITY = 0.5
_CACHES = 4
# How far typing back may go in sliding layers before the prompt is encoded anew.
_TRIM_MARGIN_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a caller may watch and stop.

    Attributes:
        on_canvas: gets a draft after every pass; None: nobody watches.
        check: called before every pass; what it raises ends the request.
        deadline_at: `time.monotonic()` reading, seconds; None: no deadline.
    """

    on_canvas: Callable[[CanvasUpdate], None] | None = None
    check: Callable[[], None] = lambda: None
    deadline_at: float | None = None


@dataclass
class _Fill:
    """One row's fill: its text and tokens, and whether the gap was full, without a filler."""

    text: str
    tokens: list[int]
    is_open: bool


class Infiller:
    """Serves infill requests with one model, one after another; not for several threads.

    Args:
        model: weights. tokenizer: its vocabulary. sampler: its generation configuration.
    """

    def __init__(self, model: DiffusionGemma, tokenizer: Tokenizer, sampler: SamplerConfig) -> None:
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.controls = Controls.of(tokenizer)
        self._caches: list[PrefixCache] = []

    @property
    def prompt_tokens(self) -> int:
        """Longest prompt that is encoded."""
        config = self.model.config
        return min(_PROMPT_TOKENS, max(8, config.max_positions - config.canvas_tokens))

    def infill(self, request: InfillRequest, hooks: Hooks | None = None) -> InfillResult:
        """Fill the span of a request.

        Raises:
            Unsupported: more than the loaded model can do.
            GapTooLong: the fill would not fit a canvas.
            ModelError: the model's output means nothing.
        """
        hooks = hooks or Hooks()
        started = time.monotonic()
        span, controls = self._accepted(request)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        prefix, suffix = request.text[: span.start], request.text[span.end :]
        prompt = infill_prompt(
            self.tokenizer, controls, _unix(prefix), _unix(suffix), self.prompt_tokens
        )
        hooks.check()
        cache, cached = self._encoded(prompt)
        encoded = time.monotonic()
        result = InfillResult(
            id=secrets.token_hex(8),
            seed=seed,
            usage=Usage(prompt_tokens=len(prompt.ids), cached_tokens=cached),
        )
        if request.warm:
            result = replace(result, reason="empty", why="Only the prompt was encoded, as asked.")
        else:
            run = _Run(self, request, span, prompt, cache, hooks, controls, seed)
            result = run.finish(result)
        now = time.monotonic()
        timings = Timings(
            encode_ms=1e3 * (encoded - started),
            denoise_ms=1e3 * (now - encoded),
            total_ms=1e3 * (now - started),
        )
        return replace(result, timings=timings)

    def forget(self) -> None:
        """Drop every encoded prefix."""
        self._caches.clear()

    def _accepted(self, request: InfillRequest) -> tuple[Span, Controls]:
        if self.controls is None:
            raise Unsupported(
                "the loaded model was not trained to infill: its vocabulary has no filler token",
                remedy="Use the starter model: `infilld models use starter`.",
            )
        if len(request.spans) > 1:
            raise Unsupported(
                f"{len(request.spans)} spans in one request",
                remedy="Send one request for each span.",
            )
        if request.instruction:
            raise Unsupported(
                "the loaded model does not follow instructions",
                remedy="Leave the instruction out: the selection is then written anew.",
            )
        return request.spans[0], self.controls

    def _encoded(self, prompt: InfillPrompt) -> tuple[PrefixCache, int]:
        """A cache that holds the prompt, and how many tokens of it were there already."""
        best = max(self._caches, key=lambda cache: cache.match(prompt.ids), default=None)
        # A few shared tokens (the marks, an import line) are no reason to lose another document.
        if best is None or (
            best.match(prompt.ids) < len(prompt.ids) // 4 and len(self._caches) < _CACHES
        ):
            best = self.model.new_cache(_TRIM_MARGIN_TOKENS)
        elif best.match(prompt.ids) < len(prompt.ids) // 4:
            best = self._caches[0]
        self._caches = [cache for cache in self._caches if cache is not best] + [best]
        cached = best.reuse(prompt.ids)
        unread = torch.tensor(prompt.ids[cached:], dtype=torch.int64, device=self.model.device)
        self.model.encode(unread, best)
        return best, cached


class _Run:
    """One request on its encoded prompt."""

    def __init__(
        self,
        engine: Infiller,
        request: InfillRequest,
        span: Span,
        prompt: InfillPrompt,
        cache: PrefixCache,
        hooks: Hooks,
        controls: Controls,
        seed: int,
    ) -> None:
        self.engine, self.request, self.span = engine, request, span
        self.cache, self.hooks, self.controls = cache, hooks, controls
        self.draws = SeededDraws(seed, engine.model.device)
        self.newline = "\r\n" if "\r\n" in request.text else "\n"
        self.updates = self.passes = 0
        before, after = request.text[: span.start], request.text[span.end :]
        self.kind = gap_kind(before, after)
        # Rewriting several lines may need several lines, whatever follows on the last one.
        self.one_line = self.kind == "in_line" and "\n" not in self._selection
        head = head_of(prompt, controls)
        self.room = max(1, engine.model.config.canvas_tokens - len(head))
        selected = len(engine.tokenizer.encode(_unix(self._selection)))
        first = first_gap_tokens(
            self.kind, selected or None, self.room, request.min_tokens, request.max_tokens
        )
        self.canvas = GapCanvas(first, head)

    @property
    def _selection(self) -> str:
        return self.request.text[self.span.start : self.span.end]

    def finish(self, result: InfillResult) -> InfillResult:
        """Denoise, and put the fills or the reason into the result."""
        denoised, fills = self._denoise(None)
        limit = self.request.max_tokens or self.room
        while all(fill.is_open for fill in fills) and self.canvas.gap_tokens < limit:
            if self._is_late():
                break
            longer = min(limit, 2 * self.canvas.gap_tokens)
            draft = denoised.tokens[:, : self.canvas.gap_tokens]
            self.canvas = self.canvas.grown(longer)
            denoised, fills = self._denoise(draft)
        usage = replace(
            result.usage,
            canvas_tokens=self.canvas.canvas_tokens * self.request.alternatives,
            passes=self.passes,
        )
        kept = {fill.text: fill for fill in reversed(fills) if fill.text}
        reason, why = self._reason(bool(kept))
        alternatives = self._scored(list(kept.values()))
        return replace(result, alternatives=alternatives, reason=reason, why=why, usage=usage)

    def _scored(self, fills: list[_Fill]) -> tuple[Alternative, ...]:
        """The fills with their causal likelihood, best first."""
        logs = score(self.engine.model, self.cache, [fill.tokens for fill in fills])
        scored = [(float(each.mean()), fill) for each, fill in zip(logs, fills, strict=True)]
        scored.sort(key=lambda pair: pair[0], reverse=True)
        return tuple(
            Alternative(
                (SpanFill(self.span.start, self.span.end, fill.text, math.exp(mean)),), mean
            )
            for mean, fill in scored
        )

    def _reason(self, is_any: bool) -> tuple[Reason, str]:
        if is_any:
            return "ok", ""
        if self._is_late():
            return "deadline", "The deadline struck before any text was certain."
        return "empty", "The model wrote no text for this span."

    def _denoise(self, draft: Tensor | None) -> tuple[Denoised, list[_Fill]]:
        model, rows = self.engine.model, self.request.alternatives
        vocab, gap = model.config.vocab_tokens, self.canvas.gap_tokens
        canvas = self.draws.first_canvas(rows, self.canvas.canvas_tokens, vocab)
        if draft is not None:
            canvas[:, : draft.shape[1]] = draft
        banned = banned_tokens(
            self.engine.tokenizer,
            self.controls,
            self.canvas,
            vocab,
            one_line=self.one_line,
            min_tokens=self.request.min_tokens or 0,
        )
        steps = min(self.engine.sampler.max_steps, max(6, min(24, 4 + math.ceil(gap / 6))))
        self.hooks.check()
        denoised = denoise(
            model,
            self.cache,
            canvas,
            replace(self.engine.sampler, max_steps=steps),
            self.draws,
            stop=self._stop(),
            pins=self.canvas.pins(rows, model.device),
            banned=banned.to(model.device),
            greedy=True,
            on_step=self._watcher(),
        )
        self.passes += denoised.passes
        return denoised, [self._fill(denoised, row) for row in range(rows)]

    def _stop(self) -> StopRule:
        done = AllOf((Stable(passes=1), LowEntropy(mean_nats=_STOP_MEAN_NATS)))
        at = self.hooks.deadline_at
        return done if at is None else AnyOf((done, Deadline(at=at)))

    def _is_late(self) -> bool:
        at = self.hooks.deadline_at
        return at is not None and time.monotonic() >= at

    def _watcher(self) -> Callable[[Step], None]:
        reader = DraftReader(self.engine.tokenizer, self.canvas, self.controls.filler, self.newline)

        def watch(step: Step) -> None:
            self.hooks.check()
            if self.hooks.on_canvas is not None:
                span, revised = reader.read(step)
                update = CanvasUpdate(
                    self.updates, 0, self.passes + step.index + 1, (span,), revised
                )
                self.updates += 1
                self.hooks.on_canvas(update)

        return watch

    def _fill(self, denoised: Denoised, row: int) -> _Fill:
        gap = self.canvas.gap_tokens
        tokens: list[int] = denoised.tokens[row, :gap].tolist()
        logs: list[float] = denoised.log_probability[row, :gap].tolist()
        places = read_gap(tokens, self.controls.filler)
        if self._is_late() and not bool(denoised.converged[row]):
            low = math.log(_SHOWN_PROBABILITY)
            end = next((place for place in places if logs[place] < low), gap)
            places = [place for place in places if place < end]
        kept = [tokens[place] for place in places]
        text = self.engine.tokenizer.text(kept).replace("\n", self.newline)
        return _Fill(text, kept, is_open=len(places) == gap)


def _unix(text: str) -> str:
    """Text with the line ends the model was trained on."""
    return text.replace("\r\n", "\n")
