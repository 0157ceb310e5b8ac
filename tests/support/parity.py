"""`transformers` as the judge: one pass, a recorded run, a whole run, a score.

The reference runs with its DynamicCache only; with a StaticCache it is wrong in sliding layers as
soon as the prefix reaches the window.
"""

import functools
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import SamplerConfig
from infilld.engine.model import DiffusionGemma

# One float32 pass on the same canvas and the same belief, up to 6 layers and logits up to 25.
LOGIT_CEILING = 1e-4
# The reference rounds partial sums of entropies to float32; ours are exact.
SUM_SLACK_NATS = 1e-6


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; infinite where one of them is not finite."""
    if a.numel() == 0:
        return 0.0
    return float((a.double() - b.double()).abs().nan_to_num(nan=torch.inf).max())


def reference_cache(model: Any) -> Any:
    """A fresh DynamicCache for `transformers`."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


@torch.no_grad()
def reference_pass(model: Any, prefix: Tensor, canvas: Tensor, belief: Tensor | None) -> Tensor:
    """Logits [R, L, V] of canvases [R, L] after prefix [N], by `transformers`."""
    out = model(
        input_ids=prefix.expand(canvas.shape[0], -1),
        decoder_input_ids=canvas,
        self_conditioning_logits=belief,
        past_key_values=reference_cache(model),
    )
    logits: Tensor = out.logits
    return logits


@torch.no_grad()
def reference_hidden(model: Any, prefix: Tensor) -> Tensor:
    """Normed hidden states [N, D] of the encoder, by `transformers`."""
    out = model.model.encoder(input_ids=prefix[None], past_key_values=reference_cache(model))
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


@torch.no_grad()
def reference_log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Log-probability [N - 1] of every token but the first, given those before it."""
    logits = model.lm_head(reference_hidden(model, tokens)).float()
    capped = 30.0 * torch.tanh(logits / 30.0)
    return capped.log_softmax(-1)[:-1].gather(-1, tokens[1:, None])[:, 0]


def encoded(model: DiffusionGemma, prefix: Tensor, margin: int | None = None) -> PrefixCache:
    """Our cache of a prefix."""
    cache = model.new_cache(margin)
    model.encode(prefix, cache)
    return cache


def our_pass(
    model: DiffusionGemma, prefix: Tensor, canvas: Tensor, belief: Tensor | None
) -> Tensor:
    """Logits [R, L, V] of canvases [R, L] after prefix [N], by the engine."""
    return model.denoise(canvas, encoded(model, prefix), belief)


def random_canvas(vocab_tokens: int, rows: int, tokens: int, seed: int) -> Tensor:
    """Uniform token ids [R, L] int64."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_tokens, (rows, tokens), generator=draw)


def random_belief(vocab_tokens: int, rows: int, tokens: int, seed: int) -> Tensor:
    """Logits [R, L, V] as a step leaves them: some rows flat, some nearly certain."""
    draw = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(rows, tokens, 1, generator=draw) * 12
    return torch.randn(rows, tokens, vocab_tokens, generator=draw) * sharpness


class ReferenceDraws:
    """The calls of `generate`, in its order, from a generator of our own.

    A private generator seeded alike gives the stream of the global one.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def first_canvas(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        return torch.randint(0, vocab_tokens, (rows, canvas_tokens), generator=self.generator)

    def sample(self, probabilities: Tensor) -> Tensor:
        # A damaged model is refused behind the draw, which must not fail before.
        flat = probabilities.nan_to_num(1.0).view(-1, probabilities.shape[-1])
        drawn = torch.multinomial(flat, num_samples=1, generator=self.generator)
        return drawn.view(probabilities.shape[:-1])

    def noise(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        return self.first_canvas(rows, canvas_tokens, vocab_tokens)


class ScriptedDraws:
    """Gives back what was drawn elsewhere."""

    def __init__(self, sample: Tensor, noise: Tensor) -> None:
        self._sample, self._noise = sample, noise

    def first_canvas(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        raise AssertionError("a step draws no first canvas")

    def sample(self, probabilities: Tensor) -> Tensor:
        return self._sample

    def noise(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        return self._noise


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """What `generate` saw and decided in one step.

    Attributes:
        prefix: all tokens before the canvas [N]. index: counted up from 0 in the canvas.
        canvas, belief: what the pass read. logits: soft-capped. scaled: after the temperature.
        sample, noise: the draws. accepted: positions. next_canvas, argmax: the outcome.
        stopped: whether the stop rule held.
    """

    prefix: Tensor
    index: int
    canvas: Tensor
    belief: Tensor | None
    logits: Tensor
    scaled: Tensor
    sample: Tensor
    noise: Tensor
    accepted: Tensor
    next_canvas: Tensor
    argmax: Tensor
    stopped: bool


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A run of `generate`: its steps and the new tokens [canvases * L]."""

    steps: Sequence[RecordedStep]
    tokens: Tensor

    @property
    def passes(self) -> list[int]:
        """Passes of each canvas."""
        lengths = [len(step.prefix) for step in self.steps]
        return [len(list(group)) for _, group in itertools.groupby(lengths)]


def reference_generate(model: Any, prompt: Tensor, seed: int, **options: Any) -> Tensor:
    """New tokens of `generate`."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # It imports parts of torch that warn of their own end.
        warnings.simplefilter("ignore", DeprecationWarning)
        out = model.generate(input_ids=prompt[None], **options)
    tokens: Tensor = out.sequences[0, len(prompt) :]
    return tokens


def record(model: Any, prompt: Tensor, seed: int, **options: Any) -> Recording:
    """Run `generate` and write every step down."""
    steps: list[RecordedStep] = []
    with _spied(model, steps):
        tokens = reference_generate(model, prompt, seed, **options)
    return Recording(steps=steps, tokens=tokens)


@contextmanager
def _spied(model: Any, steps: list[RecordedStep]) -> Iterator[None]:
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as module

    sampler = module.EntropyBoundSampler
    seen: dict[str, Any] = {}
    real_step, real_accept = model._denoising_step, sampler.accept_canvas
    real_draw = sampler.initialize_canvas
    indices: dict[int, int] = {}

    def spy_draw(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen["noise"] = real_draw(self, *args, **kwargs)
        return seen["noise"].clone()

    def spy_accept(
        self: Any, canvas: Tensor, proposal: Tensor, logits: Tensor, step: Any
    ) -> Tensor:
        accepted: Tensor = real_accept(self, canvas, proposal, logits, step)
        seen.update(sample=proposal.clone(), scaled=logits.clone(), mask=self.accepted_token_mask)
        return accepted

    def spy_step(**kwargs: Any) -> Any:
        forward = kwargs.pop("decoder_forward")

        def spy_forward(**inputs: Any) -> Any:
            out = forward(**inputs)
            seen["logits"] = out.logits.clone()
            return out

        prefix = kwargs["input_ids"][0].clone()
        before = kwargs["current_canvas"].clone()
        belief = kwargs["self_conditioning_logits"]
        outcome = real_step(decoder_forward=spy_forward, **kwargs)
        index = indices.get(len(prefix), 0)
        indices[len(prefix)] = index + 1
        steps.append(
            RecordedStep(
                prefix=prefix,
                index=index,
                canvas=before,
                belief=None if belief is None else belief.clone(),
                logits=seen["logits"],
                scaled=seen["scaled"],
                sample=seen["sample"],
                noise=seen["noise"],
                accepted=seen["mask"].clone(),
                next_canvas=outcome[0].clone(),
                argmax=outcome[1].clone(),
                stopped=bool(outcome[3].all()),
            )
        )
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_denoising_step", spy_step)
        patch.setattr(sampler, "accept_canvas", spy_accept)
        patch.setattr(sampler, "initialize_canvas", spy_draw)
        yield


def undecided(
    entropy_nats: Tensor, config: SamplerConfig, slack_nats: float = SUM_SLACK_NATS
) -> Tensor:
    """Positions [R, L] whose acceptance hangs on rounding: sums at the budget, equal entropies."""
    ranked, order = entropy_nats.sort(dim=-1, stable=True)
    before = ranked.double().cumsum(-1) - ranked.double()
    near = (before - config.entropy_budget_nats).abs() <= slack_nats
    tied = torch.zeros_like(near)
    close = ranked[:, 1:] - ranked[:, :-1] <= slack_nats
    # A tie only matters where the budget ends between the two.
    within = before <= config.entropy_budget_nats
    ends = close & (within[:, 1:] != within[:, :-1])
    tied[:, 1:] |= ends
    tied[:, :-1] |= ends
    return torch.zeros_like(near).scatter_(-1, order, near | tied)


@dataclass(frozen=True, kw_only=True)
class PassCase:
    """One pass to compare: the prefix's length, the canvas's shape, a belief or none."""

    prefix: int
    rows: int = 1
    tokens: int
    belief: bool
    seed: int = 0

    def __str__(self) -> str:
        """Readable test id."""
        belief = "belief" if self.belief else "first"
        return f"prefix{self.prefix}-{self.rows}x{self.tokens}-{belief}"


def pass_inputs(spec: Any, case: PassCase) -> tuple[Tensor, Tensor, Tensor | None]:
    """Prefix [N], canvas [R, L] and belief [R, L, V] or None of a case."""
    from tiny_model import random_tokens

    shape = (spec.vocab_tokens, case.rows, case.tokens)
    seed = 1000 * case.prefix + 10 * case.tokens + case.seed
    return (
        random_tokens(spec, case.prefix, seed),
        random_canvas(*shape, seed=seed + 1),
        random_belief(*shape, seed=seed + 2) if case.belief else None,
    )


def pass_distance(model: DiffusionGemma, spec: Any, cases: Sequence[PassCase]) -> float:
    """Largest difference of logits between `model` and the reference over the cases."""
    return max(
        distance(our_pass(model, *pass_inputs(spec, case)), reference_logits(spec, case))
        for case in cases
    )


@functools.cache
def reference_logits(spec: Any, case: PassCase) -> Tensor:
    """Logits [R, L, V] of a case by `transformers`, computed once a process."""
    from tiny_model import reference

    return reference_pass(reference(spec), *pass_inputs(spec, case))
