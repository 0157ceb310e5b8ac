"""A canvas that is written under a grammar.

    pass ─▶ argmax ──walk from the left──▶ committed │ open: noise, or the exact mask at its first
              ▲                                │
              └────── pinned for all that follow ◀┘

Nothing is masked while a canvas is mostly noise: then a grammar would only choose among tokens that
mean nothing. A position is committed when it is decided, from the left on, if the grammar allows
its token. Where a decided token is not allowed, the next pass gives that one position the exact
mask; everything behind it is believed anew behind what was committed. A model that agrees needs no
pass more than without a grammar; one that does not gets a token or a few further in each.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import SamplerConfig
from infilld.engine.draws import Draws
from infilld.engine.matching import Matching, best_allowed
from infilld.engine.passes import CanvasPass, Work
from infilld.engine.reading import Ask, Bans, Belief, Pins
from infilld.engine.sampler import Step, next_canvas, refuse_unfinite
from infilld.engine.schedule import temperature
from infilld.engine.stopping import History, reference_stop

# A token is decided at this probability; when the canvas has had its steps, or is at rest, at the
# other, and the first open one at any.
_DECIDED, _LATE = 0.9, 0.5
# In the place of a token that is not allowed another is taken that is so probable beside it:
# the exact mask would lead to the same one, a pass later.
_PLAUSIBLE = 0.25
# Tokens of each position that are looked at.
_TOP = 16
# Near the end of its bound a text is only continued as far as it can still be closed.
_WATCHED_TOKENS, _LONGEST_CLOSING, _SEARCHED_EVERY = 48, 512, 8
# An ambiguous grammar takes milliseconds for a token: others have their turn after so long.
_TURN_S = 0.05
# How many steps more than planned a canvas gets before the next is a shorter one.
_SPARE_STEPS = 8


@dataclass
class GuidedText:
    """A text under a grammar, over canvases.

    Args:
        text: not begun. ends: tokens that end it where it may end. max_tokens: it may have.

    Attributes:
        tokens: written. is_ended: it matches. is_stuck: it cannot be ended within its bound.
    """

    text: Matching
    ends: frozenset[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list, init=False)
    is_ended: bool = field(default=False, init=False)
    is_stuck: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Find out what it takes to end the text, and write what it must begin with."""
        self._closing = self.text.closing(min(_LONGEST_CLOSING, self.max_tokens))
        least = 0 if self._closing is None else len(self._closing)
        self._watched = _WATCHED_TOKENS + 2 * least
        self.force()

    @property
    def is_over(self) -> bool:
        """Whether nothing more is written."""
        return self.is_ended or self.is_stuck

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return self.max_tokens - len(self.tokens)

    def take(self, token: int) -> bool:
        """Write a token, or end the text with it; False: it is not allowed."""
        if token in self.ends:
            self.is_ended = self.text.can_end
            return self.is_ended
        text = self.text.copy()
        if not text.accept(token):
            return False
        if self._leaves_room(text):
            self.text = text
            self.tokens.append(token)
            self._look_for_the_end()
        else:
            self._close()
        return True

    def force(self) -> list[int]:
        """Write what must follow."""
        before = len(self.tokens)
        while not self.is_over and (forced := self.text.forced()):
            # An end that spells text may be forced as text: it is none.
            if not all(self.is_over or self.take(token) for token in forced):
                break
        self._look_for_the_end()
        return self.tokens[before:]

    def _look_for_the_end(self) -> None:
        if self.is_over:
            return
        if self.text.must_end:
            self.is_ended = True
        elif self.left <= 0:
            self.is_ended = self.text.can_end
            self.is_stuck = not self.is_ended

    def _leaves_room(self, text: Matching) -> bool:
        """Whether a longer text can be closed; True as well where the one before it cannot."""
        if self.left > self._watched:
            self._closing = None
            return True
        if self._closing is None:
            # A search that fails takes long: it is not made at every token.
            if self.left % _SEARCHED_EVERY:
                return True
            self._closing = self.text.closing(self.left)
            if self._closing is None:
                return True
        # Mostly a token changes nothing about the end, or is one of those that lead to it.
        for known in (self._closing[1:], self._closing):
            if len(known) < self.left and text.ends_with(known):
                self._closing = known
                return True
        closing = text.closing(self.left - 1)
        if closing is None:
            return False
        self._closing = closing
        return True

    def _close(self) -> None:
        """End the text, since there is room for no more."""
        self.tokens += self._closing or []
        self.is_ended = True


@dataclass
class _Walk:
    """A text on one canvas. start: tokens written before it. length: of the canvas."""

    guided: GuidedText
    length: int
    start: int
    is_late: bool = False
    # What the position at which the walk stopped may take; None: it was not decided.
    allowed: Tensor | None = None

    @property
    def at(self) -> int:
        """First open position."""
        return min(self.length, len(self.guided.tokens) - self.start)

    @property
    def is_over(self) -> bool:
        return self.guided.is_over or self.at >= self.length

    def pins(self, device: torch.device) -> Pins:
        """What is written on this canvas."""
        tokens = torch.zeros(1, self.length, dtype=torch.int64)
        written = self.guided.tokens[self.start : self.start + self.at]
        tokens[0, : self.at] = torch.tensor(written, dtype=torch.int64)
        mask = torch.arange(self.length)[None] < self.at
        return Pins(mask=mask.to(device), tokens=tokens.to(device))

    def bans(self, never: Tensor, device: torch.device) -> Bans:
        """The mask where the walk stopped; elsewhere what never stands for text."""
        places = torch.zeros(self.length, dtype=torch.int64)
        rows = [never]
        if self.allowed is not None:
            places[self.at] = 1
            rows.append(~self.allowed)
        return Bans(rows=torch.stack(rows), places=places).to(device)

    def go(
        self,
        step: Step,
        top: Belief,
        *,
        is_done: bool,
        check: Callable[[], None],
        is_late: Callable[[], bool],
    ) -> Work[None]:
        """Commit what is decided and allowed; find the mask of the position that is not.

        Others have their turn in between. Where it gets late then, the rest is left open.
        """
        self.is_late = self.is_late or is_done
        argmax: list[int] = step.argmax[0].tolist()
        chances: list[float] = step.log_probability[0].exp().tolist()
        least = _LATE if self.is_late else _DECIDED
        first, was_masked = self.at, self.allowed is not None
        self.allowed = None
        turn_ends = time.monotonic() + _TURN_S
        while not self.is_over:
            check()
            if time.monotonic() > turn_ends:
                if is_late():
                    return
                yield []
                turn_ends = time.monotonic() + _TURN_S
            at = self.at
            token, chance = argmax[at], chances[at]
            is_first = at == first and (self.is_late or was_masked)
            is_decided = is_done or is_first or chance >= least
            if is_decided and self.guided.take(token):
                continue
            forced = self.guided.force()
            if forced:
                if forced == argmax[at : at + len(forced)]:
                    continue
                # What stands behind was believed behind another text.
                return
            if is_decided and at == first and was_masked:
                # Not even what the mask leaves can be written.
                self.guided.is_stuck = True
            elif is_decided:
                self._mend(at, chance, top)
            return

    def _mend(self, at: int, chance: float, top: Belief) -> None:
        """Take a token that is nearly as probable as the one that is not allowed, or mask it."""
        tokens: list[int] = top.ids[0, at].tolist()
        probabilities: list[float] = top.probabilities[0, at].tolist()
        found = best_allowed(self.guided.text, tokens, probabilities, chance * _PLAUSIBLE)
        if found is None or not self.guided.take(found):
            self._mask()
        else:
            self.guided.force()

    def _mask(self) -> None:
        allowed = torch.from_numpy(self.guided.text.allowed())
        allowed[sorted(self.guided.ends)] = self.guided.text.can_end
        if not bool(allowed.any()):
            # No token of this vocabulary goes on.
            self.guided.is_stuck = True
        self.allowed = allowed


@dataclass(frozen=True, kw_only=True)
class GuidedCanvas:
    """What became of a canvas: tokens written on it, passes, and whether it was cut short."""

    tokens: tuple[int, ...]
    passes: int
    is_cut: bool


def guided_denoising(
    cache: PrefixCache,
    canvas: Tensor,
    sampler: SamplerConfig,
    draws: Draws,
    guided: GuidedText,
    never: Tensor,
    *,
    greedy: bool,
    belief_tokens: int | None,
    on_step: Callable[[Step], None],
    check: Callable[[], None],
    is_late: Callable[[], bool],
) -> Work[GuidedCanvas]:
    """Refine a canvas [1, L] as `denoising` does, and write a text on it.

    The host waits for every step, on a GPU too: what is pinned and masked in the next pass depends
    on what it reads.

    Args:
        cache, canvas, sampler, draws, greedy, belief_tokens: see `denoising`.
        guided: what is written. never: tokens that stand for no text [V] bool.
        on_step: called after every pass; what it raises ends the work.
        check: called before every token; what it raises ends the work.
        is_late: asked after every pass; a late canvas ends with what is committed.
    """
    length, device, vocab = canvas.shape[1], canvas.device, len(never)
    impl: Literal["gpu", "reference"] = "gpu" if canvas.is_cuda else "reference"
    walk = _Walk(guided, length, start=len(guided.tokens))
    stop = reference_stop(sampler)
    belief: Belief | None = None
    seen: list[Tensor] = []
    passes = 0
    while not walk.is_over:
        pins = walk.pins(device)
        index = min(passes, sampler.max_steps - 1)
        ask = Ask(
            temperature=temperature(index, sampler),
            pins=pins,
            banned=walk.bans(never, device),
            draws=None if greedy else draws,
            top=_TOP if belief_tokens is None else belief_tokens,
        )
        (reading,) = yield [CanvasPass(pins.impose(canvas), cache, belief, ask)]
        step = next_canvas(reading, passes, sampler, draws, vocab, pins=pins, impl=impl)
        refuse_unfinite(step.entropy_nats.isfinite().all(), passes)
        passes += 1
        history = History(~pins.mask, [*seen[-3:], step.argmax], step.entropy_nats)
        seen = history.argmax
        walk.is_late = walk.is_late or passes >= sampler.max_steps
        believed = step.belief
        assert isinstance(believed, Belief)
        top = Belief(ids=believed.ids.cpu(), probabilities=believed.probabilities.cpu())
        is_done = bool(stop.done(history)[0])
        yield from walk.go(step, top, is_done=is_done, check=check, is_late=is_late)
        on_step(step)
        if is_late() or (passes >= sampler.max_steps + _SPARE_STEPS and walk.at):
            break
        canvas, belief = step.canvas, _told(believed, walk.pins(device))
    return GuidedCanvas(
        tokens=tuple(guided.tokens[walk.start :]), passes=passes, is_cut=not walk.is_over
    )


def _told(belief: Belief, pins: Pins) -> Belief:
    """A belief that is certain of what was pinned since."""
    sure = torch.zeros_like(belief.probabilities)
    sure[..., 0] = 1.0
    ids = belief.ids.clone()
    ids[..., 0] = torch.where(pins.mask, pins.tokens, ids[..., 0])
    return Belief(
        ids=ids, probabilities=torch.where(pins.mask[..., None], sure, belief.probabilities)
    )
