"""One pass, one prefix, one score: the same numbers as `transformers`, to float32 noise."""

import pytest
import torch
from parity import (
    LOGIT_CEILING,
    PassCase,
    distance,
    encoded,
    our_pass,
    pass_distance,
    pass_inputs,
    random_canvas,
    reference_hidden,
    reference_log_probabilities,
    reference_logits,
    reference_pass,
)
from tiny_model import (
    CHECKPOINTS,
    TAME,
    WIDE_HEADS,
    WILD,
    checkpoint,
    exact_reference,
    ours,
    random_tokens,
    reference,
)

from infilld.engine.checkpoints.loading import load_model

W, L = WILD.window, WILD.canvas_tokens
PREFIXES = (1, W - 2, W - 1, W, W + 1, 2 * W + 3)
HIDDEN_CEILING = 1e-5

by_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)


@by_checkpoint
@pytest.mark.parametrize("belief", [False, True], ids=["first", "belief"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_logits_agree(name: str, prefix: int, belief: bool) -> None:
    case = PassCase(prefix=prefix, tokens=L, belief=belief)
    assert pass_distance(ours(CHECKPOINTS[name]), CHECKPOINTS[name], [case]) < LOGIT_CEILING


@by_checkpoint
@pytest.mark.parametrize("belief", [False, True], ids=["first", "belief"])
@pytest.mark.parametrize("tokens", [1, 2, 7, L - 1, L + 1, 3 * L])
def test_any_canvas_length_agrees(name: str, tokens: int, belief: bool) -> None:
    cases = [PassCase(prefix=prefix, tokens=tokens, belief=belief) for prefix in (W - 1, 2 * W + 3)]
    assert pass_distance(ours(CHECKPOINTS[name]), CHECKPOINTS[name], cases) < LOGIT_CEILING


@pytest.mark.parametrize("belief", [False, True], ids=["first", "belief"])
def test_rows_share_the_prefix(belief: bool) -> None:
    case = PassCase(prefix=W + 5, rows=3, tokens=9, belief=belief)
    assert pass_distance(ours(WIDE_HEADS), WIDE_HEADS, [case]) < LOGIT_CEILING
    prefix, canvas, given = pass_inputs(WIDE_HEADS, case)
    together = our_pass(ours(WIDE_HEADS), prefix, canvas, given)
    for row in range(3):
        one = slice(row, row + 1)
        alone = our_pass(
            ours(WIDE_HEADS), prefix, canvas[one], None if given is None else given[one]
        )
        assert distance(together[one], alone) < LOGIT_CEILING


def test_we_are_as_close_to_the_reference_as_it_is_to_itself() -> None:
    us = itself = 0.0
    for spec in CHECKPOINTS.values():
        eager = reference(spec, "eager", "eager")
        for prefix in (5, 2 * W + 3):
            for belief in (False, True):
                case = PassCase(prefix=prefix, tokens=L, belief=belief, seed=7)
                us = max(us, pass_distance(ours(spec), spec, [case]))
                other = reference_pass(eager, *pass_inputs(spec, case))
                itself = max(itself, distance(other, reference_logits(spec, case)))
    assert us <= 3 * itself


@by_checkpoint
@pytest.mark.parametrize("belief", [False, True], ids=["first", "belief"])
def test_float64_leaves_no_difference(name: str, belief: bool) -> None:
    spec = CHECKPOINTS[name]
    for prefix in (W - 1, 2 * W + 3):
        inputs = pass_inputs(spec, PassCase(prefix=prefix, tokens=L, belief=belief))
        expected = reference_pass(exact_reference(spec), *inputs)
        assert distance(our_pass(ours(spec, torch.float64), *inputs), expected) < 1e-6


def test_the_checkpoints_are_worth_the_test() -> None:
    # Logits that the soft cap bends, and far from the ones of a uniform guess.
    case = PassCase(prefix=2 * W + 3, tokens=L, belief=True)
    largest = {
        name: float(reference_logits(s, case).abs().max()) for name, s in CHECKPOINTS.items()
    }
    assert max(largest.values()) > 15
    assert min(largest.values()) > 3
    assert max(largest.values()) < 29, "float32 noise would pass the ceiling"


@by_checkpoint
@pytest.mark.parametrize("prefix", PREFIXES)
def test_encoded_states_agree(name: str, prefix: int) -> None:
    spec = CHECKPOINTS[name]
    tokens = random_tokens(spec, prefix, seed=prefix)
    hidden = ours(spec).encode(tokens, ours(spec).new_cache())
    assert distance(hidden, reference_hidden(reference(spec), tokens)) < 2 * HIDDEN_CEILING


@pytest.mark.parametrize(
    "chunks",
    [(10, 20), (29, 1), (1,) * 30, (7, 1, 8, 14), (8, 8, 8, 6), (1, 29)],
    ids=lambda c: "+".join(map(str, c)) if len(c) < 9 else f"{len(c)}x1",
)
@pytest.mark.parametrize("margin", [None, 0, 3])
def test_chunks_equal_one_call(chunks: tuple[int, ...], margin: int | None) -> None:
    model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 30, seed=1)
    cache = model.new_cache(margin)
    parts = [model.encode(piece, cache) for piece in prefix.split(list(chunks))]
    cache.check()
    canvas = random_canvas(WIDE_HEADS.vocab_tokens, 1, L, seed=2)
    assert distance(torch.cat(parts), reference_hidden(reference(WIDE_HEADS), prefix)) < (
        2 * HIDDEN_CEILING
    )
    expected = reference_pass(reference(WIDE_HEADS), prefix, canvas, None)
    assert distance(model.denoise(canvas, cache, None), expected) < LOGIT_CEILING


def test_long_prompts_are_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infilld.engine.model.ENCODE_CHUNK_TOKENS", 7)
    prefix = random_tokens(WILD, 45, seed=3)
    hidden = ours(WILD).encode(prefix, ours(WILD).new_cache(margin_tokens=2))
    assert distance(hidden, reference_hidden(reference(WILD), prefix)) < 2 * HIDDEN_CEILING


class TestTrimmedAndExtended:
    """A prefix reached by cutting and growing serves as one encoded afresh."""

    canvas = random_canvas(WIDE_HEADS.vocab_tokens, 2, L, seed=4)

    def check(self, cache: object, tokens: torch.Tensor) -> None:
        model = ours(WIDE_HEADS)
        expected = reference_pass(reference(WIDE_HEADS), tokens, self.canvas, None)
        assert distance(model.denoise(self.canvas, cache, None), expected) < LOGIT_CEILING  # type: ignore[arg-type]

    @pytest.mark.parametrize("margin", [None, 6])
    @pytest.mark.parametrize("back", [1, 5, 6])
    def test_trim_within_the_margin(self, margin: int | None, back: int) -> None:
        model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 30, seed=5)
        cache = encoded(model, prefix, margin)
        assert cache.trim(30 - back) == 30 - back
        cache.check()
        self.check(cache, prefix[: 30 - back])

    @pytest.mark.parametrize("margin", [0, 1, 6])
    def test_margin_holds_however_the_prefix_grew(self, margin: int) -> None:
        model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 64, seed=6)
        cache = model.new_cache(margin)
        for token in prefix:
            model.encode(token[None], cache)
            length = cache.tokens
            assert cache.can_trim(max(0, length - margin))
        assert cache.trim(64 - margin) == 64 - margin
        self.check(cache, prefix[: 64 - margin])

    def test_trim_past_what_is_held_says_so_and_encodes_anew(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # With room to spare nothing would have been dropped yet.
        monkeypatch.setattr("infilld.engine.cache.SPARE_TOKENS", 0)
        model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 40, seed=7)
        cache = encoded(model, prefix[:32], margin=6)
        for token in prefix[32:]:
            model.encode(token[None], cache)
        target = next(n for n in range(40, -1, -1) if n == 0 or not cache.can_trim(n))
        assert 0 < target < 40 - 6
        assert cache.trim(target) == 0
        assert cache.tokens == 0
        model.encode(prefix[:target], cache)
        self.check(cache, prefix[:target])

    def test_trim_extend_trim(self) -> None:
        model = ours(WIDE_HEADS)
        first, second = (random_tokens(WIDE_HEADS, 30, seed=seed) for seed in (8, 9))
        cache = encoded(model, first, margin=8)
        cache.trim(26)
        model.encode(second[:10], cache)
        cache.trim(33)
        model.encode(second[:3], cache)
        self.check(cache, torch.cat((first[:26], second[:7], second[:3])))

    @pytest.mark.parametrize("left", [W - 2, 3, 1])
    def test_trim_to_less_than_the_window(self, left: int) -> None:
        model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 12, seed=10)
        cache = encoded(model, prefix)
        assert cache.trim(left) == left
        self.check(cache, prefix[:left])

    def test_full_hit_encodes_nothing(self) -> None:
        model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 20, seed=11)
        cache = encoded(model, prefix, margin=4)
        assert cache.reuse(prefix.tolist()) == 20
        hidden = model.encode(prefix[20:], cache)
        assert hidden.shape == (0, model.config.width)
        self.check(cache, prefix)

    def test_hit_that_leaves_one_token(self) -> None:
        model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 20, seed=12)
        cache = encoded(model, prefix[:19], margin=4)
        assert cache.reuse(prefix.tolist()) == 19
        hidden = model.encode(prefix[19:], cache)
        expected = reference_hidden(reference(WIDE_HEADS), prefix)[-1:]
        assert distance(hidden, expected) < 2 * HIDDEN_CEILING
        self.check(cache, prefix)


class TestScore:
    """Encoder and head as a causal language model."""

    def log_probabilities(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Of tokens [..., N] from the hidden states [..., N, D] before them."""
        scores = ours(WIDE_HEADS).logits(hidden).log_softmax(-1)
        return scores.gather(-1, tokens[..., None])[..., 0]

    @pytest.mark.parametrize("length", [2, W, 2 * W + 3, 40])
    def test_log_probabilities_agree(self, length: int) -> None:
        tokens = random_tokens(WIDE_HEADS, length, seed=length)
        model = ours(WIDE_HEADS)
        hidden = model.encode(tokens, model.new_cache())
        found = self.log_probabilities(hidden[:-1], tokens[1:])
        expected = reference_log_probabilities(reference(WIDE_HEADS), tokens)
        assert distance(found, expected) < LOGIT_CEILING

    @pytest.mark.parametrize("margin", [None, 0])
    def test_candidates_on_one_prefix_agree(self, margin: int | None) -> None:
        model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 19, seed=1)
        candidates = torch.stack([random_tokens(WIDE_HEADS, 11, seed=s) for s in (2, 3, 4)])
        cache = model.new_cache(margin)
        last = model.encode(prefix, cache)[-1]
        before = cache.ids
        read = torch.stack(model.read(list(candidates), cache))
        states = torch.cat((last.expand(3, 1, -1), read[:, :-1]), dim=1)
        found = self.log_probabilities(states, candidates)
        for row, candidate in enumerate(candidates):
            whole = torch.cat((prefix, candidate))
            expected = reference_log_probabilities(reference(WIDE_HEADS), whole)[-11:]
            assert distance(found[row], expected) < LOGIT_CEILING
        assert cache.ids == before, "reading extends nothing"
        cache.check()

    def test_score_after_trimming_agrees(self) -> None:
        model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 24, seed=5)
        candidate = random_tokens(WIDE_HEADS, 6, seed=6)
        cache = encoded(model, prefix, margin=5)
        cache.trim(19)
        # One token is left to encode, for the hidden state before the first candidate token.
        cache.trim(18)
        last = model.encode(prefix[18:19], cache)
        states = torch.cat((last, model.read([candidate], cache)[0][:-1]))
        whole = torch.cat((prefix[:19], candidate))
        expected = reference_log_probabilities(reference(WIDE_HEADS), whole)[-6:]
        assert distance(self.log_probabilities(states, candidate), expected) < LOGIT_CEILING


class TestLowPrecision:
    """bfloat16: no exactness, but the same roundings where the reference rounds."""

    def test_belief_is_rounded_to_the_weights_precision(self) -> None:
        # `generate` casts the scaled logits before their softmax.
        model = load_model(checkpoint(TAME), dtype=torch.bfloat16)
        belief = torch.randn(1, 5, TAME.vocab_tokens) * 20
        assert torch.equal(model.embed_belief(belief), model.embed_belief(belief.bfloat16()))

    def test_error_is_within_the_references_own(self) -> None:
        from transformers import DiffusionGemmaForBlockDiffusion

        low = load_model(checkpoint(TAME), dtype=torch.bfloat16)
        assert low.encoder_scalars.dtype == torch.bfloat16
        theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(
            checkpoint(TAME), dtype=torch.bfloat16
        ).eval()
        ours_error = theirs_error = 0.0
        for belief in (False, True):
            case = PassCase(prefix=2 * W + 3, rows=4, tokens=L, belief=belief, seed=1)
            prefix, canvas, given = pass_inputs(TAME, case)
            exact = reference_logits(TAME, case)
            rounded = None if given is None else given.bfloat16()
            found = our_pass(low, prefix, canvas, rounded)
            reached = reference_pass(theirs, prefix, canvas, rounded)
            ours_error += float((found - exact).abs().mean())
            theirs_error += float((reached - exact).abs().mean())
        assert ours_error < 1.25 * theirs_error
