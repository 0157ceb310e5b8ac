"""Prefix cache: however a prefix was reached, it serves as the one encoded afresh."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import LOGIT_CEILING, distance, encoded, random_canvas
from tiny_model import WIDE_HEADS, ours, random_tokens

from infilld.engine.cache import PrefixCache
from infilld.engine.config import ModelConfig
from infilld.engine.model import DiffusionGemma

W = WIDE_HEADS.window
CANVAS = random_canvas(WIDE_HEADS.vocab_tokens, 1, 5, seed=1)


def empty(margin: int | None = None) -> PrefixCache:
    return ours(WIDE_HEADS).new_cache(margin)


def extend(cache: PrefixCache, tokens: list[int]) -> None:
    """Encode, with NaN wherever nothing valid is stored."""
    poison(cache)
    ours(WIDE_HEADS).encode(torch.tensor(tokens, dtype=torch.int64), cache)
    poison(cache)


def poison(cache: PrefixCache) -> None:
    for held in cache._held:
        held.keys[:, :, held.count :] = torch.nan
        held.values[:, :, held.count :] = torch.nan


def agrees_with_fresh(cache: PrefixCache) -> None:
    """The cache says what one that has just encoded the same tokens says."""
    cache.check()
    model = ours(WIDE_HEADS)
    fresh = encoded(model, torch.tensor(cache.ids, dtype=torch.int64))
    assert cache.ids == fresh.ids
    poison(cache)
    found, expected = (model.denoise(CANVAS, c, None) for c in (cache, fresh))
    assert distance(found, expected) < LOGIT_CEILING


def fake_kv(config: ModelConfig, layer: int, new: int) -> torch.Tensor:
    kind = config.layer_kinds[layer]
    return torch.zeros(1, config.key_heads[kind], new, config.head_sizes[kind])


tokens = st.lists(st.integers(10, 13), max_size=14)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), tokens),
        st.tuples(st.just("trim"), st.integers(0, 12)),
        st.tuples(st.just("reuse"), st.lists(st.integers(10, 13), max_size=30)),
    ),
    max_size=7,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(margin=st.sampled_from([None, 0, 1, 5, 20]), actions=actions, first=tokens)
def test_any_history_equals_a_fresh_encode(
    margin: int | None, actions: list[tuple[str, object]], first: list[int]
) -> None:
    cache = empty(margin)
    extend(cache, first)
    known = list(first)
    for action, value in actions:
        if action == "extend":
            assert isinstance(value, list)
            extend(cache, value)
            known += value
        elif action == "trim":
            assert isinstance(value, int)
            target = max(0, len(known) - value)
            able = cache.can_trim(target)
            assert able or (margin is not None and value > margin)
            assert cache.trim(target) == (target if able else 0)
            known = known[: target if able else 0]
        else:
            assert isinstance(value, list)
            shared = cache.match(value)
            kept = cache.reuse(value)
            assert kept in (shared, 0)
            extend(cache, value[kept:])
            known = list(value)
        assert list(cache.ids) == known
        assert cache.tokens == len(known)
        cache.check()
    agrees_with_fresh(cache)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_match_is_the_longest_common_prefix(ours_: list[int], theirs: list[int]) -> None:
    cache = empty()
    cache._ids = list(ours_)
    expected = 0
    while expected < min(len(ours_), len(theirs)) and ours_[expected] == theirs[expected]:
        expected += 1
    assert cache.match(theirs) == expected
    assert list(cache.ids) == ours_, "matching changes nothing"


@settings(deadline=None, max_examples=60)
@given(
    margin=st.sampled_from([None, 0, 1, 3, 9]),
    pieces=st.lists(st.integers(1, 25), min_size=1, max_size=12),
)
def test_trims_within_the_margin_are_always_possible(margin: int | None, pieces: list[int]) -> None:
    # The model is not needed: the bookkeeping sees only how many positions come and go.
    config = ours(WIDE_HEADS).config
    cache = empty(margin)
    for new in pieces:
        for layer in range(config.layers):
            keys, values = cache.append(
                layer, fake_kv(config, layer, new), fake_kv(config, layer, new)
            )
            before = min(cache.tokens, W - 1)
            assert keys.shape[2] == values.shape[2] >= new + before
        cache.commit(torch.zeros(new, dtype=torch.int64))
        cache.check()
        reach = cache.tokens if margin is None else min(margin, cache.tokens)
        for back in range(reach + 1):
            assert cache.can_trim(cache.tokens - back)


def test_a_sliding_layer_forgets_and_a_full_one_does_not() -> None:
    cache = empty(margin=4)
    for _ in range(40):
        extend(cache, [11] * 10)
    config = ours(WIDE_HEADS).config
    for held, kind in zip(cache._held, config.layer_kinds, strict=True):
        if kind == "full":
            assert held.count == 400
        else:
            # What a trim may ask for, and at most as much again before it is dropped.
            assert W - 1 + 4 <= held.count <= 2 * (W - 1 + 4 + 10)
    agrees_with_fresh(cache)


@pytest.mark.parametrize("margin", [0, 4])
def test_memory_of_sliding_layers_is_bounded(margin: int) -> None:
    config = ours(WIDE_HEADS).config
    cache, sizes = empty(margin), []
    for _ in range(60):
        extend(cache, [12] * 7)
        sizes.append(
            sum(
                held.keys.nbytes
                for held, kind in zip(cache._held, config.layer_kinds, strict=True)
                if kind == "sliding"
            )
        )
    assert sizes[-1] == sizes[20]
    assert cache.nbytes >= sizes[-1]


def test_growing_is_not_quadratic() -> None:
    cache, addresses = empty(margin=4), []
    for _ in range(200):
        extend(cache, [12])
        addresses.append(cache._held[-1].keys.data_ptr())
    moves = sum(a != b for a, b in pairwise(addresses))
    assert moves <= 12, "the full layer is copied at every token"


def test_trimming_to_nothing_starts_anew() -> None:
    cache = empty()
    extend(cache, [10, 11, 12])
    assert cache.trim(0) == 0
    assert cache.tokens == 0
    extend(cache, [13, 10])
    agrees_with_fresh(cache)


@pytest.mark.parametrize("target", [-1, 4])
def test_trimming_outside_the_prefix_is_refused(target: int) -> None:
    cache = empty()
    extend(cache, [10, 11, 12])
    with pytest.raises(ValueError, match=f"cannot trim 3 tokens to {target}"):
        cache.trim(target)
    assert cache.tokens == 3


def test_negative_margin_is_refused() -> None:
    with pytest.raises(ValueError, match="margin_tokens=-1"):
        empty(margin=-1)


def test_denoising_and_reading_leave_the_cache_as_it_was() -> None:
    model = ours(WIDE_HEADS)
    cache = empty(margin=3)
    extend(cache, [10, 11, 12] * 8)
    before = [(held.count, held.keys.clone(), held.values.clone()) for held in cache._held]
    model.denoise(CANVAS.expand(3, -1), cache, None)
    model.read(list(CANVAS), cache)
    assert cache.tokens == 24
    for held, (count, keys, values) in zip(cache._held, before, strict=True):
        assert held.count == count
        assert torch.equal(held.keys[:, :, :count], keys[:, :, :count])
        assert torch.equal(held.values[:, :, :count], values[:, :, :count])


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("margin", [None, 2])
def test_a_piece_that_fails_leaves_no_trace(
    layer: int, margin: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Out of memory, an interrupt: the document's cache must still be usable.
    model = ours(WIDE_HEADS)
    cache = empty(margin)
    extend(cache, [10, 11, 12] * 8)
    with monkeypatch.context() as patch:

        def fail(*args: object) -> torch.Tensor:
            raise MemoryError

        patch.setattr(model.layers[layer].mlp, "forward", fail)
        with pytest.raises(MemoryError):
            extend(cache, [13] * 30)
    assert cache.tokens == 24
    agrees_with_fresh(cache)
    extend(cache, [10, 13, 10])
    agrees_with_fresh(cache)


def test_encoding_nothing_does_nothing() -> None:
    model: DiffusionGemma = ours(WIDE_HEADS)
    cache = empty()
    hidden = model.encode(torch.empty(0, dtype=torch.int64), cache)
    assert hidden.shape == (0, model.config.width)
    assert cache.tokens == 0
    # A canvas without any prefix is legal; transformers refuses it, the engine's prompts never are.
    assert model.denoise(CANVAS, cache, None).isfinite().all()


def test_two_documents_do_not_share_memory() -> None:
    model = ours(WIDE_HEADS)
    first, second = empty(), empty()
    extend(first, random_tokens(WIDE_HEADS, 20, 1).tolist())
    expected = model.denoise(CANVAS, first, None)
    extend(second, random_tokens(WIDE_HEADS, 20, 2).tolist())
    assert torch.equal(model.denoise(CANVAS, first, None), expected)
