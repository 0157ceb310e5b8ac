"""What runs the model gives what its definition gives, also in a GPU's buckets and slots."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_model import FULL, SLIDING, Spec, ours
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import SamplerConfig
from infilld.engine.device_runner import DeviceRunner
from infilld.engine.draws import SeededDraws
from infilld.engine.errors import ContextTooLong, NotEnoughMemory
from infilld.engine.memory import KeyValues, WeightBytes, plan_memory
from infilld.engine.model import DiffusionGemma
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Ask, Bans, Belief, Pins, Reading
from infilld.engine.runner import Runner
from infilld.engine.sampler import denoise
from infilld.engine.stopping import reference_stop

SMALL = Spec()
# Two key heads, many experts, a vocabulary that fills no block, and layers in another order.
ODD = Spec(
    layers=(SLIDING, FULL, SLIDING, SLIDING, FULL),
    sliding_key_heads=2,
    experts=16,
    experts_per_token=4,
    vocab_tokens=300,
)
SPECS = pytest.mark.parametrize("spec", [SMALL, ODD], ids=["small", "odd"])
MARGIN = 4
# A wild checkpoint's values reach hundreds; float32 rounds them differently in another order.
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


def device_runner(model: DiffusionGemma, **options: Any) -> DeviceRunner:
    """What runs on a GPU, without one: every bucket and slot, the operations' references."""
    options = {
        "slots": 3,
        "context_tokens": 64,
        "margin_tokens": MARGIN,
        "belief_tokens": model.config.vocab_tokens,
        **options,
    }
    return DeviceRunner(
        model.config,
        dict(model.state_dict()),
        device=torch.device("cpu"),
        dtype=model.dtype,
        impl="reference",
        **options,
    )


def runners(spec: Spec) -> list[DiffusionGemma | Runner]:
    """The definition first."""
    model = ours(spec)
    return [
        model,
        Runner.of(model, belief_tokens=model.config.vocab_tokens),
        Runner.of(model, impl="cpu", belief_tokens=model.config.vocab_tokens),
        device_runner(model),
    ]


def random_ids(spec: Spec, *shape: int, seed: int) -> Tensor:
    return torch.randint(spec.vocab_tokens, shape, generator=torch.Generator().manual_seed(seed))


def same(first: Reading, other: Reading) -> None:
    """Equal decisions, close numbers."""
    assert torch.equal(first.argmax, other.argmax)
    assert torch.equal(first.proposal, other.proposal)
    for name in ("log_probability", "entropy_nats"):
        torch.testing.assert_close(getattr(first, name), getattr(other, name), **CLOSE)
    assert isinstance(first.belief, Belief)
    assert isinstance(other.belief, Belief)
    torch.testing.assert_close(first.belief.probabilities, other.belief.probabilities, **CLOSE)
    assert (first.weighed is None) == (other.weighed is None)
    if first.weighed is not None:
        torch.testing.assert_close(first.weighed, other.weighed, **CLOSE)


@SPECS
@pytest.mark.parametrize("prefix", [1, 7, 9, 21])
def test_prompts_are_read_alike(spec: Spec, prefix: int) -> None:
    first, more = random_ids(spec, prefix, seed=1), random_ids(spec, 3, seed=2)
    rows = [random_ids(spec, n, seed=n) for n in (1, 4, 2)]
    found = []
    for model in runners(spec):
        cache = model.new_cache(MARGIN)
        states = [model.encode(first, cache), model.encode(more, cache)]
        states += model.read(rows, cache)
        # Reading extends nothing, and a prefix that was cut back goes on as if nothing had been.
        assert cache.tokens == prefix + 3
        assert cache.trim(prefix) == prefix
        found.append([*states, model.encode(more, cache)])
    for other in found[1:]:
        for ours_, theirs in zip(found[0], other, strict=True):
            torch.testing.assert_close(theirs, ours_, **CLOSE)
    torch.testing.assert_close(found[1][1], found[1][-1], **CLOSE)


@SPECS
@pytest.mark.parametrize("prefix", [1, 8, 20])
def test_canvases_are_read_alike(spec: Spec, prefix: int) -> None:
    """Two canvases of two prefixes, told a belief, with pins and bans, three passes long."""
    models = runners(spec)
    caches = []
    for model in models:
        pair = [model.new_cache(MARGIN), model.new_cache(MARGIN)]
        model.encode(random_ids(spec, prefix, seed=3), pair[0])
        model.encode(random_ids(spec, 5, seed=4), pair[1])
        caches.append(pair)
    draw = torch.Generator().manual_seed(5)
    canvas, short = random_ids(spec, 2, 11, seed=6), random_ids(spec, 1, 4, seed=7)
    pins = Pins(
        mask=torch.rand(2, 11, generator=draw) < 0.4, tokens=random_ids(spec, 2, 11, seed=8)
    )
    bans = Bans(
        rows=torch.rand(3, spec.vocab_tokens, generator=draw) < 0.3,
        places=torch.randint(3, (11,), generator=draw),
    )
    ask = Ask(temperature=torch.tensor(0.7), pins=pins, banned=bans, top=spec.vocab_tokens)
    asks = [
        replace(ask, pins=None),
        replace(ask, weighed=random_ids(spec, 2, 11, seed=9)),
        replace(ask, banned=None, temperature=torch.tensor(0.45)),
    ]
    beside = Ask(temperature=torch.tensor(1.0), top=spec.vocab_tokens)
    belief = None
    for each in asks:
        readings = [
            model.run(
                [CanvasPass(canvas, first, belief, each), CanvasPass(short, second, None, beside)]
            )
            for model, (first, second) in zip(models, caches, strict=True)
        ]
        for other in readings[1:]:
            same(readings[0][0], other[0])
            same(readings[0][1], other[1])
        # The test can fail: another pass's reading is another.
        assert not torch.equal(readings[0][0].argmax[:1, :4], readings[0][1].argmax)
        belief = readings[0][0].belief
        canvas = torch.where(pins.mask, canvas, readings[0][0].argmax)


@SPECS
def test_texts_are_weighed_alike(spec: Spec) -> None:
    tokens = random_ids(spec, 6, seed=1)
    banned = torch.rand(spec.vocab_tokens, generator=torch.Generator().manual_seed(2)) < 0.5
    logs, best = [], []
    for model in runners(spec):
        hidden = model.encode(random_ids(spec, 6, seed=3), model.new_cache())
        logs.append(model.log_probabilities(hidden, tokens))
        best.append(model.best(hidden, banned))
    for other in logs[1:]:
        torch.testing.assert_close(other, logs[0], **CLOSE)
    assert torch.equal(best[1], best[0])
    assert torch.equal(best[2], best[0])
    assert not banned[best[0]].any()


@SPECS
def test_a_whole_canvas_ends_alike(spec: Spec) -> None:
    tame = replace(spec, tame=True)
    config = SamplerConfig(max_steps=8)
    found = []
    for model in runners(tame):
        cache = model.new_cache()
        model.encode(random_ids(tame, 12, seed=1), cache)
        canvas = random_ids(tame, 2, 9, seed=2)
        draws = SeededDraws(3)
        stop = reference_stop(config)
        found.append(denoise(model, cache, canvas, config, draws, stop=stop, greedy=True))
    for other in found[1:]:
        assert torch.equal(other.tokens, found[0].tokens)
        assert other.passes == found[0].passes
        assert torch.equal(other.converged, found[0].converged)


def test_few_tokens_of_a_belief_and_the_rest_spread_evenly() -> None:
    model = ours(SMALL)
    runner = Runner.of(model, belief_tokens=3)
    cache = runner.new_cache()
    runner.encode(random_ids(SMALL, 5, seed=1), cache)
    ask = Ask(temperature=torch.tensor(0.8), top=runner.belief_tokens)
    canvas = random_ids(SMALL, 1, 6, seed=2)
    (reading,) = runner.run([CanvasPass(canvas, cache, None, ask)])
    assert isinstance(reading.belief, Belief)
    assert reading.belief.ids.shape == (1, 6, 3)
    told = model.denoise(canvas, cache, reading.belief)
    (next_,) = runner.run([CanvasPass(canvas, cache, reading.belief, ask)])
    scaled = (told / 0.8).log_softmax(-1)
    torch.testing.assert_close(next_.log_probability, scaled.amax(-1), **CLOSE)
    # It is another belief than all logits.
    untold = model.denoise(canvas, cache, None)
    assert (told - untold).abs().max() > 1e-3


@pytest.mark.parametrize("make", [Runner.of, device_runner], ids=["cpu", "gpu"])
def test_logits_are_no_belief(make: Any) -> None:
    runner = make(ours(SMALL))
    cache = runner.new_cache()
    runner.encode(random_ids(SMALL, 5, seed=1), cache)
    canvas, logits = random_ids(SMALL, 1, 4, seed=2), torch.zeros(1, 4, SMALL.vocab_tokens)
    with pytest.raises(TypeError, match="told a Belief, not logits"):
        runner.run([CanvasPass(canvas, cache, logits, ask_plainly(runner))])


def filled(runner: DeviceRunner, tokens: int, seed: int) -> PrefixCache:
    cache = runner.new_cache()
    runner.encode(random_ids(SMALL, tokens, seed=seed), cache)
    return cache


def ask_plainly(runner: Runner) -> Ask:
    return Ask(temperature=torch.tensor(1.0), top=runner.belief_tokens)


class TestSlots:
    """A GPU's prefixes are in memory that does not move."""

    def test_a_slot_is_free_when_nobody_refers_to_it(self) -> None:
        runner = device_runner(ours(SMALL), slots=2)
        caches = [filled(runner, 3, 1), filled(runner, 4, 2)]
        with pytest.raises(NotEnoughMemory, match="all 2 prefix caches"):
            runner.new_cache()
        del caches[0]
        assert filled(runner, 5, 3).tokens == 5

    def test_what_another_left_in_a_slot_is_never_read(self) -> None:
        model = ours(SMALL)
        clean, dirty = device_runner(model, slots=1), device_runner(model, slots=1)
        for stored in (*dirty.slab.keys, *dirty.slab.values):
            stored.fill_(torch.nan)
        canvas = random_ids(SMALL, 1, 7, seed=4)
        readings = []
        for runner in (clean, dirty):
            cache = filled(runner, 11, 3)
            runner.read([random_ids(SMALL, 2, seed=5)], cache)
            readings += runner.run([CanvasPass(canvas, cache, None, ask_plainly(runner))])
        same(readings[0], readings[1])
        assert readings[1].entropy_nats.isfinite().all()

    def test_a_full_slot_says_so_and_loses_nothing(self) -> None:
        runner = device_runner(ours(SMALL), context_tokens=16)
        cache = filled(runner, 16, 1)
        before = cache.ids
        with pytest.raises(ContextTooLong, match="do not fit"):
            runner.encode(random_ids(SMALL, 1, seed=3), cache)
        cache.check()
        assert cache.ids == before
        canvas = CanvasPass(random_ids(SMALL, 1, 4, seed=4), cache, None, ask_plainly(runner))
        assert runner.run([canvas])[0].entropy_nats.isfinite().all()

    def test_a_piece_that_does_not_fit_leaves_layers_of_a_kind_alike(self) -> None:
        """Sliding layers before a full one must not have moved where those behind it have not."""
        model = ours(ODD)
        runner, plain = device_runner(model, context_tokens=700), model.new_cache(MARGIN)
        cache = runner.new_cache()
        prompt = random_ids(ODD, 695, seed=1)
        for piece in torch.split(prompt, 500):
            runner.encode(piece, cache)
            model.encode(piece, plain)
        with pytest.raises(ContextTooLong, match="do not fit"):
            runner.encode(random_ids(ODD, 400, seed=3), cache)
        more = random_ids(ODD, 5, seed=4)
        torch.testing.assert_close(runner.encode(more, cache), model.encode(more, plain), **CLOSE)

    def test_windows_move_within_a_slot(self) -> None:
        """A prompt many windows long, piece by piece, is what it is in memory that grows."""
        model = ours(SMALL)
        runner = device_runner(model, slots=1, context_tokens=4096)
        cache, plain = runner.new_cache(), model.new_cache(MARGIN)
        for seed in range(4):
            piece = random_ids(SMALL, 500, seed=seed)
            torch.testing.assert_close(
                runner.encode(piece, cache), model.encode(piece, plain), **CLOSE
            )
        cache.check()

    @pytest.mark.parametrize("context", [64, 3000])
    @pytest.mark.parametrize("held", ["bf16", "fp8"])
    def test_it_takes_what_was_planned(self, context: int, held: KeyValues) -> None:
        model = ours(SMALL)
        config = replace(model.config, max_positions=4096)
        weights = WeightBytes.estimate(config, torch.bfloat16, None)
        plan = plan_memory(
            config, weights, on_gpu=True, context_tokens=context, key_values=held, slots=3
        )
        dtypes = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
        runner = device_runner(
            model, context_tokens=context, margin_tokens=512, cache_dtype=dtypes[held]
        )
        assert runner.slab.nbytes == plan.key_value_bytes

    def test_a_prefix_in_fp8_is_near_what_it_is_in_full(self) -> None:
        model = ours(replace(SMALL, tame=True))
        exact, rounded = (
            device_runner(model, cache_dtype=dtype) for dtype in (None, torch.float8_e4m3fn)
        )
        canvas, readings = random_ids(SMALL, 1, 7, seed=4), []
        for runner in (exact, rounded):
            cache = filled(runner, 11, 3)
            readings += runner.run([CanvasPass(canvas, cache, None, ask_plainly(runner))])
        apart = (readings[0].entropy_nats - readings[1].entropy_nats).abs().max()
        assert 0 < apart < 0.1

    def test_a_slot_is_free_when_its_cache_is_closed(self) -> None:
        """An exception's traceback may hold on to a cache for long."""
        runner = device_runner(ours(SMALL), slots=1)
        cache = filled(runner, 3, 1)
        cache.close()
        cache.close()
        other = filled(runner, 4, 2)
        assert other.tokens == 4
        with pytest.raises(NotEnoughMemory):
            runner.new_cache()


class TestBuckets:
    """Padding changes nothing."""

    @pytest.mark.parametrize("rows", [1, 2, 5, 7])
    @pytest.mark.parametrize("length", [1, 3, 15, 16])
    def test_any_shape_gives_what_it_gives_alone(self, rows: int, length: int) -> None:
        model = ours(ODD)
        runner = device_runner(model)
        caches = [model.new_cache(MARGIN), runner.new_cache()]
        for each, cache in zip((model, runner), caches, strict=True):
            each.encode(random_ids(ODD, 6, seed=1), cache)
        canvas = random_ids(ODD, rows, length, seed=2)
        ask = ask_plainly(runner)
        (expected,) = model.run([CanvasPass(canvas, caches[0], None, ask)])
        (found,) = runner.run([CanvasPass(canvas, caches[1], None, ask)])
        same(expected, found)

    def test_more_rows_than_a_bucket_has_are_run_in_parts(self) -> None:
        model = ours(SMALL)
        runner = device_runner(model)
        cache = filled(runner, 6, 1)
        plain = model.new_cache()
        model.encode(random_ids(SMALL, 6, seed=1), plain)
        canvases = [random_ids(SMALL, 3, 4, seed=seed) for seed in range(5)]
        ask = ask_plainly(runner)
        found = runner.run([CanvasPass(each, cache, None, ask) for each in canvases])
        expected = model.run([CanvasPass(each, plain, None, ask) for each in canvases])
        for one, other in zip(expected, found, strict=True):
            same(one, other)

    def test_padding_asks_for_no_experts_of_its_own(self) -> None:
        runner = device_runner(ours(ODD))
        cache = runner.new_cache()
        runner.encode(random_ids(ODD, 6, seed=1), cache)
        canvas = CanvasPass(random_ids(ODD, 1, 1, seed=2), cache, None, ask_plainly(runner))
        assert runner.experts_touched(canvas) == [4] * 5
        touched: list[int] = []
        inputs = runner._canvas_inputs(2, 16, 1)
        runner._place(inputs, [canvas])
        runner._fill(inputs, [canvas])
        runner._canvas_hidden(
            inputs, on_routes=lambda layer, routes: touched.append(len(routes.ids.unique()))
        )
        assert touched == [4] * 5

    def test_a_bucket_is_made_once(self) -> None:
        runner = device_runner(ours(SMALL))
        cache = filled(runner, 6, 1)
        for length in (3, 5, 9):
            canvas = random_ids(SMALL, 1, length, seed=length)
            runner.run([CanvasPass(canvas, cache, None, ask_plainly(runner))])
        assert sorted(key[0] for key in runner._captured) == ["canvas", "tokens"]

    def test_a_canvas_longer_than_all_buckets_is_read_too(self) -> None:
        model = ours(replace(SMALL, canvas_tokens=16))
        runner, plain = device_runner(model), model.new_cache()
        cache = filled(runner, 6, 1)
        model.encode(random_ids(SMALL, 6, seed=1), plain)
        canvas = random_ids(SMALL, 1, 17, seed=2)
        ask = ask_plainly(runner)
        (expected,) = model.run([CanvasPass(canvas, plain, None, ask)])
        (found,) = runner.run([CanvasPass(canvas, cache, None, ask)])
        same(expected, found)
        assert all(key[0] == "tokens" for key in runner._captured)

    def test_the_head_weighs_tokens_only_where_they_are_asked(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Beside bans that would read the whole embedding twice."""
        runner = device_runner(ours(SMALL))
        cache = filled(runner, 6, 1)
        asked: list[bool] = []
        read = runner.stack.read_head

        def spied(hidden: Tensor, **what: Any) -> Any:
            asked.append(what["targets"] is not None)
            return read(hidden, **what)

        monkeypatch.setattr(runner.stack, "read_head", spied)
        canvas = random_ids(SMALL, 1, 8, seed=2)
        for weighed in (None, canvas, None):
            ask = replace(ask_plainly(runner), weighed=weighed)
            (reading,) = runner.run([CanvasPass(canvas, cache, None, ask)])
            assert (reading.weighed is None) == (weighed is None)
        assert asked == [False, True, False]

    def test_readings_outlive_the_next_pass(self) -> None:
        """A replay writes where the last one wrote; who has a reading keeps it."""
        runner = device_runner(ours(SMALL))
        cache = filled(runner, 6, 1)
        readings = [
            runner.run([CanvasPass(random_ids(SMALL, 1, 8, seed=s), cache, None, ask)])[0]
            for s, ask in enumerate([ask_plainly(runner)] * 2)
        ]
        (again,) = runner.run(
            [CanvasPass(random_ids(SMALL, 1, 8, seed=0), cache, None, ask_plainly(runner))]
        )
        same(readings[0], again)

    def test_what_went_wrong_before_is_forgotten(self) -> None:
        """A belief of NaN spoils its own pass, not the next one in the same bucket."""
        runner = device_runner(ours(SMALL))
        cache = filled(runner, 6, 1)
        canvas, ask = random_ids(SMALL, 1, 8, seed=2), ask_plainly(runner)
        (before,) = runner.run([CanvasPass(canvas, cache, None, ask)])
        spoilt = Belief(ids=canvas[..., None], probabilities=torch.full((1, 8, 1), torch.nan))
        (broken,) = runner.run([CanvasPass(canvas, cache, spoilt, ask)])
        assert broken.entropy_nats.isnan().all()
        (after,) = runner.run([CanvasPass(canvas, cache, None, ask)])
        same(before, after)

    def test_passes_with_many_bans_are_run_in_parts(self) -> None:
        model = ours(SMALL)
        runner = device_runner(model)
        caches = [model.new_cache(MARGIN), runner.new_cache()]
        for each, cache in zip((model, runner), caches, strict=True):
            each.encode(random_ids(SMALL, 6, seed=1), cache)
        canvas = random_ids(SMALL, 1, 8, seed=2)
        draw = torch.Generator().manual_seed(3)
        asks = [
            replace(
                ask_plainly(runner),
                banned=Bans(
                    rows=torch.rand(9, SMALL.vocab_tokens, generator=draw) < 0.5,
                    places=torch.arange(8),
                ),
            )
            for _ in range(3)
        ]
        expected = model.run([CanvasPass(canvas, caches[0], None, ask) for ask in asks])
        found = runner.run([CanvasPass(canvas, caches[1], None, ask) for ask in asks])
        for one, other in zip(expected, found, strict=True):
            same(one, other)

    def test_warming_up_leaves_every_slot_free(self) -> None:
        runner = device_runner(ours(replace(SMALL, canvas_tokens=64)), slots=1)
        runner.warm_up()
        assert {key[2] for key in runner._captured if key[0] == "canvas"} == {32, 64}
        assert filled(runner, 3, 1).tokens == 3

    def test_a_bucket_follows_prefixes_that_change(self) -> None:
        """Where rows stand is copied when it changes: by a trim, another slot, a new length."""
        model = ours(SMALL)
        runner, plain = device_runner(model), model.new_cache(MARGIN)
        cache, other = filled(runner, 6, 1), filled(runner, 3, 2)
        model.encode(random_ids(SMALL, 6, seed=1), plain)
        ask = ask_plainly(runner)

        def check(length: int) -> None:
            # Twice: the second one finds its places as they are.
            for seed in (3, 4):
                canvas = random_ids(SMALL, 1, length, seed=seed)
                (expected,) = model.run([CanvasPass(canvas, plain, None, ask)])
                (found,) = runner.run([CanvasPass(canvas, cache, None, ask)])
                same(expected, found)

        check(5)
        check(7)
        for each, own in ((model, plain), (runner, cache)):
            own.trim(4)
            each.encode(random_ids(SMALL, 9, seed=5), own)
        check(7)
        runner.run([CanvasPass(random_ids(SMALL, 1, 7, seed=6), other, None, ask)])
        check(7)

    def test_too_many_sets_of_bans_are_refused(self) -> None:
        runner = device_runner(ours(SMALL))
        cache = filled(runner, 6, 1)
        bans = Bans(
            rows=torch.zeros(24, SMALL.vocab_tokens, dtype=torch.bool),
            places=torch.zeros(8, dtype=torch.int64),
        )
        ask = replace(ask_plainly(runner), banned=bans)
        with pytest.raises(ValueError, match="23 sets of banned"):
            runner.run([CanvasPass(random_ids(SMALL, 1, 8, seed=0), cache, None, ask)])


def test_samples_follow_the_distribution() -> None:
    runner = device_runner(ours(SMALL))
    cache = filled(runner, 6, 1)
    canvas = random_ids(SMALL, 1, 1, seed=1).expand(1, 16).contiguous()
    asks = [replace(ask_plainly(runner), draws=SeededDraws(seed)) for seed in range(40)]
    drawn: Sequence[Reading] = [
        runner.run([CanvasPass(canvas, cache, None, ask)])[0] for ask in asks
    ]
    first = torch.stack([reading.proposal[0, 0] for reading in drawn])
    assert len(first.unique()) > 1
    belief = drawn[0].belief
    assert isinstance(belief, Belief)
    likely = belief.ids[0, 0, (belief.probabilities[0, 0] > 1e-4)]
    assert torch.isin(first, likely).float().mean() > 0.9
    # The same seed draws the same.
    (again,) = runner.run([CanvasPass(canvas, cache, None, replace(asks[0], draws=SeededDraws(0)))])
    assert torch.equal(again.proposal, drawn[0].proposal)
