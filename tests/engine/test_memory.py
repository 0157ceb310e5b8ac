"""The plan adds up, grows with what is asked for, and offers only what really fits."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import Type, config_json, write_gguf

from infilld.engine.checkpoints.gguf import inspect_gguf, read_gguf
from infilld.engine.checkpoints.quantizing import Quantization, is_quantized, quantize_rows
from infilld.engine.checkpoints.weights import part_of
from infilld.engine.config import ModelConfig
from infilld.engine.errors import CheckpointMismatch, NotEnoughMemory
from infilld.engine.memory import (
    KeyValues,
    MemoryPlan,
    WeightBytes,
    alternatives,
    budget_of,
    gigabytes,
    longest_context,
    plan_memory,
    refuse_too_large,
    tiles_filling,
)
from infilld.kernels.quant_pack import quant_pack

# Google's 26B model.
LARGE = ModelConfig.from_dict(
    config_json(
        vocab_size=262_144,
        hidden_size=2816,
        intermediate_size=2112,
        moe_intermediate_size=704,
        num_hidden_layers=30,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 5,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        sliding_window=1024,
        num_experts=128,
        top_k_experts=8,
        max_position_embeddings=262_144,
    )
    | {"canvas_length": 256}
)
SMALL = ModelConfig.from_dict(config_json())
BUDGET_BYTES = 18_000_000_000
INT4 = WeightBytes.estimate(LARGE, torch.bfloat16, Quantization())
PLAIN = WeightBytes.estimate(LARGE, torch.bfloat16, None)


def large(weights: WeightBytes = INT4, **options: Any) -> MemoryPlan:
    return plan_memory(LARGE, weights, on_gpu=True, **({"budget_bytes": BUDGET_BYTES} | options))


class TestLarge:
    def test_weights_by_hand(self) -> None:
        experts = 30 * 128 * (1408 * 2816 + 2816 * 704)
        sliding = 25 * 2816 * (2 * 4096 + 2 * 2048)
        full = 5 * 2816 * (2 * 8192 + 1024)
        dense = 30 * 3 * 2816 * 2112
        assert (experts, sliding + full, dense) == (22_837_985_280, 1_110_179_840, 535_265_280)
        # Four bits, and a bf16 scale for each 32.
        assert INT4.quantized == (experts + sliding + full + dense) * 9 // 16
        assert INT4.embedding == 262_144 * 2816 * 2
        assert INT4.self_conditioning == 3 * 2816 * 2112 * 2
        router = 30 * (128 * 2816 + 2816 + 128)
        norms = 30 * (7 * 2816 + 1 + 1) + 25 * 2 * 256 + 5 * 2 * 512 + 2 * 2816
        assert INT4.plain == 2 * (router + norms)
        # A published GGUF of the model counts so many numbers; 256 of them are `rope_freqs`.
        # 704 columns of the experts' second matrix fill 768, 2112 of the dense MLP 2176.
        second, thirds = 30 * 128 * 2816 * (768 - 704), 30 * 3 * 2816 * (2176 - 2112)
        assert INT4.filling == (second + thirds) * 9 // 16
        assert PLAIN.filling == 0
        assert PLAIN.total == 2 * (25_250_987_068 - 256)

    def test_keys_and_values_by_hand(self) -> None:
        plan = large(context_tokens=32_768)
        sliding = 25 * 2 * 8 * 256 * (1023 + 512 + 512)
        full = 5 * 2 * 2 * 512 * 32_768
        assert plan.key_value_bytes == 2 * (sliding + full) == 1_090_314_240
        assert large(context_tokens=32_768, key_values="fp8").key_value_bytes == sliding + full
        assert large(context_tokens=32_768, slots=3).key_value_bytes == 6 * (sliding + full)
        # A prefix shorter than the window takes its own length in every layer.
        assert large(context_tokens=100, slots=1).key_value_bytes == 2 * 100 * (
            25 * 4096 + 5 * 2048
        )

    def test_int4_with_32k_fits_18_gb(self) -> None:
        plan = large(context_tokens=32_768)
        assert plan.fits
        assert plan.slots == 1
        assert plan.total_bytes == pytest.approx(17.93e9, abs=0.01e9)
        assert plan.largest_context() == 36_096
        assert not large(PLAIN).fits

    def test_the_table_adds_up(self) -> None:
        plan = large(context_tokens=32_768)
        assert sum(count for _, count, _ in plan.rows) == plan.total_bytes
        lines = plan.table().splitlines()
        assert lines[-2].split()[:3] == ["total", "17.93", "GB"]
        assert lines[-1].split() == ["may", "be", "used", "18.00", "GB", "fits"]
        assert "32,768 tokens, bf16, 1 prefix" in plan.table()
        assert "an estimate" in plan.table()

    def test_a_large_budget_holds_a_prefix_for_each_job(self) -> None:
        assert large(budget_bytes=80_000_000_000).slots == 4
        assert large(budget_bytes=None).slots == 4

    def test_a_small_budget_holds_as_many_where_they_cost_little(self) -> None:
        weights = WeightBytes.estimate(SMALL, torch.bfloat16, None)
        assert plan_memory(SMALL, weights, on_gpu=True, budget_bytes=8_000_000_000).slots == 4
        assert large(budget_bytes=24_000_000_000).slots == 1
        # Less than the weights take: nothing is left to share.
        assert large(budget_bytes=4_000_000_000).slots == 1


class TestTiles:
    @pytest.mark.parametrize(
        ("part", "name", "shape"),
        [
            ("experts", "layers.0.experts.gate_up_proj", (2, 96, 176)),
            ("experts", "layers.0.experts.down_proj", (2, 176, 48)),
            ("dense MLP", "layers.0.mlp.down_proj.weight", (176, 192)),
            ("attention", "layers.0.self_attn.q_proj.weight", (256, 176)),
        ],
        ids=["gate-up", "down", "dense", "attention"],
    )
    def test_the_filling_is_what_tiles_take(
        self, part: str, name: str, shape: tuple[int, ...]
    ) -> None:
        quantization = Quantization(group=16)
        weight = quantize_rows(torch.randn(shape), quantization)
        gated = name.endswith("gate_up_proj")
        tiled = quant_pack(weight, gated=gated, capability=80, impl="reference")
        told = weight.nbytes * (1 + tiles_filling(name, shape))
        factors = tiled.factor.nbytes
        assert tiled.nbytes - factors == pytest.approx(told)
        assert part_of(name) == part


class TestGrowth:
    @given(
        context=st.integers(0, 261_000),
        more=st.integers(0, 800),
        held=st.sampled_from(["bf16", "fp8"]),
        slots=st.integers(1, 4),
    )
    def test_more_context_never_takes_less(
        self, context: int, more: int, held: KeyValues, slots: int
    ) -> None:
        options: dict[str, Any] = {"key_values": held, "slots": slots}
        one = large(context_tokens=context, **options)
        other = large(context_tokens=context + more, **options)
        assert one.total_bytes <= other.total_bytes
        assert one.fits or not other.fits
        assert large(context_tokens=context, key_values=held, slots=slots + 1).total_bytes > (
            one.total_bytes if context else 0
        )

    @given(budget=st.integers(15_000_000_000, 60_000_000_000))
    def test_the_largest_context_fits_and_the_next_does_not(self, budget: int) -> None:
        plan = large(budget_bytes=budget, slots=1)
        found = plan.largest_context()
        if found:
            assert large(budget_bytes=budget, slots=1, context_tokens=found).fits
        most = longest_context(LARGE)
        if found < most:
            beyond = min(most, found + 256)
            assert not large(budget_bytes=budget, slots=1, context_tokens=beyond).fits


class TestRefusal:
    def test_what_fits_is_not_refused(self) -> None:
        refuse_too_large(large())
        refuse_too_large(large(PLAIN, budget_bytes=None))

    @pytest.mark.parametrize("context", [131_072, 261_888])
    def test_a_named_context_really_fits(self, context: int) -> None:
        with pytest.raises(NotEnoughMemory, match=f"a context of {context:,} tokens") as caught:
            refuse_too_large(large(context_tokens=context))
        assert "18.00 GB may be used" in str(caught.value)
        offers = re.findall(r"a context of ([\d,]+) tokens( with [^;.]+)?", caught.value.remedy)
        assert len(offers) == 2
        for tokens, how in offers:
            held: KeyValues = "fp8" if "fp8" in how else "bf16"
            named = int(tokens.replace(",", ""))
            assert large(context_tokens=named, key_values=held).fits
            if named < context:
                assert not large(context_tokens=named + 256, key_values=held).fits

    def test_int4_is_offered_for_a_plain_checkpoint(self) -> None:
        with pytest.raises(NotEnoughMemory) as caught:
            refuse_too_large(large(PLAIN))
        assert caught.value.remedy == (
            "What fits: a context of 32,768 tokens with int4 weights (infilld models quantize)."
        )
        (offer,) = alternatives(large(PLAIN))
        assert offer.fits
        assert offer.weights == INT4

    def test_nothing_fits(self) -> None:
        with pytest.raises(NotEnoughMemory, match=r"8\.00 GB may be used") as caught:
            refuse_too_large(large(PLAIN, budget_bytes=8_000_000_000))
        assert "before any context" in caught.value.remedy

    def test_a_cpu_is_offered_no_fp8(self) -> None:
        weights = WeightBytes.estimate(LARGE, torch.float32, Quantization())
        plan = plan_memory(
            LARGE, weights, on_gpu=False, context_tokens=261_888, budget_bytes=20_000_000_000
        )
        assert plan.key_values == "float32"
        assert plan.driver_bytes == 0
        assert [offer.key_values for offer in alternatives(plan)] == ["float32"]


class TestArguments:
    def test_the_default_context_is_what_the_model_reads(self) -> None:
        weights = WeightBytes.estimate(SMALL, torch.float32, None)
        plan = plan_memory(SMALL, weights, on_gpu=False)
        assert plan.context_tokens == longest_context(SMALL) == 512 - 16
        assert plan.fits
        assert plan.largest_context() == 512 - 16

    @pytest.mark.parametrize("context", [-1, 497])
    def test_a_context_that_cannot_be_read_is_refused(self, context: int) -> None:
        weights = WeightBytes.estimate(SMALL, torch.float32, None)
        with pytest.raises(CheckpointMismatch, match="reads 496 at most"):
            plan_memory(SMALL, weights, on_gpu=False, context_tokens=context)

    def test_no_slot_is_refused(self) -> None:
        with pytest.raises(ValueError, match="slots=0"):
            large(slots=0)


class TestStored:
    def test_a_checkpoint_takes_what_is_read(self, tmp_path: Path) -> None:
        def storage(name: str, shape: tuple[int, ...]) -> Type:
            return Type.Q4_K if is_quantized(name, shape) else Type.F32

        path = write_gguf(tmp_path, storage).path
        found = WeightBytes.of(inspect_gguf(path), torch.bfloat16)
        tensors = read_gguf(path, dtype=torch.bfloat16).tensors
        assert found.total == sum(tensor.nbytes for tensor in tensors.values())
        assert found.embedding == tensors["embed_tokens.weight"].nbytes
        assert found.quantized == sum(
            tensor.nbytes for name, tensor in tensors.items() if is_quantized(name, tensor.shape)
        )

    def test_the_estimate_of_a_plain_one_is_exact(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path, lambda name, shape: Type.F32).path
        found = WeightBytes.of(inspect_gguf(path), torch.float32)
        estimate = WeightBytes.estimate(SMALL, torch.float32, None)
        assert found.total == estimate.total
        assert (found.plain, found.embedding) == (estimate.plain, estimate.embedding)


def test_a_limit_that_was_set_is_the_budget() -> None:
    assert budget_of(torch.device("cpu"), 123) == 123
    free = budget_of(torch.device("cpu"))
    assert free is None or free > 0


@pytest.mark.parametrize(
    ("count", "text"), [(17_531_000_000, "17.53 GB"), (100_000_000, "0.10 GB"), (35_700, "0.0 MB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert gigabytes(count) == text
