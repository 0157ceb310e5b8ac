import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import check_fits, is_pinned
from few_bits import FORM_COLUMNS, FORMS, form, product_error, rounding_error
from interpreter import run_gpu
from matmuls import compile_matmul
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.dequantize import dequantize
from infilld.kernels.expert_down import expert_down
from infilld.kernels.quant_pack import quant_pack
from infilld.kernels.route import Routes, route

EXPERTS, WIDTH = 5, 20
Weight = Tensor | QuantizedWeight


def routes_of(tokens: int, chosen: int = 2, *, favourite: float = 0.0) -> Routes:
    """Routes of random scores and scales; one expert may be everyone's favourite."""
    draw = torch.Generator().manual_seed(tokens)
    scores = torch.randn(tokens, EXPERTS, generator=draw)
    scores[:, 1] += favourite
    scale = 0.5 + torch.rand(EXPERTS, generator=draw)
    return route(scores, scale, chosen=chosen, impl="reference")


def hidden_of(
    routes: Routes, dtype: torch.dtype = torch.bfloat16, columns: int = FORM_COLUMNS
) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(len(routes.order), columns, generator=draw).to(dtype)


def plain(dtype: torch.dtype, columns: int = FORM_COLUMNS) -> Tensor:
    weight = torch.randn(EXPERTS, WIDTH, columns, generator=torch.Generator().manual_seed(3))
    return (weight * columns**-0.5).to(dtype)


def by_hand(hidden: Tensor, weight: Tensor, routes: Routes) -> tuple[Tensor, Tensor]:
    """Every route by itself in float64, and how far rounded weights may put it."""
    rows, errors = [], []
    for row, number in zip(hidden, routes.order.tolist(), strict=True):
        token, place = divmod(number, routes.ids.shape[1])
        matrix = weight[routes.ids[token, place]]
        share = routes.weights[token, place].double()
        rows.append(matrix.double() @ row.double() * share)
        errors.append(product_error(row[None], matrix)[0] * share)
    return torch.stack(rows), torch.stack(errors)


class TestReference:
    """The definition has the properties its docstring promises."""

    def test_each_route_by_itself(self) -> None:
        routes, weight = routes_of(9), form("int8-g32", EXPERTS, WIDTH)
        hidden = hidden_of(routes, torch.float64)
        values = dequantize(weight, dtype=torch.float64, impl="reference")
        found = expert_down(hidden, weight, routes, impl="reference")
        torch.testing.assert_close(found, by_hand(hidden, values, routes)[0])

    def test_a_token_is_the_sum_of_its_rows(self) -> None:
        routes, weight = routes_of(6, 3), plain(torch.float64)
        hidden = hidden_of(routes, torch.float64)
        rows = expert_down(hidden, weight, routes, impl="reference")
        total = rows[routes.place.long()].view(6, 3, WIDTH).sum(1)
        expected = torch.zeros(6, WIDTH, dtype=torch.float64)
        for token in range(6):
            for place in range(3):
                row = hidden[routes.place[3 * token + place]]
                share = routes.weights[token, place].double()
                expected[token] += share * (weight[routes.ids[token, place]] @ row)
        torch.testing.assert_close(total, expected)

    def test_no_tokens(self) -> None:
        routes = routes_of(0)
        found = expert_down(hidden_of(routes), plain(torch.bfloat16), routes, impl="reference")
        assert found.shape == (0, WIDTH)


def test_refuses_another_number_of_rows() -> None:
    routes = routes_of(4)
    with pytest.raises(ValueError, match=r"hidden is \[7, 96\], expected \[8, 96\]"):
        expert_down(hidden_of(routes)[1:], plain(torch.bfloat16), routes, impl="reference")


def test_refuses_one_matrix() -> None:
    routes = routes_of(3)
    with pytest.raises(ValueError, match=r"expected \[E, D, F\]"):
        expert_down(hidden_of(routes), form("int4-g32", 24), routes, impl="reference")


def test_refuses_the_wrong_form() -> None:
    pytest.importorskip("triton")
    routes, weight = routes_of(3), form("int4-g32", EXPERTS, WIDTH)
    with pytest.raises(ValueError, match="the GPU reads weights in tiles"):
        expert_down(hidden_of(routes), weight, routes, impl="gpu")
    tiles = quant_pack(weight, gated=True, impl="gpu")
    with pytest.raises(ValueError, match="pack without gated"):
        expert_down(hidden_of(routes), tiles, routes, impl="gpu")
    with pytest.raises(ValueError, match="by rows, not in tiles"):
        expert_down(hidden_of(routes), tiles, routes, impl="reference")


def test_refuses_an_unknown_implementation() -> None:
    routes = routes_of(3)
    with pytest.raises(ValueError, match="impl='cpu'"):
        expert_down(
            hidden_of(routes),
            plain(torch.bfloat16),
            routes,
            impl="cpu",  # type: ignore[arg-type]
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors could be moved")
def test_gpu_refuses_cpu_tensors() -> None:
    pytest.importorskip("triton")
    routes = routes_of(3)
    with pytest.raises(KernelUnavailable, match="needs a CUDA device"):
        expert_down(hidden_of(routes), plain(torch.bfloat16), routes, impl="gpu")


def _cases() -> dict[str, tuple[Tensor, Weight, Routes, int]]:
    """Name: hidden rows, weight, routes, compute capability of the tiles."""
    few = routes_of(3)
    cases: dict[str, tuple[Tensor, Weight, Routes, int]] = {
        name: (hidden_of(few), form(name, EXPERTS, WIDTH), few, 80)
        for name in FORMS
        if not name.startswith("int4") or "g32" in name
    }
    weight = form("int4-g32", EXPERTS, WIDTH)
    cases["int4-g32-sm90"] = (hidden_of(few), weight, few, 90)
    for tokens in (0, 1, 17, 70):
        routes = routes_of(tokens, favourite=9.0)
        cases[f"{tokens}-tokens"] = (hidden_of(routes), weight, routes, 90)
    wide = form("int4-g32", EXPERTS, 130)
    cases["two-tiles-of-rows"] = (hidden_of(few), wide, few, 80)
    for dtype in (torch.bfloat16, torch.float32):
        cases[f"plain-{dtype}"] = (hidden_of(few, dtype, 41), plain(dtype, 41), few, 80)
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    calls = [
        {
            "hidden": hidden,
            "weight": weight
            if isinstance(weight, Tensor)
            else quant_pack(weight, capability=capability, impl="gpu"),
            "routes": routes,
        }
        for hidden, weight, routes, capability in CASES.values()
    ]
    found = run_gpu("expert_down", calls, tmp_path_factory.mktemp("expert_down"))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_is_as_near_as_its_numbers_allow(name: str, gpu_results: dict[str, Any]) -> None:
    hidden, weight, routes, _ = CASES[name]
    found = gpu_results[name]
    assert not isinstance(found, Exception), found
    assert found.dtype == hidden.dtype
    if not len(hidden):
        assert found.shape == (0, weight.shape[1])
        return
    values = weight if isinstance(weight, Tensor) else dequantize(weight, impl="reference")
    exact, error = by_hand(hidden, values, routes)
    allowed = error + rounding_error(exact, hidden.dtype)
    assert ((found.double() - exact).abs() <= allowed).all()


# Form, compute capability, rows: registers and lane-instructions a weight of the loop over K,
# seen with Triton 3.7.1. K is 704, which fills five and a half tiles.
FIGURES: dict[str, tuple[dict[str, Any], int, int, int, float]] = {
    "int4-sm80": ({"kind": "int4", "group": 64}, 80, 16, 127, 2.55),
    "int4-sm90": ({"kind": "int4", "group": 64}, 90, 16, 107, 2.2),
    "int4-sm90-64": ({"kind": "int4", "group": 64}, 90, 64, 181, 2.3),
    "int4-g32-sm90": ({"kind": "int4", "group": 32}, 90, 16, 112, 2.35),
    "int4-g32-sm120": ({"kind": "int4", "group": 32}, 120, 16, 122, 2.55),
    "int4-affine-sm90": ({"kind": "int4", "group": 64, "affine": True}, 90, 16, 125, 2.3),
    "int8-g64-sm90": ({"kind": "int8", "group": 64}, 90, 16, 112, 2.4),
    "int8-row-sm89": ({"kind": "int8", "group": 0}, 89, 16, 80, 2.5),
    "fp8-sm80": ({"kind": "fp8", "group": 0}, 80, 16, 124, 3.6),
    "fp8-sm90": ({"kind": "fp8", "group": 0}, 90, 16, 116, 3.2),
    "nvfp4-sm80": ({"kind": "nvfp4", "group": 16}, 80, 16, 124, 4.4),
    "nvfp4-sm90": ({"kind": "nvfp4", "group": 16}, 90, 16, 128, 3.9),
    "half-sm90": ({"kind": "int4", "group": 64, "dtype": torch.float16}, 90, 16, 115, 3.6),
    "plain-sm90": ({}, 90, 16, 64, 1.7),
}


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("name", FIGURES)
def test_compiles_to_few_instructions(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    kind, capability, block_t, registers, per_weight = FIGURES[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        loop = compile_matmul("down", capability, block_t=block_t, columns=704, **kind)
    check_fits(loop.compiled, capability, registers=int(registers * 1.1))
    if is_pinned():
        assert loop.per_weight <= per_weight * 1.04, loop.per_weight
    assert loop.count("I2F") == loop.count("F2F.") == 0
    assert loop.count("HGMMA" if capability == 90 else "HMMA") > 0
