"""Writing behind a prompt, block after block.

    ids ─encode─▶ prefix ─denoise─▶ canvas ─cut─▶ transcript ┐
     ▲                                                       │ commit
     └───────────────────────────────────────────────────────┘

What stands on a finished canvas is final: the next is written behind it.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from infilld.engine.config import SamplerConfig
from infilld.engine.draws import SeededDraws
from infilld.engine.pace import Pace
from infilld.engine.passes import CanvasModel, Work
from infilld.engine.prefixes import Prefix, PrefixPool
from infilld.engine.reading import Bans
from infilld.engine.sampler import Denoised, Step, denoising
from infilld.engine.stopping import reference_stop
from infilld.engine.tokenizer import Tokenizer
from infilld.engine.transcript import Transcript
from infilld.engine.turns import TurnPrompt

# A short answer gets a short canvas, but room to end in: a model is used to some.
_LEAST_CANVAS, _CANVAS_STEP = 32, 16
# When the deadline strikes, text up to the first token below this probability is kept.
_KEPT_PROBABILITY = 0.5
# Share of the room that thoughts may take before they are ended.
_THOUGHT_SHARE = 0.5


class _Struck(Exception):
    """The deadline struck, or will before anything more is ready."""


@dataclass(frozen=True, kw_only=True)
class Watching:
    """What the owner of a text sees of it, and how it ends the work early.

    Attributes:
        on_step: gets every step, the transcript as the canvas continues it, and forwards so far.
        on_canvas: called when a canvas is final.
        check: raises to end it. is_late: whether the deadline strikes within so many seconds.
    """

    on_step: Callable[[Step, Transcript, int], None] | None = None
    on_canvas: Callable[[], None] | None = None
    check: Callable[[], None] = lambda: None
    is_late: Callable[[float], bool] = lambda needed_s: False


@dataclass(kw_only=True)
class Writer:
    """One text being written.

    Attributes:
        model, tokenizer, sampler, prefixes, pace: what writes it.
        prompt: what it follows. transcript: what it is written to. seed: of every draw.
        greedy: accepted positions take the most probable token. watching: see there.
        max_tokens: of the answer, thoughts apart; None: no bound but the context.
        canvases, passes, canvas_tokens, cached_tokens, encode_s: spent so far.
    """

    model: CanvasModel
    tokenizer: Tokenizer
    sampler: SamplerConfig
    prefixes: PrefixPool
    pace: Pace
    prompt: TurnPrompt
    transcript: Transcript
    seed: int
    greedy: bool = False
    max_tokens: int | None = None
    watching: Watching = field(default_factory=Watching)
    canvases: int = field(default=0, init=False)
    passes: int = field(default=0, init=False)
    canvas_tokens: int = field(default=0, init=False)
    cached_tokens: int = field(default=0, init=False)
    encode_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Start the draws."""
        self._draws = SeededDraws(self.seed, self.model.device)
        self._ids = list(self.prompt.ids)
        room = self.model.context_tokens + self.model.config.canvas_tokens - len(self._ids)
        self._most_thoughts = int(room * _THOUGHT_SHARE)

    def work(self) -> Work[None]:
        """Write until the transcript has ended."""
        try:
            while self.transcript.finish is None:
                if len(self._ids) > self.model.context_tokens:
                    self.transcript.end("length")
                    return
                yield from self._canvas()
        except _Struck:
            self.transcript.end("deadline")

    def _canvas(self) -> Work[None]:
        """One canvas more."""
        prefix = yield from self._encoded()
        try:
            if self.watching.is_late(self.pace.needed_s(passes=1)):
                raise _Struck
            denoised = yield from self.pace.passes(self._denoised(prefix, self._length()))
        finally:
            self.prefixes.give_back(prefix)
        self.passes += denoised.passes
        self.canvas_tokens += denoised.tokens.shape[1]
        self.canvases += 1
        tokens: list[int] = denoised.tokens[0].tolist()
        if not bool(denoised.converged[0]) and self._is_late():
            logs: list[float] = denoised.log_probability[0].tolist()
            low = math.log(_KEPT_PROBABILITY)
            tokens = tokens[: next((at for at, log in enumerate(logs) if log < low), len(tokens))]
            self.transcript.add(tokens)
            self.transcript.end("deadline")
        else:
            self._commit(tokens)
        if self.watching.on_canvas is not None:
            self.watching.on_canvas()

    def _commit(self, tokens: list[int]) -> None:
        """What stands on a canvas is written."""
        self._ids += tokens[: self.transcript.add(tokens)]
        marks = self.prompt.marks
        is_long = self.transcript.thought_tokens >= self._most_thoughts
        if marks is not None and self.transcript.is_thinking and is_long:
            # Thoughts that do not end by themselves are ended: an answer is wanted.
            self._ids.append(marks.end)
            self.transcript.end_thoughts()

    def _encoded(self) -> Work[Prefix]:
        """The prefix of all that is written; it is to be given back."""

        def check() -> None:
            self.watching.check()
            if self.watching.is_late(self.pace.piece_s):
                raise _Struck

        began = time.monotonic()
        try:
            check()
            prefix, cached = yield from self.prefixes.encoding(self._ids, self.pace.timed(check))
        finally:
            self.encode_s += time.monotonic() - began
        if not self.canvases:
            self.cached_tokens = cached
        return prefix

    def _denoised(self, prefix: Prefix, length: int) -> Work[Denoised]:
        vocab = self.model.config.vocab_tokens
        return denoising(
            prefix.cache,
            self._draws.first_canvas(1, length, vocab).to(self.model.device),
            self.sampler,
            self._draws,
            vocab_tokens=vocab,
            stop=reference_stop(self.sampler),
            banned=self._bans(length),
            greedy=self.greedy,
            belief_tokens=self.model.belief_tokens,
            on_step=self._look,
            is_late=self._is_late,
        )

    def _look(self, step: Step) -> None:
        self.watching.check()
        if self.watching.on_step is not None:
            draft = self.transcript.copy()
            draft.add(step.argmax[0].tolist())
            self.watching.on_step(step, draft, self.passes + step.index + 1)

    def _is_late(self) -> bool:
        return self.watching.is_late(self.pace.needed_s(passes=1))

    def _length(self) -> int:
        """Of the next canvas: short where little is left to write."""
        whole = self.model.config.canvas_tokens
        if self.max_tokens is None or self.transcript.is_thinking:
            return whole
        # One for the token that ends it.
        left = self.max_tokens - self.transcript.tokens + 1
        return min(whole, max(_LEAST_CANVAS, -(-left // _CANVAS_STEP) * _CANVAS_STEP))

    def _bans(self, length: int) -> Bans:
        """No position may take a control token that means nothing here."""
        marks = self.prompt.marks
        meant = self.prompt.ends | (set() if marks is None else {marks.start, marks.end})
        row = never_written(self.tokenizer, self.model.config.vocab_tokens, meant)
        places = torch.zeros(length, dtype=torch.int64)
        return Bans(rows=row[None], places=places).to(self.model.device)


def never_written(tokenizer: Tokenizer, vocab_tokens: int, meant: Iterable[int]) -> torch.Tensor:
    """Tokens that stand for no text [V] bool, but for those that are `meant`."""
    row = torch.zeros(vocab_tokens, dtype=torch.bool)
    row[sorted(tokenizer.control_ids - set(meant))] = True
    # Ids beyond the tokenizer's are padding of the embedding matrix.
    row[tokenizer.vocab_tokens :] = True
    return row
