"""Steps and whole runs: the same decisions as `generate`, fed the same random numbers."""

import functools
from dataclasses import replace

import pytest
import torch
from parity import (
    LOGIT_CEILING,
    SUM_SLACK_NATS,
    RecordedStep,
    Recording,
    ReferenceDraws,
    ScriptedDraws,
    distance,
    encoded,
    record,
    reference_generate,
    undecided,
)
from tiny_model import (
    ALL_TWO,
    CHECKPOINTS,
    DEEP,
    EOS_IDS,
    ROUTED,
    TAME,
    WIDE_HEADS,
    WILD,
    Spec,
    checkpoint,
    exact_reference,
    ours,
    random_tokens,
    reference,
)
from torch import Tensor

from infilld.engine.config import SamplerConfig
from infilld.engine.sampler import Step, denoise_step, generate

CONFIG = SamplerConfig.from_folder(checkpoint(TAME))
# Wild ones never stop early; a few steps of two canvases show every kind of step.
SHORT = {"max_denoising_steps": 6, "max_new_tokens": 32}
RECORDED = {
    "tame": (TAME, 20, 0, {}),
    "tame-short-prefix": (TAME, 5, 5, {}),
    "wild": (WILD, 20, 0, SHORT),
    "key-heads-2-1": (WIDE_HEADS, 7, 1, SHORT),
    "key-heads-2-2": (ALL_TWO, 8, 2, SHORT),
    "deep": (DEEP, 33, 3, SHORT),
    "routed": (ROUTED, 9, 5, SHORT),
}

by_recording = pytest.mark.parametrize("name", RECORDED)


@functools.cache
def recording(name: str) -> tuple[Spec, SamplerConfig, Recording]:
    spec, prefix, seed, options = RECORDED[name]
    config = replace(CONFIG, max_steps=options.get("max_denoising_steps", CONFIG.max_steps))
    run = record(reference(spec), random_tokens(spec, prefix, seed), seed, **options)
    return spec, config, run


def replayed(step: RecordedStep, logits: Tensor, config: SamplerConfig) -> Step:
    return denoise_step(logits, step.index, config, ScriptedDraws(step.sample, step.noise))


@by_recording
def test_step_decides_alike_on_the_same_logits(name: str) -> None:
    _, config, run = recording(name)
    doubtful = 0
    for recorded in run.steps:
        step = replayed(recorded, recorded.logits, config)
        assert torch.equal(step.belief, recorded.scaled), "the temperature differs by an ulp"
        assert torch.equal(step.argmax, recorded.argmax)
        unsure = undecided(step.entropy_nats, config)
        doubtful += int(unsure.sum())
        assert torch.equal(step.accepted | unsure, recorded.accepted | unsure)
        same = step.accepted == recorded.accepted
        assert torch.equal(step.canvas[same], recorded.next_canvas[same])
    assert doubtful <= 0.02 * sum(step.canvas.numel() for step in run.steps)


@by_recording
def test_pass_and_step_agree_from_the_recorded_inputs(name: str) -> None:
    spec, config, run = recording(name)
    prefix, cache = run.steps[0].prefix, encoded(ours(spec), run.steps[0].prefix)
    worst, doubtful, decided = 0.0, 0, 0
    for recorded in run.steps:
        if len(recorded.prefix) != len(prefix):
            # The canvas before was committed: our prefix cache grows by it, as the reference's.
            ours(spec).encode(recorded.prefix[len(prefix) :], cache)
            prefix = recorded.prefix
        logits = ours(spec).denoise(recorded.canvas, cache, recorded.belief)
        worst = max(worst, distance(logits, recorded.logits))
        step = replayed(recorded, logits, config)
        exact = replayed(recorded, recorded.logits, config)
        moved = float((step.entropy_nats - exact.entropy_nats).abs().sum())
        unsure = undecided(exact.entropy_nats, config, moved + SUM_SLACK_NATS)
        assert torch.equal(step.accepted | unsure, recorded.accepted | unsure)
        top = recorded.scaled.topk(2, dim=-1).values
        clear = top[..., 0] - top[..., 1] > 10 * LOGIT_CEILING
        assert torch.equal(step.argmax[clear], recorded.argmax[clear])
        doubtful += int(unsure.sum()) + int((~clear).sum())
        decided += clear.numel()
    assert worst < LOGIT_CEILING
    assert doubtful <= 0.05 * decided


@by_recording
def test_the_recording_is_of_a_real_run(name: str) -> None:
    spec, config, run = recording(name)
    assert run.steps[0].belief is None
    assert all(step.belief is not None for step in run.steps if step.index)
    assert len(run.passes) > 1, "one canvas commits nothing"
    assert all(len(step.prefix) >= RECORDED[name][1] for step in run.steps)
    shares = [float(step.accepted.float().mean()) for step in run.steps]
    assert min(shares) < 1, "everything accepted in every step"
    if spec.tame:
        assert min(run.passes) < config.max_steps, "nothing stops early"


def our_generate(prompt: Tensor, seed: int, config: SamplerConfig = CONFIG) -> Tensor:
    return generate(ours(TAME), prompt, config, ReferenceDraws(seed))


# (prefix, seed): chosen so that texts end in the first, a middle and the last canvas or never,
# canvases stop after 5 to 24 passes, and prefixes lie below, at and above the window.
RUNS = [(5, 4), (20, 5), (33, 1), (5, 0), (7, 2), (5, 16), (33, 7)]


@functools.cache
def reference_run(prefix: int, seed: int) -> Recording:
    return record(reference(TAME), random_tokens(TAME, prefix, seed), seed)


@pytest.mark.slow
@pytest.mark.parametrize(("prefix", "seed"), RUNS)
def test_generate_gives_the_same_tokens(prefix: int, seed: int) -> None:
    expected = reference_run(prefix, seed).tokens
    assert torch.equal(our_generate(random_tokens(TAME, prefix, seed), seed), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_generate_gives_the_same_tokens_in_float64(name: str) -> None:
    # Wild checkpoints too: there are no rounding differences left for them to amplify.
    spec = CHECKPOINTS[name]
    options = {"max_denoising_steps": 10, "max_new_tokens": 32}
    config = replace(CONFIG, max_steps=10, max_new_tokens=32)
    for seed in range(2):
        prompt = random_tokens(spec, 6 + 14 * seed, seed)
        expected = reference_generate(exact_reference(spec), prompt, seed, **options)
        found = generate(ours(spec, torch.float64), prompt, config, ReferenceDraws(seed))
        assert torch.equal(found, expected)


@pytest.mark.slow
def test_the_runs_are_worth_the_test() -> None:
    runs = [reference_run(*run) for run in RUNS]
    canvases = {len(run.passes) for run in runs}
    ended = {bool(torch.isin(run.tokens, torch.tensor(EOS_IDS)).any()) for run in runs}
    passes = [count for run in runs for count in run.passes]
    assert 1 in canvases
    assert 4 in canvases
    assert ended == {True, False}
    assert min(passes) < 8
    assert max(passes) == CONFIG.max_steps
    assert len(set(passes)) > 8


@pytest.mark.slow
def test_any_of_several_eos_ends_the_text() -> None:
    prompt = random_tokens(TAME, 7, 2)
    open_ended = reference_run(7, 2)
    assert len(open_ended.passes) == 4
    second = open_ended.tokens[16:32].tolist()
    # Two ids of the second canvas: whichever comes first stands, the other becomes pad.
    ids = [second[9], 3, second[4]]
    expected = reference_generate(reference(TAME), prompt, 2, eos_token_id=ids)
    assert len(expected) == 32
    assert expected[-1] == 0
    found = our_generate(prompt, 2, replace(CONFIG, eos_ids=tuple(ids)))
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"confidence_threshold": None, "stability_threshold": None}, {"mean_entropy_nats": None}),
        ({"stability_threshold": 0}, {"stability_passes": 0}),
        ({"stability_threshold": 3}, {"stability_passes": 3}),
        ({"max_denoising_steps": 9}, {"max_steps": 9}),
        ({"t_min": 0.2, "t_max": 1.3}, {"t_min": 0.2, "t_max": 1.3}),
        ({"max_new_tokens": 17}, {"max_new_tokens": 17}),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))),
)
def test_options_mean_the_same(
    options: dict[str, float | None], changes: dict[str, float | None]
) -> None:
    options = {"max_new_tokens": 32} | options
    changes = {"max_new_tokens": 32} | changes
    prompt = random_tokens(TAME, 20, 6)
    expected = record(reference(TAME), prompt, 6, **options)
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    assert torch.equal(our_generate(prompt, 6, config), expected.tokens)
    if changes.get("mean_entropy_nats", 1) is None:
        assert set(expected.passes) == {config.max_steps}


@pytest.mark.slow
def test_a_warm_cache_changes_nothing() -> None:
    prompt = random_tokens(TAME, 33, 1)
    cache = encoded(ours(TAME), torch.cat((prompt[:20], random_tokens(TAME, 9, 8))), margin=12)
    found = generate(ours(TAME), prompt, CONFIG, ReferenceDraws(1), cache=cache)
    assert torch.equal(found, reference_run(33, 1).tokens)


@pytest.mark.slow
def test_the_last_canvas_is_not_encoded() -> None:
    prompt = random_tokens(TAME, 20, 6)
    cache = ours(TAME).new_cache()
    config = replace(CONFIG, max_new_tokens=32, eos_ids=())
    tokens = generate(ours(TAME), prompt, config, ReferenceDraws(6), cache=cache)
    assert len(tokens) == 32
    assert cache.tokens == 36
