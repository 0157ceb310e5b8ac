"""The parity tests can fail: every planted fault is seen by the comparison that should see it.

A fault is planted in a copy of the model or, for a moment, in the engine's code. Each of these has
been a real bug of a public engine or is one slip away from this one.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import (
    LOGIT_CEILING,
    PassCase,
    Recording,
    ReferenceDraws,
    ScriptedDraws,
    distance,
    pass_distance,
    record,
    reference_generate,
    reference_hidden,
    undecided,
)
from tiny_model import (
    TAME,
    WIDE_HEADS,
    WILD,
    changeable,
    checkpoint,
    exact_reference,
    ours,
    random_tokens,
    reference,
)
from torch import Tensor

import infilld.engine.layers as layers
import infilld.engine.model as model_module
import infilld.engine.sampler as sampler
from infilld.engine.cache import PrefixCache
from infilld.engine.config import SamplerConfig
from infilld.engine.model import DiffusionGemma
from infilld.engine.sampler import denoise_step, generate
from infilld.engine.stopping import LowEntropy, Stable
from infilld.kernels.accept import Accepted
from infilld.kernels.accept import accept as real_accept

Patch = pytest.MonkeyPatch
Plant = Callable[[DiffusionGemma, Patch], None]

SPEC = WIDE_HEADS
# A subset of test_parity_pass: short and long prefix, first step and with a belief.
CASES = [
    PassCase(prefix=prefix, tokens=SPEC.canvas_tokens, belief=belief)
    for prefix in (5, 2 * SPEC.window + 3)
    for belief in (False, True)
]
# Far above noise: a fault must not pass because of an unlucky draw of weights.
VISIBLE = 10 * LOGIT_CEILING


def seen(plant: Plant, patch: Patch, cases: list[PassCase] = CASES) -> float:
    model = changeable(SPEC)
    plant(model, patch)
    return pass_distance(model, SPEC, cases)


def test_without_a_fault_the_comparison_passes(monkeypatch: Patch) -> None:
    assert seen(lambda model, patch: None, monkeypatch) < LOGIT_CEILING


# Weights that must be read, and multiplied in the right place.

NORMS = [
    "layers.0.input_layernorm",
    "layers.0.post_attention_layernorm",
    "layers.0.pre_feedforward_layernorm",
    "layers.0.post_feedforward_layernorm",
    "layers.0.post_feedforward_layernorm_1",
    "layers.0.pre_feedforward_layernorm_2",
    "layers.0.post_feedforward_layernorm_2",
    "layers.0.self_attn.q_norm",
    "layers.0.self_attn.k_norm",
    "layers.2.self_attn.q_norm",
    "layers.2.self_attn.k_norm",
    "self_conditioning.pre_norm",
    "norm",
]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("fault", ["removed", "without-weight", "one-plus-weight"])
def test_norm(name: str, fault: str, monkeypatch: Patch) -> None:
    def plant(model: DiffusionGemma, patch: Patch) -> None:
        norm = model.get_submodule(name)
        if fault == "removed":
            patch.setattr(norm, "forward", lambda x: x)
        elif fault == "without-weight":
            norm.weight.data.fill_(1)
        else:
            norm.weight.data.add_(1)

    assert seen(plant, monkeypatch) > VISIBLE


@pytest.mark.parametrize("name", ["router.scale", "router.per_expert_scale", "layer_scalar"])
def test_scale_is_ignored(name: str, monkeypatch: Patch) -> None:
    def plant(model: DiffusionGemma, patch: Patch) -> None:
        for layer in model.layers:
            owner, _, attribute = name.rpartition(".")
            getattr(layer.get_submodule(owner), attribute).data.fill_(1)

    assert seen(plant, monkeypatch) > VISIBLE


def encoder_has_the_decoders_scalars(model: DiffusionGemma, patch: Patch) -> None:
    model.encoder_scalars.copy_(torch.cat([x.get_buffer("layer_scalar") for x in model.layers]))


def decoder_has_the_encoders_scalars(model: DiffusionGemma, patch: Patch) -> None:
    for layer, scalar in zip(model.layers, model.encoder_scalars, strict=True):
        layer.get_buffer("layer_scalar").fill_(scalar)


# Attention: what is seen, and from where.


def cached_window_is_one_too_long(model: DiffusionGemma, patch: Patch) -> None:
    patch.setattr(PrefixCache, "_sliding_needs", lambda self: SPEC.window)


def cached_window_is_one_too_short(model: DiffusionGemma, patch: Patch) -> None:
    patch.setattr(PrefixCache, "_sliding_needs", lambda self: SPEC.window - 2)


class _Functional:
    """`torch.nn.functional` with another attention."""

    def __init__(self, attention: Callable[..., Tensor]) -> None:
        self.scaled_dot_product_attention = attention

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


def _attention(patch: Patch, attention: Callable[..., Tensor]) -> None:
    patch.setattr(model_module, "F", _Functional(attention))


def canvas_rows_have_a_window_each(model: DiffusionGemma, patch: Patch) -> None:
    sliding = model.config.head_sizes["sliding"]

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if options.get("attn_mask") is None and q.shape[-1] == sliding:
            row = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
            options["attn_mask"] = (row - torch.arange(k.shape[2])).abs() < SPEC.window
        return F.scaled_dot_product_attention(q, k, v, **options)

    _attention(patch, attention)


def canvas_is_causal(model: DiffusionGemma, patch: Patch) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if options.get("attn_mask") is None:
            row = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None]
            options["attn_mask"] = torch.arange(k.shape[2]) <= row
        return F.scaled_dot_product_attention(q, k, v, **options)

    _attention(patch, attention)


def attention_is_scaled(model: DiffusionGemma, patch: Patch) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **(options | {"scale": None}))

    _attention(patch, attention)


def encoder_sees_ahead(model: DiffusionGemma, patch: Patch) -> None:
    real = DiffusionGemma._causal_mask

    def mask(self: DiffusionGemma, *args: int) -> Tensor:
        return real(self, *args) | True

    patch.setattr(DiffusionGemma, "_causal_mask", mask)


def encoder_window(by: int) -> Plant:
    def plant(model: DiffusionGemma, patch: Patch) -> None:
        real = DiffusionGemma._causal_mask
        wrong = replace(model.config, sliding_window=SPEC.window + by)

        def mask(self: DiffusionGemma, *args: int) -> Tensor:
            right, self.config = self.config, wrong
            try:
                return real(self, *args)
            finally:
                self.config = right

        patch.setattr(DiffusionGemma, "_causal_mask", mask)

    return plant


def canvas_positions_start_at_zero(model: DiffusionGemma, patch: Patch) -> None:
    real = model._run

    def run(x: Tensor, positions: Tensor, attend: Any, scalars: list[Tensor]) -> Tensor:
        decoding = scalars[0] is model.layers[0].get_buffer("layer_scalar")
        return real(x, positions - positions[0] if decoding else positions, attend, scalars)

    patch.setattr(model, "_run", run)


# Projections and rotary.


def value_is_the_normed_key(model: DiffusionGemma, patch: Patch) -> None:
    attention = model.layers[2].self_attn

    def forward(x: Tensor, rotary: Any, attend: Any, layer: int) -> Tensor:
        query = layers.rotate(attention.q_norm(attention._heads(attention.q_proj(x))), rotary)
        key = attention.k_norm(attention._heads(attention.k_proj(x)))
        value = layers.rms_norm(key, None, attention.eps)
        out = attend(layer, query, layers.rotate(key, rotary), value)
        return attention.o_proj(out.transpose(1, 2).flatten(2))

    patch.setattr(attention, "forward", forward)


def values_are_not_normed(model: DiffusionGemma, patch: Patch) -> None:
    real = layers.rms_norm
    size = model.config.head_sizes["sliding"]

    def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return x if weight is None and x.shape[-1] == size else real(x, weight, eps)

    patch.setattr(layers, "rms_norm", rms_norm)


def exponent_over_the_rotary_part(model: DiffusionGemma, patch: Patch) -> None:
    rotation = model.rotations["full"]
    turning = int(rotation.rope.rotary_fraction * rotation.head_size // 2)
    exponent = torch.arange(turning) / turning
    rotation.frequencies[:turning] = rotation.rope.theta**-exponent


def everything_turns(model: DiffusionGemma, patch: Patch) -> None:
    rotation = model.rotations["full"]
    exponent = torch.arange(0, rotation.head_size, 2) / rotation.head_size
    rotation.frequencies.copy_(rotation.rope.theta**-exponent)


def neighbours_are_paired(model: DiffusionGemma, patch: Patch) -> None:
    def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        half = x.shape[-1] // 2
        cosine, sine = (part[..., :half].repeat_interleave(2, -1) for part in rotary)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cosine + turned * sine

    patch.setattr(layers, "rotate", rotate)


def thetas_are_swapped(model: DiffusionGemma, patch: Patch) -> None:
    rotation = model.rotations["sliding"]
    exponent = torch.arange(0, rotation.head_size, 2) / rotation.head_size
    rotation.frequencies.copy_(1e6**-exponent)


# Feed-forward.


def router_reads_the_normed_input(model: DiffusionGemma, patch: Patch) -> None:
    for layer in model.layers:
        norm, forward = layer.pre_feedforward_layernorm_2, layer.router.forward
        patch.setattr(layer.router, "forward", lambda x, n=norm, f=forward: f(n(x)))


def router_reads_the_mlp_input(model: DiffusionGemma, patch: Patch) -> None:
    for layer in model.layers:
        norm, forward = layer.pre_feedforward_layernorm, layer.router.forward
        patch.setattr(layer.router, "forward", lambda x, n=norm, f=forward: f(n(x)))


def router_is_not_scaled_by_the_width(model: DiffusionGemma, patch: Patch) -> None:
    for layer in model.layers:
        layer.router.root = 1.0


def expert_weights_do_not_sum_to_one(model: DiffusionGemma, patch: Patch) -> None:
    def forward(self: layers.Router, residual: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.proj(layers.rms_norm(residual, None, self.eps) * self.scale * self.root)
        weights, ids = scores.softmax(-1).topk(self.chosen, dim=-1)
        return weights * self.per_expert_scale[ids], ids

    patch.setattr(layers.Router, "forward", forward)


def one_expert_fewer(model: DiffusionGemma, patch: Patch) -> None:
    for layer in model.layers:
        layer.router.chosen -= 1


def gate_and_up_are_swapped(model: DiffusionGemma, patch: Patch) -> None:
    for layer in model.layers:
        gate, up = layer.experts.gate_up_proj.data.chunk(2, dim=1)
        layer.experts.gate_up_proj.data = torch.cat((up, gate), dim=1)


def gelu_is_exact(model: DiffusionGemma, patch: Patch) -> None:
    patch.setattr(layers, "gelu", F.gelu)


def experts_read_the_raw_residual(model: DiffusionGemma, patch: Patch) -> None:
    for layer in model.layers:
        patch.setattr(layer.pre_feedforward_layernorm_2, "forward", lambda x: x)


# Ends of the model.


def soft_cap_is_dropped(model: DiffusionGemma, patch: Patch) -> None:
    patch.setattr(model, "logits", lambda h: F.linear(h, model.embed_tokens.weight).float())


def soft_cap_is_half(model: DiffusionGemma, patch: Patch) -> None:
    object.__setattr__(model, "config", replace(model.config, softcap=15.0))


def embedding_is_not_scaled(model: DiffusionGemma, patch: Patch) -> None:
    patch.setattr(model, "embed", lambda tokens: model.embed_tokens(tokens))


def belief_is_not_scaled(model: DiffusionGemma, patch: Patch) -> None:
    patch.setattr(
        model, "embed_belief", lambda belief: belief.softmax(-1) @ model.embed_tokens.weight
    )


def belief_is_ignored(model: DiffusionGemma, patch: Patch) -> None:
    block = model.self_conditioning
    real = block.forward
    patch.setattr(block, "forward", lambda embedded, signal: real(embedded, None))


def belief_is_added_after_the_norm(model: DiffusionGemma, patch: Patch) -> None:
    block = model.self_conditioning

    def forward(embedded: Tensor, signal: Tensor | None) -> Tensor:
        normed = layers.rms_norm(embedded, None, block.eps)
        if signal is None:
            return normed
        inner = block.pre_norm(signal)
        return normed + block.down_proj(layers.gelu(block.gate_proj(inner)) * block.up_proj(inner))

    patch.setattr(block, "forward", forward)


def first_step_is_not_normed(model: DiffusionGemma, patch: Patch) -> None:
    block = model.self_conditioning
    real = block.forward
    patch.setattr(
        block, "forward", lambda embedded, s: embedded if s is None else real(embedded, s)
    )


def encoder_input_is_normed(model: DiffusionGemma, patch: Patch) -> None:
    real = model._encode_piece

    def encode(tokens: Tensor, cache: PrefixCache) -> Tensor:
        with Patch.context() as inner:
            embed = model.embed
            inner.setattr(model, "embed", lambda t: layers.rms_norm(embed(t), None, 1e-6))
            return real(tokens, cache)

    patch.setattr(model, "_encode_piece", encode)


FAULTS: list[Plant] = [
    encoder_has_the_decoders_scalars,
    decoder_has_the_encoders_scalars,
    cached_window_is_one_too_long,
    cached_window_is_one_too_short,
    canvas_rows_have_a_window_each,
    canvas_is_causal,
    attention_is_scaled,
    encoder_sees_ahead,
    canvas_positions_start_at_zero,
    value_is_the_normed_key,
    values_are_not_normed,
    exponent_over_the_rotary_part,
    everything_turns,
    neighbours_are_paired,
    thetas_are_swapped,
    router_reads_the_normed_input,
    router_reads_the_mlp_input,
    router_is_not_scaled_by_the_width,
    expert_weights_do_not_sum_to_one,
    one_expert_fewer,
    gate_and_up_are_swapped,
    gelu_is_exact,
    experts_read_the_raw_residual,
    soft_cap_is_dropped,
    soft_cap_is_half,
    embedding_is_not_scaled,
    belief_is_not_scaled,
    belief_is_ignored,
    belief_is_added_after_the_norm,
    first_step_is_not_normed,
    encoder_input_is_normed,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_fault_in_the_model(plant: Plant, monkeypatch: Patch) -> None:
    assert seen(plant, monkeypatch) > VISIBLE


@pytest.mark.parametrize("by", [-1, 1])
def test_fault_in_the_encoders_window(by: int, monkeypatch: Patch) -> None:
    plant = encoder_window(by)
    assert seen(plant, monkeypatch) > VISIBLE
    # The states alone show it too, without a canvas.
    tokens = random_tokens(SPEC, 2 * SPEC.window + 3, seed=1)
    model = changeable(SPEC)
    plant(model, monkeypatch)
    hidden = model.encode(tokens, model.new_cache())
    assert distance(hidden, reference_hidden(reference(SPEC), tokens)) > VISIBLE


class TestWhatOneComparisonAloneCannotSee:
    """Why the suite looks at long prefixes, at second steps and at weights that are not one."""

    def test_order_of_self_conditioning_is_invisible_in_the_first_step(
        self, monkeypatch: Patch
    ) -> None:
        first = [case for case in CASES if not case.belief]
        assert seen(belief_is_added_after_the_norm, monkeypatch, first) < LOGIT_CEILING

    def test_the_window_is_invisible_below_its_length(self, monkeypatch: Patch) -> None:
        short = [case for case in CASES if case.prefix < SPEC.window]
        assert seen(cached_window_is_one_too_long, monkeypatch, short) < LOGIT_CEILING

    def test_the_routers_input_is_invisible_with_weights_of_one(self) -> None:
        # The router norms its input itself: only a norm weight that varies tells the two apart.
        model = changeable(SPEC)
        for layer in model.layers:
            layer.pre_feedforward_layernorm_2.weight.data.fill_(1)
        case = CASES[-1]
        plain = pass_distance(model, SPEC, [case])
        with Patch.context() as patch:
            router_reads_the_normed_input(model, patch)
            assert pass_distance(model, SPEC, [case]) == pytest.approx(plain, abs=1e-3)


# The step, against recorded steps.

CONFIG = SamplerConfig.from_folder(checkpoint(TAME))


@functools.cache
def recorded() -> Recording:
    return record(reference(TAME), random_tokens(TAME, 20, 0), 0)


def wrong_steps(config: SamplerConfig = CONFIG) -> int:
    """How many recorded steps ours decides otherwise."""
    wrong = 0
    for known in recorded().steps:
        draws = ScriptedDraws(known.sample, known.noise)
        step = denoise_step(known.logits, known.index, config, draws)
        sure = ~undecided(step.entropy_nats, config)
        wrong += not (
            torch.equal(step.belief, known.scaled)
            and torch.equal(step.argmax, known.argmax)
            and torch.equal(step.accepted[sure], known.accepted[sure])
            and torch.equal(step.canvas[sure], known.next_canvas[sure])
        )
    return wrong


def test_without_a_fault_the_steps_agree() -> None:
    assert wrong_steps() == 0


def temperature_in_python(patch: Patch) -> None:
    def temperature(step: int, config: SamplerConfig) -> Tensor:
        noise = (config.max_steps - step) / config.max_steps
        return torch.tensor(config.t_min + (config.t_max - config.t_min) * noise)

    patch.setattr(sampler, "temperature", temperature)


def temperature_counts_up(patch: Patch) -> None:
    real = sampler.temperature
    patch.setattr(sampler, "temperature", lambda step, c: real(c.max_steps - 1 - step, c))


def temperature_starts_one_step_late(patch: Patch) -> None:
    real = sampler.temperature
    patch.setattr(sampler, "temperature", lambda step, config: real(step + 1, config))


def own_entropy_counts(patch: Patch) -> None:
    def accept(entropy: Tensor, proposal: Tensor, noise: Tensor, *_: Any, **options: Any) -> Any:
        ranked, order = entropy.sort(dim=-1, stable=True)
        within = ranked.cumsum(-1) <= options["budget_nats"]
        accepted = torch.empty_like(within).scatter_(-1, order, within)
        return Accepted(torch.where(accepted, proposal, noise), accepted)

    patch.setattr(sampler, "accept", accept)


def most_uncertain_first(patch: Patch) -> None:
    patch.setattr(sampler, "accept", lambda e, *args, **options: real_accept(-e, *args, **options))


def proposal_and_noise_are_swapped(patch: Patch) -> None:
    patch.setattr(sampler, "accept", lambda e, p, n, *args, **o: real_accept(e, n, p, *args, **o))


@pytest.mark.parametrize(
    "plant",
    [
        temperature_in_python,
        temperature_counts_up,
        temperature_starts_one_step_late,
        own_entropy_counts,
        most_uncertain_first,
        proposal_and_noise_are_swapped,
    ],
    ids=lambda plant: plant.__name__,
)
def test_fault_in_the_step(plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    assert wrong_steps() > 0


@pytest.mark.parametrize(
    "change",
    [{"max_steps": 23}, {"entropy_budget_nats": 0.12}, {"t_max": 0.79}, {"t_min": 0.41}],
    ids=lambda change: next(iter(change)),
)
def test_fault_in_the_schedule(change: dict[str, float]) -> None:
    assert wrong_steps(replace(CONFIG, **change)) > 0  # type: ignore[arg-type]


# The whole run: what is only seen over several steps.

# Its texts stop early, and end with an eos in the third canvas.
PROMPT, SEED = random_tokens(TAME, 20, 5), 5


@functools.cache
def whole() -> Tensor:
    return record(reference(TAME), PROMPT, SEED).tokens


def same_text(config: SamplerConfig = CONFIG) -> bool:
    found = generate(ours(TAME), PROMPT, config, ReferenceDraws(SEED))
    return torch.equal(found, whole())


def stop_one_pass_early(patch: Patch) -> None:
    real = Stable.done
    patch.setattr(
        Stable, "done", lambda self, history: real(replace(self, passes=self.passes - 1), history)
    )


def stop_one_pass_late(patch: Patch) -> None:
    real = Stable.done
    patch.setattr(
        Stable, "done", lambda self, history: real(replace(self, passes=self.passes + 1), history)
    )


def stop_without_certainty(patch: Patch) -> None:
    patch.setattr(LowEntropy, "done", lambda self, history: torch.tensor([True]))


def stop_on_the_sum(patch: Patch) -> None:
    patch.setattr(
        LowEntropy, "done", lambda self, history: history.entropy_nats.sum(-1) < self.mean_nats
    )


def belief_survives_the_canvas(patch: Patch) -> None:
    real, carried = DiffusionGemma.denoise, []

    def denoise(
        self: DiffusionGemma, canvas: Tensor, cache: PrefixCache, belief: Tensor | None
    ) -> Tensor:
        if belief is None and carried:
            belief = carried[-1]
        carried.append(real(self, canvas, cache, belief))
        return carried[-1]

    patch.setattr(DiffusionGemma, "denoise", denoise)


def noise_only_when_needed(patch: Patch) -> None:
    real = ReferenceDraws.noise
    calls: list[int] = []

    def noise(self: ReferenceDraws, rows: int, tokens: int, vocab: int) -> Tensor:
        calls.append(1)
        drawn = torch.zeros(rows, tokens, dtype=torch.int64)
        return drawn if len(calls) % 5 == 0 else real(self, rows, tokens, vocab)

    patch.setattr(ReferenceDraws, "noise", noise)


def nothing_is_padded(patch: Patch) -> None:
    real = sampler._end_text
    patch.setattr(sampler, "_end_text", lambda t, c: real(t, replace(c, pad_id=None)))


def eos_is_padded_too(patch: Patch) -> None:
    real = sampler._end_text

    def end_text(tokens: Tensor, config: SamplerConfig) -> tuple[Tensor, bool]:
        ended, done = real(tokens, config)
        eos = torch.isin(ended, torch.tensor(config.eos_ids))
        return ended.masked_fill(eos, 0), done

    patch.setattr(sampler, "_end_text", end_text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant",
    [
        stop_one_pass_early,
        stop_one_pass_late,
        stop_without_certainty,
        stop_on_the_sum,
        noise_only_when_needed,
        nothing_is_padded,
        eos_is_padded_too,
    ],
    ids=lambda plant: plant.__name__,
)
def test_fault_in_the_run(plant: Callable[[Patch], None]) -> None:
    assert same_text()
    with Patch.context() as patch:
        plant(patch)
        assert not same_text()


@pytest.mark.slow
def test_fault_between_canvases(monkeypatch: Patch) -> None:
    # The tame checkpoint forgives a belief that is wrong once; a wild one does not.
    config = replace(CONFIG, max_steps=10, max_new_tokens=48)
    options = {"max_denoising_steps": 10, "max_new_tokens": 48}
    expected = reference_generate(exact_reference(WILD), PROMPT, SEED, **options)
    model = ours(WILD, torch.float64)
    assert torch.equal(generate(model, PROMPT, config, ReferenceDraws(SEED)), expected)
    belief_survives_the_canvas(monkeypatch)
    assert not torch.equal(generate(model, PROMPT, config, ReferenceDraws(SEED)), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [{"eos_ids": (5,)}, {"stability_passes": None}, {"mean_entropy_nats": 0.05}],
    ids=lambda change: next(iter(change)),
)
def test_fault_in_the_stop_rule(change: dict[str, Any]) -> None:
    assert not same_text(replace(CONFIG, **change))
