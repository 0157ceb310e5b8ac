import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import check_fits, is_pinned
from few_bits import FORM_COLUMNS, FORMS, form, product_error, random_weight, rounding_error
from interpreter import run_gpu
from matmuls import compile_matmul
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.dequantize import dequantize
from infilld.kernels.expert_gate_up import expert_gate_up
from infilld.kernels.quant_pack import quant_pack
from infilld.kernels.route import Routes, route

EXPERTS, HIDDEN = 5, 12
Weight = Tensor | QuantizedWeight


def routes_of(tokens: int, chosen: int = 2, *, favourite: float = 0.0) -> Routes:
    """Routes of random scores; one expert is everyone's favourite where that is large."""
    draw = torch.Generator().manual_seed(tokens)
    scores = torch.randn(tokens, EXPERTS, generator=draw)
    scores[:, 1] += favourite
    return route(scores, torch.ones(EXPERTS), chosen=chosen, impl="reference")


def inputs(tokens: int, dtype: torch.dtype = torch.bfloat16, columns: int = FORM_COLUMNS) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(2)).to(dtype)


def plain(dtype: torch.dtype, columns: int = FORM_COLUMNS) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(EXPERTS, 2 * HIDDEN, columns, generator=draw)
    return (weight * columns**-0.5).to(dtype)


def by_hand(x: Tensor, weight: Tensor, routes: Routes) -> Tensor:
    """Every route by itself, in float64."""
    rows = []
    for number in routes.order.tolist():
        token, place = divmod(number, routes.ids.shape[1])
        both = weight[routes.ids[token, place]].double() @ x[token].double()
        gate, up = both.chunk(2)
        rows.append(F.gelu(gate, approximate="tanh") * up)
    return torch.stack(rows)


class TestReference:
    """The definition has the properties its docstring promises."""

    def test_each_route_by_itself(self) -> None:
        x, weight, routes = inputs(9), form("int4-g32", EXPERTS, 2 * HIDDEN), routes_of(9)
        found = expert_gate_up(x.double(), weight, routes, impl="reference")
        values = dequantize(weight, dtype=torch.float64, impl="reference")
        torch.testing.assert_close(found, by_hand(x, values, routes))

    def test_plain_weights(self) -> None:
        x, weight, routes = inputs(4), plain(torch.bfloat16), routes_of(4)
        found = expert_gate_up(x, weight, routes, impl="reference")
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(
            found.double(), by_hand(x, weight, routes), rtol=2**-8, atol=1e-6
        )

    def test_no_tokens(self) -> None:
        found = expert_gate_up(inputs(0), plain(torch.bfloat16), routes_of(0), impl="reference")
        assert found.shape == (0, HIDDEN)

    def test_experts_without_rows_are_not_read(self) -> None:
        x, weight, routes = inputs(2, torch.float32), plain(torch.float32), routes_of(2)
        unused = [e for e in range(EXPERTS) if e not in routes.ids]
        weight[unused] = torch.nan
        assert unused
        assert expert_gate_up(x, weight, routes, impl="reference").isfinite().all()


def test_refuses_another_width() -> None:
    with pytest.raises(ValueError, match=r"x is \[3, 96\], expected \[4, 96\]"):
        expert_gate_up(inputs(3), plain(torch.bfloat16), routes_of(4), impl="reference")


def test_refuses_one_matrix() -> None:
    with pytest.raises(ValueError, match=r"expected \[E, 2 \* F, D\]"):
        expert_gate_up(inputs(3), form("int4-g32", 24), routes_of(3), impl="reference")


def test_refuses_the_wrong_form() -> None:
    pytest.importorskip("triton")
    weight = form("int4-g32", EXPERTS, 2 * HIDDEN)
    with pytest.raises(ValueError, match="the GPU reads weights in tiles"):
        expert_gate_up(inputs(3), weight, routes_of(3), impl="gpu")
    tiles = quant_pack(weight, impl="gpu")
    with pytest.raises(ValueError, match="pack with gated=True"):
        expert_gate_up(inputs(3), tiles, routes_of(3), impl="gpu")
    with pytest.raises(ValueError, match="by rows, not in tiles"):
        expert_gate_up(inputs(3), tiles, routes_of(3), impl="reference")


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="impl='cpu'"):
        expert_gate_up(
            inputs(3),
            plain(torch.bfloat16),
            routes_of(3),
            impl="cpu",  # type: ignore[arg-type]
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors could be moved")
def test_gpu_refuses_cpu_tensors() -> None:
    pytest.importorskip("triton")
    with pytest.raises(KernelUnavailable, match="needs a CUDA device"):
        expert_gate_up(inputs(3), plain(torch.bfloat16), routes_of(3), impl="gpu")


def _cases() -> dict[str, tuple[Tensor, Weight, Routes, int]]:
    """Name: x, weight, routes, compute capability of the tiles."""
    cases: dict[str, tuple[Tensor, Weight, Routes, int]] = {
        name: (inputs(3), form(name, EXPERTS, 2 * HIDDEN), routes_of(3), 80) for name in FORMS
    }
    cases |= {
        f"{name}-sm90": (inputs(3), form(name, EXPERTS, 2 * HIDDEN), routes_of(3), 90)
        for name in ("int4-g32", "int8-g32", "nvfp4")
    }
    weight = form("int4-g32", EXPERTS, 2 * HIDDEN)
    # Tiles of 1 to 64 rows, in every class; experts with several.
    for tokens in (0, 1, 17, 40, 70):
        cases[f"{tokens}-tokens"] = (
            inputs(tokens),
            weight,
            routes_of(tokens, favourite=9.0),
            80,
        )
    cases["three-tiles-of-rows"] = (
        inputs(2),
        form("int4-g32", EXPERTS, 2 * 70),
        routes_of(2),
        80,
    )
    for dtype in (torch.bfloat16, torch.float32):
        cases[f"plain-{dtype}"] = (inputs(20, dtype), plain(dtype), routes_of(20), 80)
        uneven = (inputs(2, dtype, 41), plain(dtype, 41), routes_of(2), 80)
        cases[f"plain-uneven-{dtype}"] = uneven
    cases["strided"] = (inputs(6)[::2], weight, routes_of(3), 80)
    return cases  # fmt: skip


CASES = _cases()


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    calls = [
        {
            "x": x,
            "weight": weight
            if isinstance(weight, Tensor)
            else quant_pack(weight, gated=True, capability=capability, impl="gpu"),
            "routes": routes,
        }
        for x, weight, routes, capability in CASES.values()
    ]
    found = run_gpu("expert_gate_up", calls, tmp_path_factory.mktemp("expert_gate_up"))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_is_as_near_as_its_numbers_allow(name: str, gpu_results: dict[str, Any]) -> None:
    x, weight, routes, _ = CASES[name]
    found = gpu_results[name]
    assert not isinstance(found, Exception), found
    assert found.dtype == x.dtype
    exact = expert_gate_up(x.double(), weight, routes, impl="reference")
    assert found.shape == exact.shape
    if not len(x):
        return
    values = weight if isinstance(weight, Tensor) else dequantize(weight, impl="reference")
    token = routes.order.long() // routes.ids.shape[1]
    expert = routes.ids.flatten()[routes.order.long()]
    rows = [
        (x[t, None].double() @ values[e].double().T, product_error(x[t, None], values[e]))
        for t, e in zip(token, expert, strict=True)
    ]
    gate, up = torch.cat([both for both, _ in rows]).chunk(2, dim=-1)
    gate_error, up_error = torch.cat([error for _, error in rows]).chunk(2, dim=-1)
    # The derivative of GELU stays below 1.13.
    allowed = 1.13 * gate_error * (up.abs() + up_error) + F.gelu(gate).abs() * up_error
    allowed = 1.01 * allowed + rounding_error(exact, x.dtype)
    assert ((found.double() - exact).abs() <= allowed).all()


# Registers and lane-instructions a weight of the loop over K, seen with Triton 3.7.1.
FIGURES = {
    (80, 16): (124, 2.45),
    (80, 32): (127, 3.25),
    (80, 64): (170, 5.15),
    (89, 16): (104, 2.45),
    (90, 16): (107, 2.15),
    (90, 64): (181, 2.2),
    (120, 16): (104, 2.4),
    (120, 64): (175, 4.6),
}


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize(("capability", "block_t"), FIGURES)
def test_compiles_to_few_instructions(capability: int, block_t: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    registers, per_weight = FIGURES[capability, block_t]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        loop = compile_matmul("gate_up", capability, block_t=block_t, kind="int4", group=64)
    check_fits(loop.compiled, capability, registers=int(registers * 1.1))
    if is_pinned():
        assert loop.per_weight <= per_weight * 1.04, loop.per_weight
    # Codes and scales are copied ahead, no number is converted one by one, and weights go from
    # registers to the product, past shared memory.
    assert loop.count("LDG.") == loop.count("I2F") == loop.count("STS") == 0
    assert loop.count("LDGSTS") > 0
    # One chain of products, with one wait at its end.
    assert loop.count("WARPGROUP.DEPBAR") == (1 if capability == 90 else 0)
    assert loop.count("HGMMA") == (16 if capability == 90 else 0)
    assert loop.count("HMMA") == (0 if capability == 90 else 2 * block_t)


def test_real_shape_is_even() -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu._grouped import constants

    weight = random_weight((1, 128, 2816), kind="int4", group=64)
    tiles = quant_pack(weight, gated=True, capability=90, impl="gpu")
    assert constants("gate_up", tiles, 128)["EVEN_K"]
