"""Plain weights become few bits with little error, whatever their shape; nothing odd gets in."""

import math

import pytest
import torch
from torch import Tensor

from infilld.engine.checkpoints import quantizing
from infilld.engine.checkpoints.quantizing import (
    Quantization,
    bits_per_weight,
    group_for,
    is_quantizable,
    is_quantized,
    quantize_rows,
)
from infilld.kernels._weights import QuantizedWeight

INT4, INT8 = Quantization(kind="int4"), Quantization(kind="int8")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def codes_of(weight: QuantizedWeight) -> Tensor:
    if weight.kind == "int8":
        return weight.codes.int()
    return torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).flatten(-2).int() - 8


def represented(weight: QuantizedWeight) -> Tensor:
    grouped = codes_of(weight).view(*weight.scales.shape, weight.group)
    return (grouped * weight.scales.float()[..., None]).flatten(-2)


def rounded_to(weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Each group [.., G] rounded to multiples of a scale [..], as bf16 holds it."""
    held = scale.bfloat16().float()[..., None]
    return (weight / held).round().clamp(low, high) * held


def error(weight: Tensor, held: Tensor) -> float:
    """Root mean square of the error, as a share of the weight's."""
    return float((weight - held).norm() / weight.norm())


class TestInt4:
    @pytest.mark.parametrize("group", [16, 32, 64])
    def test_it_is_better_than_one_fixed_scale(self, group: int) -> None:
        weight = normal(64, 256)
        held = quantize_rows(weight, Quantization(kind="int4", group=group))
        groups = weight.view(64, -1, group)
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        plain = error(groups, rounded_to(groups, groups.abs().amax(-1) / 7, -8, 7))
        signed = error(groups, rounded_to(groups, largest / -8, -8, 7))
        ours = error(weight, represented(held))
        assert ours < 0.88 * plain
        assert ours < 0.97 * signed

    def test_the_figures_that_are_told(self) -> None:
        weight = normal(512, 512)
        groups = weight.view(512, -1, 32)
        plain = error(groups, rounded_to(groups, groups.abs().amax(-1) / 7, -8, 7))
        assert plain == pytest.approx(0.0970, abs=0.0005)
        assert error(weight, represented(quantize_rows(weight, INT4))) == pytest.approx(
            0.0812, abs=0.0005
        )

    def test_what_is_in_four_bits_already_stays(self) -> None:
        draw = torch.Generator().manual_seed(1)
        codes = torch.randint(-8, 8, (40, 4, 32), generator=draw)
        # The lowest code occurs in every group, as it does where a group was quantized well.
        codes[:, :, 5] = -8
        scales = (torch.randn(40, 4, generator=draw) * 0.01).bfloat16()
        weight = (codes * scales.float()[..., None]).flatten(1)
        held = quantize_rows(weight, INT4)
        assert torch.equal(represented(held), weight)
        assert torch.equal(held.scales, scales)

    def test_the_low_nibble_is_the_even_column(self) -> None:
        weight = torch.tensor([[-8.0, 1, 2, 3, 4, 5, 6, 7] * 2])
        held = quantize_rows(weight, Quantization(kind="int4", group=16))
        assert held.scales.tolist() == [[1.0]]
        assert held.codes.tolist() == [[0 | 9 << 4, 10 | 11 << 4, 12 | 13 << 4, 14 | 15 << 4] * 2]

    def test_pieces_do_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        weight = normal(3, 10, 96)
        whole = quantize_rows(weight, INT4)
        monkeypatch.setattr(quantizing, "_CPU_CHUNK", 7 * 32)
        cut = quantize_rows(weight, INT4)
        assert torch.equal(whole.codes, cut.codes)
        assert torch.equal(whole.scales, cut.scales)


class TestInt8:
    def test_steps_are_a_255th(self) -> None:
        weight = normal(16, 128)
        held = quantize_rows(weight, INT8)
        groups = weight.view(16, -1, 32)
        step = groups.abs().amax(-1, keepdim=True) / 127
        off = (groups - represented(held).view_as(groups)).abs()
        # Half a step, and what bf16 takes of the scale where the code is large.
        assert bool((off <= 0.5 * step * 1.01 + groups.abs() * 2**-8).all())
        assert held.codes.dtype == torch.int8

    def test_it_is_a_tenth_of_the_error_of_int4(self) -> None:
        weight = normal(64, 256)
        errors = [error(weight, represented(quantize_rows(weight, each))) for each in (INT4, INT8)]
        assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("quantization", [INT4, INT8], ids=["int4", "int8"])
class TestBoth:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_any_shape_and_type(self, quantization: Quantization, dtype: torch.dtype) -> None:
        weight = normal(2, 3, 48).to(dtype)
        held = quantize_rows(weight, quantization)
        assert held.shape == (2, 3, 48)
        assert held.group == 16
        assert held.scales.dtype == torch.bfloat16
        alone = quantize_rows(weight[1, 2][None], quantization)
        assert torch.equal(held.codes[1, 2], alone.codes[0])

    def test_a_weight_that_is_not_contiguous(self, quantization: Quantization) -> None:
        weight = normal(64, 16).T
        held = quantize_rows(weight, quantization)
        assert torch.equal(held.codes, quantize_rows(weight.contiguous(), quantization).codes)

    def test_zeros_and_what_is_nearly_zero(self, quantization: Quantization) -> None:
        weight = torch.zeros(4, 64)
        weight[1, 3] = 1e-44
        weight[2] = -1e-30
        held = represented(quantize_rows(weight, quantization))
        assert torch.equal(held[0], weight[0])
        assert bool(torch.isfinite(held).all())
        assert held[2].tolist() == pytest.approx([-1e-30] * 64, rel=0.01)

    @pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
    def test_what_is_no_number_is_refused(self, quantization: Quantization, odd: float) -> None:
        weight = normal(4, 64)
        weight[3, 40] = odd
        with pytest.raises(ValueError, match="not finite"):
            quantize_rows(weight, quantization)

    @pytest.mark.parametrize("shape", [(64,), (4, 24)], ids=str)
    def test_what_is_no_matrix_of_sixteens_is_refused(
        self, quantization: Quantization, shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(ValueError, match="a multiple of 16"):
            quantize_rows(torch.ones(shape), quantization)

    @pytest.mark.parametrize("columns", [2816, 704, 48])
    def test_the_bits_that_are_told(self, quantization: Quantization, columns: int) -> None:
        held = quantize_rows(normal(4, columns), quantization)
        assert 8 * held.nbytes == bits_per_weight(columns, quantization) * 4 * columns


@pytest.mark.parametrize(
    ("columns", "group", "found"), [(2816, 128, 128), (704, 128, 64), (2112, 32, 32), (48, 32, 16)]
)
def test_a_group_is_halved_until_it_divides(columns: int, group: int, found: int) -> None:
    assert group_for(columns, group) == found


@pytest.mark.parametrize(
    ("name", "shape", "stays", "is_made"),
    [
        ("layers.0.self_attn.q_proj.weight", (64, 32), True, True),
        ("layers.0.mlp.down_proj.weight", (32, 48), True, True),
        ("layers.0.experts.gate_up_proj", (4, 48, 32), True, True),
        ("layers.0.experts.down_proj", (4, 32, 24), True, False),
        ("layers.0.experts.down_proj", (4, 32, 12), False, False),
        ("layers.0.router.proj.weight", (4, 32), False, False),
        ("layers.0.self_attn.q_norm.weight", (8,), False, False),
        ("self_conditioning.gate_proj.weight", (48, 32), False, False),
        ("embed_tokens.weight", (128, 32), False, False),
        ("encoder_scalars", (3,), False, False),
    ],
)
def test_which_tensors(name: str, shape: tuple[int, ...], stays: bool, is_made: bool) -> None:
    assert is_quantized(name, shape) == stays
    assert is_quantizable(name, shape) == is_made


@pytest.mark.parametrize("group", [0, 8, 48])
def test_odd_groups_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match="a power of two"):
        Quantization(group=group)
