"""Writing behind a prompt, block after block.

    ids ─encode─▶ prefix ─denoise─▶ canvas ─cut─▶ transcript ┐
     ▲                                                       │ commit
     └───────────────────────────────────────────────────────┘

What stands on a finished canvas is final: the next is written behind it.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from infilld.engine.config import SamplerConfig
from infilld.engine.draws import SeededDraws
from infilld.engine.guided import GuidedCanvas, GuidedText, guided_denoising
from infilld.engine.matching import Matching
from infilld.engine.pace import Pace
from infilld.engine.passes import CanvasModel, Work
from infilld.engine.prefixes import Prefix, PrefixPool
from infilld.engine.prompt import InfillPrompt
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
# Thoughts before an infill that do not end by themselves are ended.
_MOST_THOUGHT_CANVASES = 4


class _Struck(Exception):
    """The deadline struck, or will before anything more is ready."""


@dataclass(frozen=True, kw_only=True)
class Watching:
    """What the owner of a text sees of it, and how it ends the work early.

    Attributes:
        on_step: gets every step, what is final, how the canvas continues it, and forwards so far.
        on_canvas: called when a canvas is final.
        check: raises to end it. is_late: whether the deadline strikes within so many seconds.
    """

    on_step: Callable[[Step, Transcript, Transcript, int], None] | None = None
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
        grammar: a text that has not begun, which the answer is to be; None: it is free.
        thinks_first: thoughts may come before that text.
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
    grammar: Matching | None = None
    thinks_first: bool = False
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
        self._guided: GuidedText | None = None
        self._synced = 0
        self._most_length = self.model.config.canvas_tokens
        room = self.model.context_tokens + self.model.config.canvas_tokens - len(self._ids)
        self._most_thoughts = int(room * _THOUGHT_SHARE)

    @property
    def ids(self) -> Sequence[int]:
        """Of the prompt and all that is written behind it."""
        return self._ids

    def work(self) -> Work[None]:
        """Write until the transcript has ended."""
        try:
            while self.transcript.finish is None:
                if len(self._ids) > self.model.context_tokens:
                    self.transcript.end("length")
                elif self.grammar is None or self._may_think:
                    yield from self._free_canvas()
                else:
                    yield from self._guided_canvas(self.grammar)
        except _Struck:
            self.transcript.end("deadline")

    @property
    def _may_think(self) -> bool:
        return self.transcript.is_thinking or (self.thinks_first and not self.canvases)

    def _free_canvas(self) -> Work[None]:
        """One canvas more."""
        prefix = yield from self._encoded()
        try:
            self._refuse_late(self.pace.needed_s(passes=1))
            denoised = yield from self.pace.passes(self._denoised(prefix, self._length()))
        finally:
            self.prefixes.give_back(prefix)
        self._count(denoised.passes, denoised.tokens.shape[1])
        tokens: list[int] = denoised.tokens[0].tolist()
        is_struck = not bool(denoised.converged[0]) and self._is_late()
        if is_struck:
            logs: list[float] = denoised.log_probability[0].tolist()
            low = math.log(_KEPT_PROBABILITY)
            tokens = tokens[: next((at for at, log in enumerate(logs) if log < low), len(tokens))]
        if self.grammar is None:
            self._commit(tokens)
        else:
            self._commit(self._thoughts_of(tokens))
        if is_struck:
            self.transcript.end("deadline")
        self._tell()

    def _thoughts_of(self, tokens: list[int]) -> list[int]:
        """Tokens up to the end of the thoughts: what follows is not free; none without thoughts.

        A model that ends its turn within them has ended them: it owes the answer.
        """
        marks = self.prompt.marks
        if marks is None or not (self.transcript.is_thinking or tokens[:1] == [marks.start]):
            return []
        ends = self.prompt.ends | {marks.end}
        end = next((at for at, token in enumerate(tokens) if token in ends), None)
        return tokens if end is None else [*tokens[:end], marks.end]

    def _guided_canvas(self, grammar: Matching) -> Work[None]:
        """One canvas more of a text under a grammar."""
        if self._guided is None:
            room = self.model.context_tokens + self.model.config.canvas_tokens - len(self._ids)
            most = room if self.max_tokens is None else min(room, self.max_tokens)
            self._guided = GuidedText(grammar, self.prompt.ends, most)
        guided = self._guided
        # What must be written needs no pass.
        self._sync(guided)
        if self.transcript.finish is not None:
            return
        prefix = yield from self._encoded()
        try:
            self._refuse_late(self.pace.needed_s(passes=1))
            canvas = yield from self.pace.passes(self._guided_passes(prefix, guided))
        finally:
            self.prefixes.give_back(prefix)
            self._sync(guided)
        self._count(canvas.passes, self._guided_length(guided))
        if canvas.is_cut:
            # Model and grammar disagree so often that long canvases are not worth their passes.
            self._most_length = max(_LEAST_CANVAS, self._most_length // 2)
            if self._is_late():
                self.transcript.end("deadline")
        self._tell()

    def _sync(self, guided: GuidedText) -> None:
        """Commit what the text under a grammar has gained."""
        new = guided.tokens[self._synced :]
        self._synced += len(new)
        self._ids += new
        self.transcript.add(new)
        if guided.is_over:
            self.transcript.end("stop" if guided.is_ended else "length")

    def _guided_passes(self, prefix: Prefix, guided: GuidedText) -> Work[GuidedCanvas]:
        vocab, length = self.model.config.vocab_tokens, self._guided_length(guided)
        return guided_denoising(
            prefix.cache,
            self._draws.first_canvas(1, length, vocab).to(self.model.device),
            self.sampler,
            self._draws,
            guided,
            never_written(self.tokenizer, vocab, self.prompt.ends),
            greedy=self.greedy,
            belief_tokens=self.model.belief_tokens,
            on_step=self._look,
            check=self.watching.check,
            is_late=self._is_late,
        )

    def _guided_length(self, guided: GuidedText) -> int:
        return min(self._most_length, _canvas_for(guided.left + 1))

    def _count(self, passes: int, positions: int) -> None:
        self.passes += passes
        self.canvas_tokens += positions
        self.canvases += 1

    def _tell(self) -> None:
        if self.watching.on_canvas is not None:
            self.watching.on_canvas()

    def _refuse_late(self, needed_s: float) -> None:
        """End the work before what could not be finished in time."""
        if self.watching.is_late(needed_s):
            if not self.watching.is_late(0.0):
                # Nothing will measure whether it would have been.
                self.pace.ease()
            raise _Struck

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
            self._refuse_late(self.pace.piece_s)

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
        if self.watching.on_step is None:
            return
        final = self.transcript
        tokens: list[int] = step.argmax[0].tolist()
        if self._guided is not None:
            # What is committed on this canvas is final already, and may be more than it holds.
            new = self._guided.tokens[self._synced :]
            final = self.transcript.copy()
            final.add(new)
            tokens = tokens[len(new) :]
        draft = final.copy()
        draft.add(tokens)
        self.watching.on_step(step, final, draft, self.passes + step.index + 1)

    def _is_late(self) -> bool:
        return self.watching.is_late(self.pace.needed_s(passes=1))

    def _length(self) -> int:
        """Of the next canvas: short where little is left to write."""
        whole = self.model.config.canvas_tokens
        if self.max_tokens is None or self.transcript.is_thinking:
            return whole
        # One for the token that ends it.
        return min(whole, _canvas_for(self.max_tokens - self.transcript.tokens + 1))

    def _bans(self, length: int) -> Bans:
        """No position may take a control token that means nothing here."""
        marks = self.prompt.marks
        meant = self.prompt.ends | (set() if marks is None else {marks.start, marks.end})
        row = never_written(self.tokenizer, self.model.config.vocab_tokens, meant)
        places = torch.zeros(length, dtype=torch.int64)
        return Bans(rows=row[None], places=places).to(self.model.device)


def _canvas_for(tokens: int) -> int:
    """Length of a canvas for so many tokens."""
    return max(_LEAST_CANVAS, -(-tokens // _CANVAS_STEP) * _CANVAS_STEP)


def never_written(tokenizer: Tokenizer, vocab_tokens: int, meant: Iterable[int]) -> torch.Tensor:
    """Tokens that stand for no text [V] bool, but for those that are `meant`."""
    row = torch.zeros(vocab_tokens, dtype=torch.bool)
    row[sorted(tokenizer.control_ids - set(meant))] = True
    # Ids beyond the tokenizer's are padding of the embedding matrix.
    row[tokenizer.vocab_tokens :] = True
    return row


def thinking(
    model: CanvasModel,
    tokenizer: Tokenizer,
    sampler: SamplerConfig,
    prefixes: PrefixPool,
    prompt: InfillPrompt,
    seed: int,
    check: Callable[[], None],
) -> Work[tuple[int, ...]]:
    """The ids of an infill's prompt with thoughts in their place, which nobody is shown.

    Args:
        model, tokenizer, sampler: think. prefixes: encode. seed: of every draw.
        prompt: one that says where thoughts stand, and which tokens end them.
        check: what it raises ends the work.
    """
    assert prompt.answer_at is not None
    begun, rest = prompt.ids[: prompt.answer_at], prompt.ids[prompt.answer_at :]
    # Thoughts that are ended take a token more.
    room = model.context_tokens - len(prompt.ids) - 1
    most = min(_MOST_THOUGHT_CANVASES * model.config.canvas_tokens, room)
    if most < 1:
        return (*begun, prompt.thought_ends[0], *rest)
    asked = TurnPrompt(ids=begun, ends=frozenset(prompt.thought_ends))
    writer = Writer(
        model=model,
        tokenizer=tokenizer,
        sampler=sampler,
        prefixes=prefixes,
        pace=Pace(),
        prompt=asked,
        transcript=Transcript(tokenizer, asked, max_tokens=most),
        seed=seed,
        max_tokens=most,
        watching=Watching(check=check),
    )
    yield from writer.work()
    return (*writer.ids, prompt.thought_ends[0], *rest)
