"""Rules of the denoise loop: schedule, acceptance, pins, stopping, draws, what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import ReferenceDraws, ScriptedDraws, distance, encoded
from tiny_model import TAME, changeable, checkpoint, ours, random_tokens
from torch import Tensor

from infilld.engine.config import SamplerConfig
from infilld.engine.draws import SeededDraws
from infilld.engine.errors import ModelError
from infilld.engine.passes import CanvasPass, drive
from infilld.engine.polling import Polled
from infilld.engine.reading import Ask, Bans, Pins, Reading, read_logits
from infilld.engine.sampler import Denoised, Step, denoise, denoise_step, denoising, generate
from infilld.engine.schedule import temperature
from infilld.engine.stopping import (
    AllOf,
    AnyOf,
    History,
    LowEntropy,
    Stable,
    reference_stop,
)

V, L = 11, 6
CONFIG = SamplerConfig(max_steps=12)


class FakeModel:
    """Says what it is told, pass after pass; the last saying is repeated."""

    def __init__(self, *sayings: Tensor) -> None:
        self.sayings = list(sayings)
        self.canvases: list[Tensor] = []
        self.beliefs: list[Tensor | None] = []

    def denoise(self, canvas: Tensor, cache: Any, belief: Tensor | None) -> Tensor:
        self.canvases.append(canvas)
        self.beliefs.append(belief)
        index = min(len(self.canvases), len(self.sayings)) - 1
        return self.sayings[index]

    config = SimpleNamespace(vocab_tokens=V)
    belief_tokens = None

    def run(self, passes: Sequence[CanvasPass]) -> list[Reading]:
        return [
            read_logits(self.denoise(each.canvas, each.cache, each.belief), each.ask)
            for each in passes
        ]


def certain(tokens: Sequence[Sequence[int]], height: float = 30.0) -> Tensor:
    """Logits that leave no doubt about tokens [R, L]."""
    ids = torch.tensor(tokens)
    return torch.zeros(*ids.shape, V).scatter_(-1, ids[..., None], height)


def random_logits(seed: int, rows: int = 1, scale: float = 4.0) -> Tensor:
    return torch.randn(rows, L, V, generator=torch.Generator().manual_seed(seed)) * scale


def run(model: FakeModel, config: SamplerConfig = CONFIG, **options: Any) -> Denoised:
    rows = model.sayings[0].shape[0]
    options.setdefault("stop", reference_stop(config))
    canvas = torch.full((rows, L), 7)
    return denoise(model, None, canvas, config, SeededDraws(0), **options)  # type: ignore[arg-type]


class TestSchedule:
    def test_falls_from_t_max_towards_t_min(self) -> None:
        values = [float(temperature(step, CONFIG)) for step in range(12)]
        assert values[0] == pytest.approx(0.8)
        assert values[-1] == pytest.approx(0.4 + 0.4 / 12)
        assert values == sorted(values, reverse=True)

    def test_is_computed_in_float32(self) -> None:
        # The reference's step counter is an int32 tensor, counted down.
        for steps in (5, 12, 24, 48):
            config = replace(CONFIG, max_steps=steps)
            for step in range(steps):
                left = torch.tensor(steps - step, dtype=torch.int32)
                expected = config.t_min + (config.t_max - config.t_min) * (left / steps)
                found = temperature(step, config)
                assert found.dtype == torch.float32
                assert torch.equal(found, expected)

    def test_python_floats_would_differ(self) -> None:
        # If this ever fails the precaution is not needed any more.
        logits = random_logits(0, rows=50)
        differ = 0
        for step in range(48):
            config = replace(CONFIG, max_steps=48)
            plain = config.t_min + (config.t_max - config.t_min) * ((48 - step) / 48)
            differ += not torch.equal(logits / temperature(step, config), logits / plain)
        assert differ > 0


class TestStep:
    def step(self, logits: Tensor, **options: Any) -> Step:
        shape = logits.shape[:2]
        draws = ScriptedDraws(torch.full(shape, 3), torch.full(shape, 9))
        return denoise_step(logits, 0, CONFIG, draws, **options)

    def test_entropy_is_in_nats_of_the_scaled_logits(self) -> None:
        logits = random_logits(1)
        step = self.step(logits)
        expected = torch.distributions.Categorical(logits=logits / 0.8).entropy()
        assert distance(step.entropy_nats, expected) < 1e-5
        assert distance(self.step(torch.zeros(1, L, V)).entropy_nats, torch.tensor(V).log()) < 1e-5

    def test_argmax_is_the_result_and_the_sample_only_the_next_canvas(self) -> None:
        logits = certain([[1, 2, 4, 5, 6, 8]])
        step = self.step(logits)
        assert step.argmax.tolist() == [[1, 2, 4, 5, 6, 8]]
        assert step.canvas.tolist() == [[3] * L]
        assert step.accepted.all()

    def test_what_is_not_accepted_becomes_noise(self) -> None:
        step = self.step(torch.zeros(1, L, V))
        assert step.accepted.tolist() == [[True] + [False] * (L - 1)]
        assert step.canvas.tolist() == [[3] + [9] * (L - 1)]

    def test_equal_entropies_go_to_the_lower_position(self) -> None:
        logits = torch.zeros(1, L, V)
        logits[0, 2:4, 0] = 2.0
        assert self.step(logits).accepted[0].tolist() == [False, False, True] + [False] * 3

    def test_greedy_takes_the_argmax(self) -> None:
        step = self.step(certain([[1, 2, 4, 5, 6, 8]]), greedy=True)
        assert step.canvas.tolist() == [[1, 2, 4, 5, 6, 8]]

    def test_log_probability_is_of_the_argmax(self) -> None:
        logits = random_logits(2)
        step = self.step(logits)
        expected = (logits / 0.8).log_softmax(-1).amax(-1)
        assert distance(step.log_probability, expected) < 1e-6

    def test_belief_is_the_scaled_logits(self) -> None:
        logits = random_logits(3)
        assert torch.equal(self.step(logits).belief, logits / temperature(0, CONFIG))

    def test_minus_infinity_is_no_nan(self) -> None:
        logits = random_logits(4)
        logits[..., 5:] = -torch.inf
        step = self.step(logits)
        assert step.entropy_nats.isfinite().all()
        assert (step.argmax < 5).all()

    def test_one_hot_has_no_entropy(self) -> None:
        logits = torch.full((1, L, V), -torch.inf)
        logits[..., 4] = 0.0
        step = self.step(logits)
        assert torch.equal(step.entropy_nats, torch.zeros(1, L))
        assert step.accepted.all()


class TestRefused:
    """Logits that mean nothing are an error, never pads, never eos."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("where", ["number", "row", "all"])
    def test_not_finite(self, value: float, where: str) -> None:
        logits = random_logits(5, rows=2)
        target = {"number": logits[1, 3, 4:5], "row": logits[1, 3], "all": logits}[where]
        target.fill_(value)
        with pytest.raises(ModelError, match="step 3: the model's logits are not finite") as caught:
            denoise_step(logits, 3, CONFIG, SeededDraws(0))
        assert caught.value.remedy

    def test_everything_impossible(self) -> None:
        logits = random_logits(6)
        logits[0, 2] = -torch.inf
        with pytest.raises(ModelError, match="not finite"):
            denoise_step(logits, 0, CONFIG, SeededDraws(0))

    @pytest.mark.parametrize("pinned", [False, True])
    @pytest.mark.parametrize("greedy", [False, True])
    def test_in_any_mode(self, pinned: bool, greedy: bool) -> None:
        logits = torch.full((1, L, V), torch.nan)
        mask = torch.zeros(1, L, dtype=torch.bool)
        mask[0, 0] = True
        pins = Pins(mask=mask, tokens=torch.ones(1, L, dtype=torch.int64)) if pinned else None
        with pytest.raises(ModelError, match="not finite"):
            denoise_step(logits, 0, CONFIG, SeededDraws(0), pins=pins, greedy=greedy)

    @pytest.mark.parametrize(
        "name", ["layers.1.mlp.up_proj.weight", "norm.weight", "embed_tokens.weight"]
    )
    def test_a_damaged_model_generates_nothing(self, name: str) -> None:
        model = changeable(TAME)
        model.get_parameter(name).data.view(-1)[0] = torch.nan
        config = SamplerConfig.from_folder(checkpoint(TAME))
        with pytest.raises(ModelError, match="not finite"):
            generate(model, random_tokens(TAME, 9, 1), config, ReferenceDraws(1))


class TestPins:
    mask = torch.tensor([[True, False, False, True, False, True]])
    pins = Pins(mask=mask, tokens=torch.tensor([[8, 0, 0, 9, 0, 10]]))

    def test_are_imposed_on_everything(self) -> None:
        model = FakeModel(random_logits(7), random_logits(8), random_logits(9))
        steps: list[Step] = []
        result = run(model, replace(CONFIG, max_steps=4), pins=self.pins, on_step=steps.append)
        for canvas in (*model.canvases, *(step.argmax for step in steps), result.tokens):
            assert canvas[self.mask].tolist() == [8, 9, 10]
        for step in steps:
            assert not step.accepted[self.mask].any()
            assert torch.equal(step.entropy_nats[self.mask], torch.zeros(3))
            assert torch.equal(step.log_probability[self.mask], torch.zeros(3))
            # What the next pass believes of them is certain too.
            assert torch.equal(step.belief[self.mask].softmax(-1).amax(-1), torch.ones(3))

    def test_spend_no_budget_and_change_no_other_decision(self) -> None:
        logits = random_logits(10, scale=8)
        draws = ScriptedDraws(torch.full((1, L), 3), torch.full((1, L), 4))
        step = denoise_step(logits, 0, CONFIG, draws, pins=self.pins)
        free = ~self.mask
        alone = denoise_step(
            logits[free][None],
            0,
            CONFIG,
            ScriptedDraws(torch.full((1, 3), 3), torch.full((1, 3), 4)),
        )
        assert torch.equal(step.accepted[free], alone.accepted[0])
        assert torch.equal(step.canvas[free], alone.canvas[0])

    def test_do_not_count_when_stopping(self) -> None:
        # Half the canvas is pinned; the mean is over the rest.
        free = torch.tensor([[True, False, False, True]])
        history = History(free)
        history.observe(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[0.006, 9, 9, 0.002]]))
        assert LowEntropy(mean_nats=0.005).done(history).tolist() == [True]
        history.observe(torch.tensor([[0, 1, 2, 0]]), torch.zeros(1, 4))
        assert Stable(passes=1).done(history).tolist() == [True]

    def test_everything_pinned_is_done_at_once(self) -> None:
        pins = Pins(mask=torch.ones(1, L, dtype=torch.bool), tokens=torch.full((1, L), 2))
        result = run(FakeModel(random_logits(11)), pins=pins)
        assert result.tokens.tolist() == [[2] * L]
        assert result.passes == 2


class TestBanned:
    banned = Bans(rows=(torch.arange(V) < 9)[None], places=torch.zeros(L, dtype=torch.int64))

    def test_no_free_position_takes_them(self) -> None:
        config = replace(CONFIG, entropy_budget_nats=100.0)
        steps: list[Step] = []
        result = run(FakeModel(random_logits(12)), config, banned=self.banned, on_step=steps.append)
        assert (result.tokens >= 9).all()
        assert all((step.canvas >= 9).all() for step in steps)

    def test_a_pin_may_be_one(self) -> None:
        result = run(FakeModel(random_logits(13)), banned=self.banned, pins=TestPins.pins)
        assert result.tokens[TestPins.mask].tolist() == [8, 9, 10]


class TestStopping:
    @pytest.mark.parametrize("k", [0, 1, 2, 5])
    def test_stability_k_takes_k_plus_one_passes(self, k: int) -> None:
        result = run(FakeModel(certain([[1] * L])), replace(CONFIG, stability_passes=k))
        assert result.passes == k + 1
        assert result.converged.all()

    def test_a_change_starts_the_count_again(self) -> None:
        one, other = certain([[1] * L]), certain([[1] * (L - 1) + [2]])
        model = FakeModel(one, one, other, other, one)
        assert run(model, replace(CONFIG, stability_passes=2)).passes == 7

    def test_stable_but_unsure_goes_on(self) -> None:
        unsure = certain([[1] * L], height=3.0)
        result = run(FakeModel(unsure))
        assert result.passes == CONFIG.max_steps
        assert not result.converged.any()

    @pytest.mark.parametrize("missing", ["stability_passes", "mean_entropy_nats"])
    def test_either_bound_missing_never_stops(self, missing: str) -> None:
        config = replace(CONFIG, **{missing: None})  # type: ignore[arg-type]
        assert run(FakeModel(certain([[1] * L])), config).passes == CONFIG.max_steps

    def test_rows_are_fixed_when_they_are_done(self) -> None:
        first, second = [1] * L, [2] * L
        # Row 0 is done after two passes, then would change; row 1 settles later.
        sayings = [
            certain([first, [3] * L]),
            certain([first, [4] * L]),
            certain([[5] * L, second]),
            certain([[6] * L, second]),
        ]
        result = run(FakeModel(*sayings))
        assert result.tokens.tolist() == [first, second]
        assert result.passes == 4
        assert result.converged.tolist() == [True, True]

    def test_rules_combine(self) -> None:
        class Says:
            def __init__(self, *rows: bool) -> None:
                self.rows = rows

            def done(self, history: History) -> Tensor:
                return torch.tensor(self.rows)

        history = History(torch.ones(2, L, dtype=torch.bool))
        assert AllOf((Says(True, True), Says(True, False))).done(history).tolist() == [True, False]
        assert AllOf(()).done(history).tolist() == [False, False]

    def test_a_late_canvas_is_not_a_converged_one(self) -> None:
        late = run(FakeModel(random_logits(14)), is_late=lambda: True)
        assert late.passes == 1
        assert not late.converged.any()
        in_time = run(FakeModel(random_logits(14)), is_late=lambda: False)
        assert in_time.passes == CONFIG.max_steps

    def test_negative_count_is_refused(self) -> None:
        with pytest.raises(ValueError, match="passes=-1"):
            Stable(passes=-1)

    def test_what_on_step_raises_ends_the_loop(self) -> None:
        model = FakeModel(random_logits(15))

        def leave(step: Step) -> None:
            if step.index == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(model, on_step=leave)
        assert len(model.canvases) == 3


class TestLoop:
    def test_belief_starts_empty_and_is_carried(self) -> None:
        model = FakeModel(random_logits(16), random_logits(17), random_logits(18))
        steps: list[Step] = []
        run(model, replace(CONFIG, max_steps=3), on_step=steps.append)
        assert model.beliefs[0] is None
        for belief, step in zip(model.beliefs[1:], steps, strict=False):
            assert belief is not None
            assert torch.equal(belief, step.belief)
        for canvas, step in zip(model.canvases[1:], steps, strict=False):
            assert torch.equal(canvas, step.canvas)

    def test_nothing_is_frozen(self) -> None:
        # Accepted in the first step, uncertain in the second: noise again.
        sayings = [certain([[1] * L]), torch.zeros(1, L, V)]
        steps: list[Step] = []
        run(FakeModel(*sayings), replace(CONFIG, max_steps=2), on_step=steps.append)
        assert steps[0].accepted.all()
        assert int(steps[1].accepted.sum()) == 1

    def test_same_seed_same_canvas(self) -> None:
        model = ours(TAME)
        cache = encoded(model, random_tokens(TAME, 12, 3))
        config = SamplerConfig(max_steps=6)

        def once(seed: int) -> Tensor:
            draws = SeededDraws(seed)
            canvas = draws.first_canvas(2, 16, TAME.vocab_tokens)
            return denoise(model, cache, canvas, config, draws, stop=AllOf(())).tokens

        assert torch.equal(once(4), once(4))
        assert not torch.equal(once(4), once(5))


class TestSeededDraws:
    def test_do_not_touch_the_global_generator(self) -> None:
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        draws = SeededDraws(9)
        draws.first_canvas(2, 3, V)
        draws.sample(torch.full((1, 2, V), 1 / V))
        assert torch.equal(torch.rand(3), expected)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.sampled_from([0.0, 1e-30, 1e-6, 0.3, 1.0]), min_size=2, max_size=30))
    def test_never_pick_what_has_no_weight(self, weights: list[float]) -> None:
        if not any(weights):
            weights[-1] = 1.0
        row = torch.tensor(weights)
        picked = SeededDraws(3).sample((row / row.sum()).expand(1, 64, -1))
        assert (row[picked] > 0).all()

    def test_follow_the_distribution(self) -> None:
        weights = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
        picked = SeededDraws(5).sample(weights.expand(1, 40_000, -1))
        found = torch.bincount(picked.flatten(), minlength=5) / 40_000
        assert distance(found, weights) < 0.01

    def test_large_vocabulary_keeps_its_tail(self) -> None:
        flat = torch.full((1, 64, 262_144), 1 / 262_144)
        picked = SeededDraws(6).sample(flat)
        assert (picked > 262_144 // 2).any()
        assert (picked < 262_144).all()

    def test_noise_covers_the_vocabulary(self) -> None:
        noise = SeededDraws(7).noise(4, 100, V)
        assert noise.shape == (4, 100)
        assert noise.dtype == torch.int64
        assert set(noise.flatten().tolist()) == set(range(V))


@pytest.mark.parametrize("draw", [SeededDraws.first_canvas, SeededDraws.noise])
def test_shapes_of_draws(draw: Callable[..., Tensor]) -> None:
    assert draw(SeededDraws(0), 2, 5, V).shape == (2, 5)


class TestEndOfText:
    def end(self, *tokens: int, eos: tuple[int, ...] = (1, 5), pad: int | None = 0) -> Any:
        from infilld.engine.sampler import _end_text

        ended, done = _end_text(torch.tensor(tokens), replace(CONFIG, eos_ids=eos, pad_id=pad))
        return ended.tolist(), done

    def test_first_of_any_eos_stands_and_the_rest_is_pad(self) -> None:
        assert self.end(7, 5, 8, 1, 9) == ([7, 5, 0, 0, 0], True)
        assert self.end(7, 8, 9, 3, 1) == ([7, 8, 9, 3, 1], True)

    def test_no_eos_no_end(self) -> None:
        assert self.end(7, 0, 8) == ([7, 0, 8], False)
        assert self.end(7, 1, 8, eos=()) == ([7, 1, 8], False)

    def test_without_pad_nothing_is_replaced(self) -> None:
        assert self.end(7, 1, 8, pad=None) == ([7, 1, 8], True)


class TestOneStepLate:
    """Where a GPU is a step ahead of what the host has seen, nothing but that step is different."""

    @pytest.fixture
    def late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("infilld.engine.sampler.Polled", partial(Polled, lag=1))

    def runs(self, *sayings: Tensor, **options: Any) -> tuple[Denoised, list[Step], int]:
        model, steps = FakeModel(*sayings), list[Step]()
        done = run(model, on_step=steps.append, **options)
        return done, steps, len(model.canvases)

    def test_a_stop_is_seen_one_pass_late_and_changes_no_result(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sayings = (random_logits(1), certain([[1] * L]), certain([[1] * L]), certain([[2] * L]))
        at_once, _, passes = self.runs(*sayings)
        monkeypatch.setattr("infilld.engine.sampler.Polled", partial(Polled, lag=1))
        late, steps, late_passes = self.runs(*sayings)
        assert torch.equal(late.tokens, at_once.tokens)
        assert torch.equal(late.log_probability, at_once.log_probability)
        assert late.passes == at_once.passes == passes == 3
        assert late_passes == passes + 1
        assert [step.index for step in steps] == [0, 1, 2]

    @pytest.mark.usefixtures("late")
    def test_every_step_is_seen_where_no_stop_holds(self) -> None:
        config = replace(CONFIG, max_steps=4)
        _, steps, passes = self.runs(random_logits(2), config=config, stop=AllOf(()))
        assert [step.index for step in steps] == [0, 1, 2, 3]
        assert passes == 4

    @pytest.mark.usefixtures("late")
    def test_a_deadline_after_the_first_pass_shows_it(self) -> None:
        done, steps, passes = self.runs(random_logits(4), is_late=lambda: True)
        assert done.passes == passes == 1
        assert [step.index for step in steps] == [0]

    @pytest.mark.usefixtures("late")
    def test_a_damaged_model_is_refused(self) -> None:
        with pytest.raises(ModelError, match="step 0"):
            self.runs(random_logits(3).fill_(torch.nan))


class TestDrafts:
    def test_a_draft_that_is_left_as_it_is_takes_one_pass(self) -> None:
        stop = AllOf((Stable(passes=1), LowEntropy(mean_nats=0.05)))
        model = FakeModel(certain([[7] * L]))
        work = denoising(
            None,  # type: ignore[arg-type]
            torch.full((1, L), 7),
            CONFIG,
            SeededDraws(0),
            vocab_tokens=V,
            stop=stop,
            is_draft=True,
        )
        assert drive(model, work).passes == 1  # type: ignore[arg-type]
        assert run(FakeModel(certain([[7] * L])), stop=stop).passes == 2

    def test_the_first_pass_is_told_the_belief_it_is_given(self) -> None:
        belief = random_logits(3)
        model = FakeModel(certain([[1] * L]))
        canvas = torch.full((1, L), 7)
        work = denoising(
            None,  # type: ignore[arg-type]
            canvas,
            CONFIG,
            SeededDraws(0),
            vocab_tokens=V,
            stop=AllOf(()),
            belief=belief,
        )
        drive(model, work)  # type: ignore[arg-type]
        assert model.beliefs[0] is belief

    def test_a_first_pass_that_is_there_already_is_not_repeated(self) -> None:
        model = FakeModel(certain([[1] * L]))
        work = denoising(
            None,  # type: ignore[arg-type]
            torch.full((1, L), 7),
            replace(CONFIG, max_steps=3),
            SeededDraws(0),
            vocab_tokens=V,
            stop=AllOf(()),
            reading=read_logits(certain([[2] * L]), Ask(temperature=temperature(0, CONFIG))),
        )
        assert drive(model, work).passes == 3  # type: ignore[arg-type]
        assert len(model.canvases) == 2

    def test_any_of_needs_one_rule(self) -> None:
        sure = AnyOf((Stable(passes=1), LowEntropy(mean_nats=0.05)))
        assert run(FakeModel(certain([[1] * L])), stop=sure).passes == 1
        assert run(FakeModel(certain([[1] * L], height=3.0)), stop=sure).passes == 2
        assert run(FakeModel(certain([[1] * L])), stop=AnyOf(())).passes == CONFIG.max_steps

    def test_what_is_held_stays_while_the_model_agrees(self) -> None:
        # Unsure of everything, the sampler accepts one position and re-noises the others.
        unsure = certain([[7] * (L - 1) + [3]], height=1.0)
        model = FakeModel(unsure)
        held = torch.tensor([[True] * (L - 2) + [False, True]])
        work = denoising(
            None,  # type: ignore[arg-type]
            torch.full((1, L), 7),
            replace(CONFIG, max_steps=4),
            SeededDraws(0),
            vocab_tokens=V,
            stop=AllOf(()),
            held=held,
        )
        drive(model, work)  # type: ignore[arg-type]
        for canvas in model.canvases[1:]:
            assert canvas[0, : L - 2].tolist() == [7] * (L - 2)
        # Neither what was not held, nor what the model contradicts.
        assert any(canvas[0, L - 2] != 7 for canvas in model.canvases[1:])
        assert any(canvas[0, L - 1] != 7 for canvas in model.canvases[1:])
