"""Traps of the architecture, one by one; test_parity_pass compares the numbers as a whole."""

import pytest
import torch
from parity import LOGIT_CEILING, distance, encoded, random_belief, random_canvas
from tiny_model import ROUTED, TAME, WIDE_HEADS, WILD, changeable, ours, random_tokens, reference

from infilld.engine.checkpoints.loading import load_model
from infilld.engine.config import Rope
from infilld.engine.layers import DENSE_EXPERTS, Experts, Rotation, gelu, rms_norm, rotate


class TestRotary:
    def test_proportional_frequencies(self) -> None:
        # The exponent's denominator is the whole head; what is not turned stands still.
        found = Rotation(Rope(theta=1e6, rotary_fraction=0.25), 16).inverse_frequencies()
        expected = torch.tensor([1.0, 1e6 ** (-2 / 16), 0, 0, 0, 0, 0, 0])
        assert distance(found, expected) < 1e-7

    @pytest.mark.parametrize("kind", ["sliding", "full"])
    def test_frequencies_are_the_references(self, kind: str) -> None:
        rotary = reference(WIDE_HEADS).model.decoder.rotary_emb
        expected = getattr(rotary, f"{kind}_attention_inv_freq")
        found = ours(WIDE_HEADS).rotations[kind].frequencies
        assert torch.equal(found, expected)

    def test_the_26b_models_full_layers(self) -> None:
        found = Rotation(Rope(theta=1e6, rotary_fraction=0.25), 512).inverse_frequencies()
        assert found.shape == (256,)
        assert int((found != 0).sum()) == 64
        assert found[1] == pytest.approx(1e6 ** (-2 / 512))

    def test_pairs_are_half_a_head_apart(self) -> None:
        rotation = Rotation(Rope(theta=1e4, rotary_fraction=1.0), 8)
        x = torch.randn(1, 1, 3, 8)
        turned = rotate(x, rotation(torch.tensor([0, 1, 5]), torch.float32))
        assert torch.equal(turned[:, :, 0], x[:, :, 0]), "position 0 is not turned"
        lengths = x.unflatten(-1, (2, 4)).norm(dim=-2)
        assert distance(turned.unflatten(-1, (2, 4)).norm(dim=-2), lengths) < 1e-6

    def test_angles_are_exact_far_out(self) -> None:
        cosine, _ = Rotation(Rope(theta=1e4, rotary_fraction=1.0), 8)(
            torch.tensor([262_143]), torch.bfloat16
        )
        assert cosine.dtype == torch.bfloat16
        exact = torch.tensor(262_143.0, dtype=torch.float64).cos()
        assert float(cosine[0, 0]) == pytest.approx(float(exact), abs=0.005)


class TestNorm:
    def test_is_computed_in_float32(self) -> None:
        x = torch.full((1, 4096), 200.0, dtype=torch.bfloat16)
        weight = torch.full((4096,), 1.5, dtype=torch.bfloat16)
        found = rms_norm(x, weight, 1e-6)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, torch.full_like(x, 1.5))

    def test_survives_zero(self) -> None:
        assert torch.equal(rms_norm(torch.zeros(2, 8), None, 1e-6), torch.zeros(2, 8))


def test_gelu_is_the_tanh_form() -> None:
    x = torch.linspace(-4, 4, 101)
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    assert distance(gelu(x), 0.5 * x * (1 + torch.tanh(inner))) < 1e-6


class TestEnds:
    def test_soft_cap_is_float32_whatever_the_weights(self) -> None:
        from tiny_model import checkpoint

        model = load_model(checkpoint(WILD), dtype=torch.bfloat16)
        hidden = torch.randn(5, model.config.width, dtype=torch.bfloat16) * 20
        logits = model.logits(hidden)
        raw = (hidden @ model.embed_tokens.weight.T).float()
        assert logits.dtype == torch.float32
        assert distance(logits, 30 * torch.tanh(raw / 30)) < 1e-5
        # bfloat16 has steps of 0.125 up here; the cap must not have them.
        high = logits[(logits > 28) & (logits < 30)]
        assert not torch.equal(high, high.bfloat16().float())
        assert logits.abs().max() <= 30

    def test_first_step_is_the_normed_embedding(self) -> None:
        model = ours(WILD)
        canvas = random_canvas(WILD.vocab_tokens, 1, 9, seed=1)
        embedded = model.embed(canvas)
        first = model.self_conditioning(embedded, None)
        assert torch.equal(first, rms_norm(embedded, None, model.config.rms_eps))
        assert distance(first.pow(2).mean(-1), torch.ones(1, 9)) < 1e-4
        # A signal of zero is the same as none: its MLP has no bias.
        zero = model.self_conditioning(embedded, torch.zeros_like(embedded))
        assert distance(zero, first) < 1e-6

    def test_the_encoder_has_no_such_norm(self) -> None:
        model = ours(WILD)
        embedded = model.embed(random_tokens(WILD, 9, seed=2))
        assert float(embedded.pow(2).mean()) > 5

    def test_a_certain_belief_is_the_tokens_own_embedding(self) -> None:
        model = ours(WILD)
        canvas = random_canvas(WILD.vocab_tokens, 2, 7, seed=3)
        belief = torch.full((2, 7, WILD.vocab_tokens), -torch.inf)
        belief.scatter_(-1, canvas[..., None], 0.0)
        assert distance(model.embed_belief(belief), model.embed(canvas)) < 1e-6

    def test_the_encoders_scalars_are_its_own(self) -> None:
        model = ours(WILD)
        decoder = torch.cat([layer.get_buffer("layer_scalar") for layer in model.layers])
        assert distance(model.encoder_scalars, decoder) > 0.05


class TestExperts:
    def test_both_ways_of_computing_them_agree(self) -> None:
        model = changeable(WILD)
        prefix = random_tokens(WILD, 20, seed=4)
        canvas = random_canvas(WILD.vocab_tokens, 1, 16, seed=5)
        side_by_side = model.denoise(canvas, encoded(model, prefix), None)
        assert WILD.experts <= DENSE_EXPERTS < ROUTED.experts
        for layer in model.layers:
            assert layer.experts.dense
            layer.experts.dense = False
        routed = model.denoise(canvas, encoded(model, prefix), None)
        assert distance(side_by_side, routed) < LOGIT_CEILING
        assert not ours(ROUTED).layers[0].experts.dense

    def test_nobody_may_ask_for_an_expert(self) -> None:
        experts = Experts(ours(WILD).config)
        torch.nn.init.ones_(experts.gate_up_proj)
        torch.nn.init.ones_(experts.down_proj)
        none = torch.zeros(0, WILD.experts_per_token, dtype=torch.int64)
        for dense in (True, False):
            experts.dense = dense
            found = experts(torch.zeros(0, ours(WILD).config.width), none.float(), none)
            assert found.shape == (0, ours(WILD).config.width)


class TestCanvas:
    @pytest.mark.parametrize("belief", [False, True], ids=["first", "belief"])
    def test_rows_do_not_see_each_other(self, belief: bool) -> None:
        model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 20, seed=6)
        cache = encoded(model, prefix)
        shape = (WIDE_HEADS.vocab_tokens, 4, 9)
        canvas = random_canvas(*shape, seed=7)
        given = random_belief(*shape, seed=8) if belief else None
        order = torch.tensor([2, 0, 3, 1])
        straight = model.denoise(canvas, cache, given)
        permuted = model.denoise(canvas[order], cache, None if given is None else given[order])
        assert distance(permuted, straight[order]) < LOGIT_CEILING

    def test_every_position_sees_the_whole_canvas(self) -> None:
        model, prefix = ours(TAME), random_tokens(TAME, 20, seed=9)
        cache = encoded(model, prefix)
        canvas = random_canvas(TAME.vocab_tokens, 1, 16, seed=10)
        before = model.denoise(canvas, cache, None)
        changed = canvas.clone()
        changed[0, -1] = (changed[0, -1] + 1) % TAME.vocab_tokens
        moved = (model.denoise(changed, cache, None) - before).abs().amax(-1)[0]
        assert (moved > 1e-4).all()

    def test_an_encoded_position_sees_nothing_after_it(self) -> None:
        model, prefix = ours(TAME), random_tokens(TAME, 30, seed=11)
        whole = model.encode(prefix, model.new_cache())
        changed = prefix.clone()
        changed[20] = (changed[20] + 1) % TAME.vocab_tokens
        other = model.encode(changed, model.new_cache())
        assert distance(other[:20], whole[:20]) < 1e-5
        assert distance(other[20:], whole[20:]) > 1e-3

    def test_no_gradient_is_kept(self) -> None:
        model = ours(TAME)
        logits = model.denoise(
            random_canvas(TAME.vocab_tokens, 1, 3, seed=12), model.new_cache(), None
        )
        assert not logits.requires_grad
