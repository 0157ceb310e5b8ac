from dataclasses import replace
from pathlib import Path

import pytest
import torch
from few_bits import FORM_COLUMNS, FORMS, form, random_weight
from interpreter import run_gpu
from torch import Tensor

from infilld.kernels._tiles import TiledWeight, e5m3
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.dequantize import dequantize
from infilld.kernels.quant_pack import quant_pack


def code_at(tiled: TiledWeight, expert: int, row: int, column: int) -> int:
    """The code of one weight, found in the tiles."""
    layout = tiled.layout
    hidden = tiled.shape[-2] // 2
    if layout.gated:
        place, side = row % hidden, row // hidden
        i_n, lane = divmod(place, layout.block_n // 2)
        lane = lane // 8 * 16 + 8 * side + lane % 8
    else:
        i_n, lane = divmod(row, layout.block_n)
    i_k, rest = divmod(column, 2 * layout.half)
    second, k = divmod(rest, layout.half)
    if layout.permuted:
        word = k % 8 // 2 * (layout.half // 16) + k // 16
        code = k // 8 % 2 * 2 + k % 2
    else:
        word, code = divmod(k, 4)
    byte = 4 * word + (0, 2, 1, 3)[code]
    stored = tiled.codes[expert, i_n, i_k].view(torch.uint8)
    if tiled.kind in ("int4", "nvfp4"):
        return int(stored.view(layout.block_n, -1)[lane, byte]) >> 4 * second & 15
    raw = int(stored.view(2, layout.block_n, -1)[second, lane, byte])
    return raw ^ 128 if tiled.kind == "int8" else raw


def codes_of(weight: QuantizedWeight) -> Tensor:
    """Codes [E, N, K] int64, as raw bits."""
    raw = weight.codes.view(torch.uint8).long()
    raw = raw.reshape(-1, *raw.shape[-2:])
    if weight.kind in ("int4", "nvfp4"):
        raw = torch.stack((raw & 15, raw >> 4), dim=-1).flatten(-2)
    return raw


@pytest.mark.parametrize(("capability", "version"), [(80, (3, 7)), (90, (3, 7)), (80, (3, 8))])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("name", ["int4-g32", "int4-g48", "int8-g32", "fp8-row", "nvfp4"])
def test_every_code_is_where_a_matmul_looks(
    name: str,
    gated: bool,
    capability: int,
    version: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("infilld.kernels._tiles.triton_version", lambda: version)
    weight = form(name, 2, 20)
    tiled = quant_pack(weight, gated=gated, capability=capability, impl="reference")
    assert tiled.layout.permuted == (
        capability == 90 or (version == (3, 8) and weight.kind != "nvfp4")
    )
    expected = codes_of(weight)
    places = [(e, n, k) for e in (0, 1) for n in range(20) for k in range(0, FORM_COLUMNS, 5)]
    assert all(code_at(tiled, *place) == expected[place] for place in places)


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("name", FORMS)
def test_both_implementations_agree(name: str, gated: bool, capability: int) -> None:
    pytest.importorskip("triton")
    weight = form(name, 2, 20)
    found, expected = (
        quant_pack(weight, gated=gated, capability=capability, impl=impl)
        for impl in ("gpu", "reference")
    )
    assert found.layout == expected.layout
    assert found.scale_dtype == expected.scale_dtype
    assert found.parts.keys() == expected.parts.keys()
    for part, tensor in expected.parts.items():
        assert found.parts[part].dtype == tensor.dtype
        assert torch.equal(found.parts[part], tensor), part


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no device to pack on")
def test_packs_on_the_device(tmp_path: Path) -> None:
    weight = form("nvfp4", 2, 24)
    found = run_gpu("quant_pack", [{"weight": weight, "capability": 90}], tmp_path)[0]
    expected = quant_pack(weight, capability=90, impl="reference")
    assert all(torch.equal(found.parts[name], part) for name, part in expected.parts.items())


class TestScales:
    """Scales keep their value, times powers of two."""

    def test_two_halves_share_a_word(self) -> None:
        weight = form("int4-g48", 16)
        tiled = quant_pack(weight, capability=80, impl="reference")
        assert (tiled.layout.half, tiled.layout.groups) == (16, 1)
        halves = tiled.scales.view(torch.bfloat16).view(16 // tiled.layout.block_n, 3, 16, 2)
        first, second = halves.float().unbind(-1)
        # Halves of 16 columns, groups of 48: the second tile ends one group and begins the next.
        groups = weight.scales.float().T
        assert torch.equal(first[0], groups[[0, 0, 1]] * 2.0**120)
        assert torch.equal(second[0], groups[[0, 1, 1]] * 2.0**116)

    def test_groups_of_a_half_follow_one_another(self) -> None:
        weight = form("int8-g32", 16)
        tiled = quant_pack(weight, capability=80, impl="reference")
        assert (tiled.layout.half, tiled.layout.groups) == (64, 2)
        words = tiled.scales.view(torch.bfloat16).view(16, 2, 2).float()
        scales = weight.scales.float() * 2.0**120
        assert torch.equal(words[:, :, 0], scales[:, :2])
        assert torch.equal(words[:, 0, 1], scales[:, 2])

    @pytest.mark.parametrize("name", ["int4-g32-half", "int4-g32-wide"])
    def test_wider_scales_are_as_they_were(self, name: str) -> None:
        weight = form(name, 16)
        tiled = quant_pack(weight, capability=80, impl="reference")
        words = tiled.scales.view(weight.scales.dtype).view(16, 2, 2)
        assert torch.equal(words[:, :, 0], weight.scales[:, :2])

    def test_one_scale_a_row_stands_apart(self) -> None:
        weight = form("fp8-row", 3, 16)
        tiled = quant_pack(weight, capability=80, impl="reference")
        assert torch.equal(tiled.scales.view(3, 16), weight.scales[..., 0])

    def test_e4m3_scales_are_bytes_with_more_exponents(self) -> None:
        weight = form("nvfp4", 16)
        tiled = quant_pack(weight, capability=80, impl="reference")
        found = tiled.scales.view(torch.uint8).view(16, 8)
        exponent, mantissa = found[:, :6].int() >> 3, found[:, :6].int() & 7
        values = torch.ldexp(1 + mantissa / 8, exponent - 22)
        assert torch.equal(values, weight.scales.float())
        assert weight.factor is not None
        assert torch.equal(tiled.factor, weight.factor.view(1))


@pytest.mark.parametrize("shape", [(704, 2816), (2816, 704), (2112, 128)], ids=str)
def test_real_shapes_fill_their_tiles(shape: tuple[int, int]) -> None:
    rows, columns = shape
    weight = random_weight((1, *shape), kind="int4", group=64)
    tiled = quant_pack(weight, capability=90, impl="gpu")
    assert tiled.codes.shape[1:3] == (-(-rows // 128), -(-columns // 128))
    assert tiled.nbytes <= weight.nbytes * 1.1 + 4
    places = [(0, rows - 1, columns - 1), (0, rows // 2, columns // 3), (0, 0, 0)]
    expected = codes_of(weight)
    assert all(code_at(tiled, *place) == expected[place] for place in places)


def test_keeps_what_it_says_of_itself() -> None:
    weight = form("int4-g32-affine", 2, 16)
    tiled = quant_pack(weight, capability=80, impl="reference")
    assert (tiled.kind, tiled.shape, tiled.group) == ("int4", (2, 16, FORM_COLUMNS), 32)
    assert tiled.device == torch.device("cpu")
    assert tiled.to("cpu").parts.keys() == {"codes", "scales", "biases", "factor"}


def test_arguments_are_not_changed() -> None:
    weight = form("int8-g32", 16)
    before = dequantize(weight, impl="reference")
    quant_pack(weight, impl="reference")
    assert torch.equal(dequantize(weight, impl="reference"), before)


def test_refuses_a_gated_weight_with_odd_rows() -> None:
    with pytest.raises(ValueError, match="15 rows are not gates"):
        quant_pack(form("int4-g32", 15), gated=True, impl="reference")


def test_refuses_groups_that_fit_no_tile() -> None:
    weight = random_weight((4, 96), kind="int4", group=24)
    with pytest.raises(ValueError, match="groups of 24: expected a multiple of 16"):
        quant_pack(weight, impl="reference")


@pytest.mark.parametrize("scale", [256.0, float("nan"), float("-inf")])
def test_refuses_scales_that_overflow(scale: float) -> None:
    weight = form("int4-g32", 4)
    weight.scales[1, 2] = scale
    with pytest.raises(ValueError, match="a scale is NaN, too large or negative"):
        quant_pack(weight, impl="reference")


def test_every_e4m3_scale_has_a_byte_of_its_own() -> None:
    scales = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = e5m3(scales).int()
    assert found[0] == 0
    values = torch.ldexp(1 + (found & 7) / 8, (found >> 3) - 22)
    assert torch.equal(values[1:], scales.float()[1:])


def test_a_scale_of_zero_takes_its_codes_along() -> None:
    weight = form("nvfp4", 2)
    weight.scales[0, 1] = 0.0
    tiled = quant_pack(weight, capability=80, impl="reference")
    codes = [code_at(tiled, 0, 0, column) for column in range(48)]
    assert codes[16:32] == [0] * 16
    assert any(codes[:16])
    assert any(codes[32:])


def test_refuses_negative_scales_of_nvfp4() -> None:
    weight = form("nvfp4", 2)
    weight.scales[0, 1] = -1.0
    with pytest.raises(ValueError, match="negative where it may not be"):
        quant_pack(weight, impl="reference")


def test_refuses_codes_that_are_no_numbers() -> None:
    weight = form("fp8-row", 4)
    codes = weight.codes.view(torch.uint8).clone()
    codes[0, 3] = 0x7F
    with pytest.raises(ValueError, match="a code is NaN"):
        quant_pack(replace(weight, codes=codes.view(torch.float8_e4m3fn)), impl="reference")


def test_refuses_more_dimensions() -> None:
    with pytest.raises(ValueError, match=r"\[1, 1, 16, 96\], expected \[N, K\]"):
        quant_pack(form("int4-g32", 1, 1, 16), impl="reference")


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="impl='cpu'"):
        quant_pack(form("int4-g32", 4), impl="cpu")  # type: ignore[arg-type]
