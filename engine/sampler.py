"""The denoise loop and its step; nothing else.

    canvas, belief ──pass──▶ logits / T ──▶ proposal, argmax, entropy ──accept──▶ next canvas
                                  └──────────────▶ belief ──────────────────────▶ next step

Nothing is frozen: acceptance is decided anew in every step, and positions that are not accepted
get fresh noise. Pinned positions are imposed after every re-noise and spend no entropy budget.

Source: arXiv 2505.24857 (entropy bound); transformers 5.23.0, generation_diffusion_gemma.py
(order of the step, stop rule, eos).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import SamplerConfig
from infilld.engine.draws import Draws
from infilld.engine.errors import ContextTooLong, ModelError, RequestError
from infilld.engine.passes import CanvasModel, CanvasPass, Work, drive
from infilld.engine.polling import Polled
from infilld.engine.reading import Ask, Bans, Belief, Pins, Reading, read_logits
from infilld.engine.schedule import temperature
from infilld.engine.stopping import History, StopRule, reference_stop
from infilld.kernels.accept import accept


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step.

    Attributes:
        index: counted up from 0.
        canvas: what the next pass reads [R, L] int64.
        argmax: most probable tokens [R, L] int64, pins imposed: the draft, and the result.
        log_probability: of those tokens under the scaled logits [R, L] float32, nats.
        entropy_nats: of the scaled logits [R, L] float32; 0 where pinned.
        accepted: positions that took the proposal [R, L] bool.
        belief: carried to the next pass: a `Belief`, or scaled logits [R, L, V] float32.
    """

    index: int
    canvas: Tensor
    argmax: Tensor
    log_probability: Tensor
    entropy_nats: Tensor
    accepted: Tensor
    belief: Belief | Tensor


@dataclass(frozen=True, kw_only=True)
class Denoised:
    """A finished canvas.

    Attributes:
        tokens: argmax canvas of each row's last pass [R, L] int64.
        log_probability: of those tokens [R, L] float32, nats.
        passes: forwards over the canvas.
        converged: rows on which the stop rule held [R] bool.
    """

    tokens: Tensor
    log_probability: Tensor
    passes: int
    converged: Tensor


def denoise_step(
    logits: Tensor,
    index: int,
    config: SamplerConfig,
    draws: Draws,
    *,
    pins: Pins | None = None,
    banned: Bans | None = None,
    greedy: bool = False,
    impl: Literal["gpu", "reference"] = "reference",
) -> Step:
    """Turn the logits of a pass into the next canvas.

    Args:
        logits: soft-capped [R, L, V] float32.
        index: of the step, from 0.
        config: schedule and entropy budget.
        draws: random numbers; asked for one sample and one noise, in this order.
        pins: imposed positions.
        banned: tokens that free positions may not take.
        greedy: accepted positions take the argmax instead of a sample.
        impl: implementation of the acceptance operation.

    Raises:
        ModelError: the logits are not finite; nothing that follows would mean anything.
    """
    ask = Ask(
        temperature=temperature(index, config),
        pins=pins,
        banned=banned,
        draws=None if greedy else draws,
    )
    reading = read_logits(logits, ask)
    refuse_unfinite(reading.entropy_nats.isfinite().all(), index)
    vocab = logits.shape[-1]
    return next_canvas(reading, index, config, draws, vocab, pins=pins, impl=impl)


def next_canvas(
    reading: Reading,
    index: int,
    config: SamplerConfig,
    draws: Draws,
    vocab: int,
    *,
    pins: Pins | None,
    impl: Literal["gpu", "reference"],
) -> Step:
    """The step that a reading leads to; arguments as of `denoise_step`."""
    rows, tokens = reading.argmax.shape
    taken = accept(
        reading.entropy_nats,
        reading.proposal,
        draws.noise(rows, tokens, vocab),
        None if pins is None else pins.mask,
        None if pins is None else pins.tokens,
        budget_nats=config.entropy_budget_nats,
        impl=impl,
    )
    return Step(
        index=index,
        canvas=taken.canvas,
        argmax=reading.argmax,
        log_probability=reading.log_probability,
        entropy_nats=reading.entropy_nats,
        accepted=taken.accepted,
        belief=reading.belief,
    )


def refuse_unfinite(is_finite: Tensor, index: int) -> None:
    """Refuse a step whose entropies were not all finite.

    Raises:
        ModelError: nothing that follows would mean anything.
    """
    if not bool(is_finite):
        raise ModelError(
            f"step {index}: the model's logits are not finite",
            remedy="The weights are damaged or the precision is too low: check the checkpoint.",
        )


def denoise(
    model: CanvasModel,
    cache: PrefixCache,
    canvas: Tensor,
    config: SamplerConfig,
    draws: Draws,
    *,
    stop: StopRule,
    pins: Pins | None = None,
    banned: Bans | None = None,
    greedy: bool = False,
    on_step: Callable[[Step], None] | None = None,
    is_late: Callable[[], bool] | None = None,
) -> Denoised:
    """Refine canvases as `denoising` does, alone on the model."""
    work = denoising(
        cache,
        canvas,
        config,
        draws,
        vocab_tokens=model.config.vocab_tokens,
        stop=stop,
        pins=pins,
        banned=banned,
        greedy=greedy,
        belief_tokens=model.belief_tokens,
        on_step=on_step,
        is_late=is_late,
    )
    return drive(model, work)


def denoising(
    cache: PrefixCache,
    canvas: Tensor,
    config: SamplerConfig,
    draws: Draws,
    *,
    vocab_tokens: int,
    stop: StopRule,
    pins: Pins | None = None,
    banned: Bans | None = None,
    greedy: bool = False,
    belief: Belief | Tensor | None = None,
    belief_tokens: int | None = None,
    is_draft: bool = False,
    held: Tensor | None = None,
    reading: Reading | None = None,
    on_step: Callable[[Step], None] | None = None,
    is_late: Callable[[], bool] | None = None,
) -> Work[Denoised]:
    """Refine canvases [R, L] until every row is done, it is late, or the steps are spent.

    A row's result is fixed in the pass in which its stop rule held; the others go on. On a GPU the
    host looks at a step while the next one runs, and one more pass is spent in the end.

    Args:
        cache: the encoded prefix, only read.
        canvas: starting tokens [R, L] int64.
        config, draws, pins, banned, greedy: see `denoise_step`.
        vocab_tokens: V.
        stop: asked after every pass.
        belief: what the first pass is told; None: nothing.
        belief_tokens: that a pass tells the next; None: all its logits.
        is_draft: the starting canvas counts as a pass's argmax: where the first pass leaves it as
            it is, it is stable.
        held: [R, L] bool, positions whose starting token is not re-noised as long as it stays the
            argmax: a draft is not to be lost to noise where the model agrees with it.
        reading: of the first pass, where somebody has it already.
        on_step: called after every pass; what it raises ends the work.
        is_late: asked after every pass; a late canvas is returned as it is, not as converged.
    """
    if pins is not None:
        canvas = pins.impose(canvas)
    free = torch.ones_like(canvas, dtype=torch.bool) if pins is None else ~pins.mask
    history = History(free)
    if is_draft:
        history.observe(canvas, torch.full(canvas.shape, torch.inf, device=canvas.device))
    result: Tensor | None = None
    converged = torch.zeros(canvas.shape[0], dtype=torch.bool, device=canvas.device)
    impl: Literal["gpu", "reference"] = "gpu" if canvas.is_cuda else "reference"
    polled: Polled[Step] = Polled(canvas.device)
    passes = 0
    for index in range(config.max_steps):
        if reading is None:
            ask = Ask(
                temperature=temperature(index, config),
                pins=pins,
                banned=banned,
                draws=None if greedy else draws,
                top=belief_tokens,
            )
            (reading,) = yield [CanvasPass(canvas, cache, belief, ask)]
        step = next_canvas(reading, index, config, draws, vocab_tokens, pins=pins, impl=impl)
        reading = None
        if result is None:
            result, log_probability = step.argmax, step.log_probability
        else:
            open_rows = ~converged[:, None]
            result = torch.where(open_rows, step.argmax, result)
            log_probability = torch.where(open_rows, step.log_probability, log_probability)
        history.observe(step.argmax, step.entropy_nats)
        converged = converged | stop.done(history)
        is_finite = step.entropy_nats.isfinite().all()
        polled.push(step, is_finite, converged, step.argmax, step.log_probability, step.accepted)
        was_late = is_late is not None and is_late()
        is_end = was_late or index + 1 == config.max_steps
        for seen, (was_finite, were_converged, *shown) in polled.seen(is_last=is_end):
            refuse_unfinite(was_finite, seen.index)
            passes = seen.index + 1
            if on_step is not None:
                argmax, logs, accepted = shown
                on_step(replace(seen, argmax=argmax, log_probability=logs, accepted=accepted))
            is_end = is_end or bool(were_converged.all())
        if is_end or (is_late is not None and is_late()):
            break
        following, belief = step.canvas, step.belief
        if held is not None:
            held = held & (step.argmax == canvas)
            following = torch.where(held, canvas, following)
        canvas = following
    assert result is not None
    return Denoised(
        tokens=result, log_probability=log_probability, passes=passes, converged=converged
    )


def generate(
    model: CanvasModel,
    prompt: Tensor,
    config: SamplerConfig,
    draws: Draws,
    *,
    cache: PrefixCache | None = None,
    max_new_tokens: int | None = None,
) -> Tensor:
    """Continue a prompt canvas by canvas, as `transformers` generates.

    Every canvas but the last is committed (encoded) before the next begins. The text ends with
    the first canvas that holds an eos; what follows the eos in it becomes pad.

    Args:
        model: weights.
        prompt: token ids [N] int64, at least one.
        config: schedule, stop rule, eos and pad.
        draws: random numbers.
        cache: reused as far as it matches the prompt; None starts anew.
        max_new_tokens: rounded up to whole canvases; None: the configuration's.

    Returns:
        New tokens [canvases * L] int64.

    Raises:
        RequestError: the prompt is empty. ContextTooLong: it leaves no room for a canvas.
    """
    if len(prompt) == 0:
        raise RequestError("the prompt is empty", remedy="Begin the prompt with the bos token.")
    cache = model.new_cache() if cache is None else cache
    new = config.max_new_tokens if max_new_tokens is None else max_new_tokens
    canvases = -(-new // model.config.canvas_tokens)
    end = len(prompt) + canvases * model.config.canvas_tokens
    # The last canvas is not encoded.
    room = model.context_tokens + model.config.canvas_tokens
    if end > room:
        raise ContextTooLong(
            f"{len(prompt)} prompt tokens and {canvases} canvases end at position {end}, "
            f"there is room for {room}"
        )
    return torch.cat(list(_canvases(model, prompt, config, draws, cache, canvases)))


def _canvases(
    model: CanvasModel,
    prompt: Tensor,
    config: SamplerConfig,
    draws: Draws,
    cache: PrefixCache,
    count: int,
) -> Iterator[Tensor]:
    unread = prompt[cache.reuse(prompt.tolist()) :]
    length = model.config.canvas_tokens
    stop = reference_stop(config)
    for _ in range(count):
        model.encode(unread, cache)
        canvas = draws.first_canvas(1, length, model.config.vocab_tokens).to(model.device)
        denoised = denoise(model, cache, canvas, config, draws, stop=stop)
        unread, ended = _end_text(denoised.tokens[0], config)
        yield unread
        if ended:
            return


def _end_text(tokens: Tensor, config: SamplerConfig) -> tuple[Tensor, bool]:
    """Tokens [L] with pad after the first eos, and whether there was one."""
    eos = torch.isin(tokens, torch.tensor(config.eos_ids, dtype=tokens.dtype, device=tokens.device))
    if not bool(eos.any()):
        return tokens, False
    if config.pad_id is not None:
        after = torch.arange(len(tokens), device=tokens.device) > eos.int().argmax()
        tokens = tokens.masked_fill(after, config.pad_id)
    return tokens, True
