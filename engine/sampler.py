"""The denoise loop and its step; nothing else.

    canvas, belief ──pass──▶ logits / T ──▶ proposal, argmax, entropy ──accept──▶ next canvas
                                  └──────────────▶ belief ──────────────────────▶ next step

Nothing is frozen: acceptance is decided anew in every step, and positions that are not accepted
get fresh noise. Pinned positions are imposed after every re-noise and spend no entropy budget.

Source: arXiv 2505.24857 (entropy bound); transformers 5.23.0, generation_diffusion_gemma.py
(order of the step, stop rule, eos).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import SamplerConfig
from infilld.engine.draws import Draws
from infilld.engine.errors import ContextTooLong, ModelError, RequestError
from infilld.engine.model import CanvasPass, DiffusionGemma
from infilld.engine.passes import Work, drive
from infilld.engine.schedule import temperature
from infilld.engine.stopping import History, StopRule, reference_stop
from infilld.kernels.accept import accept


@dataclass(frozen=True, kw_only=True)
class Pins:
    """Positions whose token is imposed.

    Attributes:
        mask: [R, L] bool, True where pinned. tokens: [R, L] int64, read where mask is True.
    """

    mask: Tensor
    tokens: Tensor

    def impose(self, canvas: Tensor) -> Tensor:
        """Canvas [R, L] with the pinned tokens in place."""
        return torch.where(self.mask, self.tokens, canvas)


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
        belief: scaled logits carried to the next pass [R, L, V] float32.
    """

    index: int
    canvas: Tensor
    argmax: Tensor
    log_probability: Tensor
    entropy_nats: Tensor
    accepted: Tensor
    belief: Tensor


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
    banned: Tensor | None = None,
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
        banned: [V] or [L, V] bool, tokens that free positions may not take.
        greedy: accepted positions take the argmax instead of a sample.
        impl: implementation of the acceptance operation.

    Raises:
        ModelError: the logits are not finite; nothing that follows would mean anything.
    """
    rows, tokens, vocab = logits.shape
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    if pins is not None:
        logits = _certain(logits, pins)
    scaled = logits / temperature(index, config).to(logits.device)
    probabilities = scaled.softmax(-1)
    log_probabilities = scaled.log_softmax(-1)
    argmax = scaled.argmax(-1)
    # p log p is 0 where p is 0; -inf logits would make it NaN. A NaN of the model must stay one.
    terms = torch.where(probabilities == 0, 0.0, probabilities * log_probabilities)
    entropy = -terms.sum(-1)
    if not bool(entropy.isfinite().all()):
        raise ModelError(
            f"step {index}: the model's logits are not finite",
            remedy="The weights are damaged or the precision is too low: check the checkpoint.",
        )
    proposal = argmax if greedy else draws.sample(probabilities)
    noise = draws.noise(rows, tokens, vocab)
    taken = accept(
        entropy,
        proposal,
        noise,
        None if pins is None else pins.mask,
        None if pins is None else pins.tokens,
        budget_nats=config.entropy_budget_nats,
        impl=impl,
    )
    return Step(
        index=index,
        canvas=taken.canvas,
        argmax=argmax,
        log_probability=log_probabilities.gather(-1, argmax[..., None])[..., 0],
        entropy_nats=entropy,
        accepted=taken.accepted,
        belief=scaled,
    )


def denoise(
    model: DiffusionGemma,
    cache: PrefixCache,
    canvas: Tensor,
    config: SamplerConfig,
    draws: Draws,
    *,
    stop: StopRule,
    pins: Pins | None = None,
    banned: Tensor | None = None,
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
        stop=stop,
        pins=pins,
        banned=banned,
        greedy=greedy,
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
    stop: StopRule,
    pins: Pins | None = None,
    banned: Tensor | None = None,
    greedy: bool = False,
    belief: Tensor | None = None,
    is_draft: bool = False,
    held: Tensor | None = None,
    logits: Tensor | None = None,
    on_step: Callable[[Step], None] | None = None,
    is_late: Callable[[], bool] | None = None,
) -> Work[Denoised]:
    """Refine canvases [R, L] until every row is done, it is late, or the steps are spent.

    A row's result is fixed in the pass in which its stop rule held; the others go on.

    Args:
        cache: the encoded prefix, only read.
        canvas: starting tokens [R, L] int64.
        config, draws, pins, banned, greedy: see `denoise_step`.
        stop: asked after every pass.
        belief: [R, L, V] logits that the first pass is told; None: nothing.
        is_draft: the starting canvas counts as a pass's argmax: where the first pass leaves it as
            it is, it is stable.
        held: [R, L] bool, positions whose starting token is not re-noised as long as it stays the
            argmax: a draft is not to be lost to noise where the model agrees with it.
        logits: [R, L, V] of the first pass, where somebody has them already.
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
    for index in range(config.max_steps):
        if logits is None:
            (logits,) = yield [CanvasPass(canvas, cache, belief)]
        step = denoise_step(
            logits, index, config, draws, pins=pins, banned=banned, greedy=greedy, impl=impl
        )
        logits = None
        if result is None:
            result, log_probability = step.argmax, step.log_probability
        else:
            open_rows = ~converged[:, None]
            result = torch.where(open_rows, step.argmax, result)
            log_probability = torch.where(open_rows, step.log_probability, log_probability)
        history.observe(step.argmax, step.entropy_nats)
        converged = converged | stop.done(history)
        if on_step is not None:
            on_step(step)
        if bool(converged.all()) or (is_late is not None and is_late()):
            break
        following, belief = step.canvas, step.belief
        if held is not None:
            held = held & (step.argmax == canvas)
            following = torch.where(held, canvas, following)
        canvas = following
    assert result is not None
    return Denoised(
        tokens=result,
        log_probability=log_probability,
        passes=index + 1,
        converged=converged,
    )


def generate(
    model: DiffusionGemma,
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
    if end > model.config.max_positions:
        raise ContextTooLong(
            f"{len(prompt)} prompt tokens and {canvases} canvases end at position {end}, "
            f"the model has {model.config.max_positions}"
        )
    return torch.cat(list(_canvases(model, prompt, config, draws, cache, canvases)))


def _canvases(
    model: DiffusionGemma,
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


def _certain(logits: Tensor, pins: Pins) -> Tensor:
    """Logits whose pinned positions are certain of their pin: entropy 0, one-hot belief."""
    onehot = torch.full_like(logits, -torch.inf).scatter_(-1, pins.tokens[..., None], 0.0)
    return torch.where(pins.mask[..., None], onehot, logits)
