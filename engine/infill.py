"""From a request to a fill: prompt, canvas, denoise, read back.

text, span ─▶ prompt ─encode▶ cache ┐
suffix head ─▶ canvas ──────────┴▶ denoise ─▶ rows ─▶ fills ─score▶ best first, or a reason
▲ gap full: twice as long, from the draft ┘
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from infilld.engine.canvas import GapKind, gap_kind
from infilld.engine.config import SamplerConfig
from infilld.engine.errors import Unsupported
from infilld.engine.found import Found, found_drafts
from infilld.engine.gap import GapRun
from infilld.engine.lines import unix
from infilld.engine.model import DiffusionGemma
from infilld.engine.plan import FillMethod, plan_gap
from infilld.engine.prefixes import PrefixPool
from infilld.engine.prompt import Controls, infill_prompt
from infilld.engine.ranking import Calibration, Weighed
from infilld.engine.request import (
    CanvasUpdate,
    InfillRequest,
    InfillResult,
    Span,
    Timings,
    Usage,
)
from infilld.engine.syntax import Surroundings, is_python
from infilld.engine.tokenizer import Tokenizer

# Prompts are cut to this many tokens even where the model could read more.
_PROMPT_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What a caller may watch and stop.

    Attributes:
        on_canvas: gets a draft after every pass; None: nobody watches.
        on_weighed: gets every candidate, the best first, before one is chosen.
        check: called before encoding, between its pieces, before denoising and after every pass;
            what it raises ends the request.
        deadline_at: `time.monotonic()` reading, seconds; None: no deadline.
    """

    on_canvas: Callable[[CanvasUpdate], None] | None = None
    on_weighed: Callable[[list[Weighed]], None] = lambda weighed: None
    check: Callable[[], None] = lambda: None
    deadline_at: float | None = None

    def is_late(self) -> bool:
        """Whether the deadline has struck."""
        return self.deadline_at is not None and time.monotonic() >= self.deadline_at


class _Struck(Exception):
    """The deadline struck before there was a canvas to show."""


class Infiller:
    """Serves infill requests with one model, one after another; not for several threads.

    Args:
        model: weights. tokenizer: its vocabulary. sampler: its generation configuration.
        method: how gaps are filled. calibration: of the model's confidence, if it has one.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: Tokenizer,
        sampler: SamplerConfig,
        method: FillMethod | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.method, self.calibration = method or FillMethod(), calibration
        self.controls = Controls.of(tokenizer)
        self._prefixes = PrefixPool(model)

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
        result = InfillResult(id=secrets.token_hex(8), seed=seed)
        prefix, suffix = unix(request.text[: span.start]), unix(request.text[span.end :])
        prompt = infill_prompt(self.tokenizer, controls, prefix, suffix, self.prompt_tokens)
        # Before anything is computed: a gap that cannot fit is refused, not tried.
        kind = gap_kind(prefix, suffix)
        plan = plan_gap(
            request,
            span,
            kind,
            prompt,
            self.tokenizer,
            controls,
            self.model.config,
            found=self._found(span, prefix, suffix, kind),
            method=self.method,
        )
        encoded = started

        def check() -> None:
            hooks.check()
            if hooks.is_late():
                raise _Struck

        try:
            check()
            cache, cached = self._prefixes.encode(prompt.ids, check)
            encoded = time.monotonic()
            usage = Usage(prompt_tokens=len(prompt.ids), cached_tokens=cached)
            result = replace(result, usage=usage)
            check()
        except _Struck:
            why = "The deadline struck before the first pass."
            result = replace(result, reason="deadline", why=why)
        else:
            if request.warm:
                why = "Only the prompt was encoded, as asked."
                result = replace(result, reason="empty", why=why)
            else:
                run = GapRun(
                    model=self.model,
                    tokenizer=self.tokenizer,
                    sampler=self.sampler,
                    controls=controls,
                    plan=plan,
                    cache=cache,
                    seed=seed,
                    calibration=self.calibration,
                    surroundings=self._surroundings(request, prefix, suffix),
                    on_canvas=hooks.on_canvas,
                    on_weighed=hooks.on_weighed,
                    check=hooks.check,
                    is_late=hooks.is_late,
                )
                result = run.finish(result)
        return replace(result, timings=_timings(started, encoded))

    def forget(self) -> None:
        """Drop every encoded prefix."""
        self._prefixes.clear()

    def _found(self, span: Span, prefix: str, suffix: str, kind: GapKind) -> list[Found]:
        """Drafts for a gap; text that is to be replaced is not looked for elsewhere."""
        if span.start < span.end or not self.method.found_drafts:
            return []
        return found_drafts(prefix, suffix, kind, most=self.method.found_texts)

    def _surroundings(
        self, request: InfillRequest, prefix: str, suffix: str
    ) -> Surroundings | None:
        """What a fill must fit; None: nothing is held back."""
        if not self.method.holds_back:
            return None
        return Surroundings(prefix, suffix, is_python=is_python(request.path, request.language))

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


def _timings(started: float, encoded: float) -> Timings:
    now = time.monotonic()
    return Timings(
        encode_ms=1e3 * (encoded - started),
        denoise_ms=1e3 * (now - encoded),
        total_ms=1e3 * (now - started),
    )
