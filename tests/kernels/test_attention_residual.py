import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import CAPABILITIES, check_fits, compile_kernel
from interpreter import run_gpu
from tolerances import assert_close
from torch import Tensor

from infilld.engine.layers import rms_norm
from infilld.kernels._launch import KernelUnavailable
from infilld.kernels.attention_residual import Attended, attention_residual

EPS = 1e-6


def make(
    *, tokens: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    names = ("after_weight", "dense_weight", "expert_weight", "router_scale")
    weights = {name: (1 + torch.randn(width, generator=draw) / 4).to(dtype) for name in names}
    return {
        "x": (torch.randn(tokens, width, generator=draw) * 3).to(dtype),
        "attended": (torch.randn(tokens, width, generator=draw) * 20).to(dtype),
        **weights,
        "eps": EPS,
    }


def widened(call: dict[str, Any]) -> dict[str, Any]:
    return {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in call.items()
    }


def run(call: dict[str, Any]) -> Attended:
    return attention_residual(**call, impl="reference")


def by_layers(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the engine's layers compute."""
    residual = call["x"] + rms_norm(call["attended"], call["after_weight"], EPS)
    return (
        residual,
        rms_norm(residual, call["dense_weight"], EPS),
        rms_norm(residual, call["expert_weight"], EPS),
        rms_norm(residual, None, EPS) * call["router_scale"] * residual.shape[1] ** -0.5,
    )


class TestReference:
    """The definition is what the layers compute."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 48), (3, 67)])
    def test_equals_the_layers(self, tokens: int, width: int, dtype: torch.dtype) -> None:
        call = make(tokens=tokens, width=width, dtype=dtype)
        for found, expected in zip(run(call), by_layers(call), strict=True):
            assert torch.equal(found, expected)

    def test_bfloat16_is_rounded_once(self) -> None:
        call = make(tokens=5, width=48, dtype=torch.bfloat16)
        wide = {n: t.float() if isinstance(t, Tensor) else t for n, t in call.items()}
        for found, expected in zip(run(call), by_layers(wide), strict=True):
            assert torch.equal(found, expected.bfloat16())

    def test_rows_of_zeros_stay_zeros(self) -> None:
        call = make(tokens=2, width=8)
        found = run(call | {"x": torch.zeros(2, 8), "attended": torch.zeros(2, 8)})
        assert all((each == 0).all() for each in found)

    def test_arguments_are_not_changed(self) -> None:
        call = make(tokens=2, width=8)
        before = call["x"].clone()
        run(call)
        assert torch.equal(call["x"], before)

    def test_empty(self) -> None:
        assert [each.shape for each in run(make(tokens=0, width=8))] == [(0, 8)] * 4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0], r"x is \[8\], expected \[T, D\]"),
        ("x", lambda t: t.int(), "x is torch.int32"),
        ("attended", lambda t: t[1:], r"attended is \[1, 8\], expected \[2, 8\]"),
        ("attended", lambda t: t.bfloat16(), "attended is torch.bfloat16"),
        ("after_weight", lambda t: t[1:], r"after_weight is \[7\], expected \[8\]"),
        ("router_scale", lambda t: t.to("meta"), "router_scale is on meta, expected cpu"),
    ],
)
def test_refuses(name: str, change: Any, message: str) -> None:
    call = make(tokens=2, width=8)
    with pytest.raises(ValueError, match=message):
        run(call | {name: change(call[name])})


def test_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="expected 'gpu' or 'reference'"):
        attention_residual(**make(tokens=2, width=8), impl="cuda")  # type: ignore[arg-type]


BF16 = torch.bfloat16
CASES = {
    "one-number": make(tokens=1, width=1),
    "odd-width": make(tokens=3, width=67),
    "a-power-of-two": make(tokens=2, width=256),
    "bfloat16": make(tokens=5, width=96, dtype=BF16),
    "real-width": make(tokens=2, width=2816, dtype=BF16),
    "empty": make(tokens=0, width=8),
}
_WIDE = make(tokens=4, width=48)
CASES["strided"] = _WIDE | {
    name: torch.cat((_WIDE[name], torch.full((4, 5), float("nan"))), dim=1)[:, :48]
    for name in ("x", "attended")
}
CASES["transposed"] = _WIDE | {"attended": _WIDE["attended"].T.contiguous().T}


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("attention_residual")
    calls = CASES | {"float64": make(tokens=2, width=8, dtype=torch.float64)}
    return dict(
        zip(calls, run_gpu("attention_residual", list(calls.values()), folder), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_computes_as_the_reference(name: str, gpu_results: dict[str, Any]) -> None:
    call = CASES[name]
    assert not isinstance(gpu_results[name], Exception), gpu_results[name]
    lows, exacts = run(call), run(widened(call))
    for found, low, exact in zip(gpu_results[name], lows, exacts, strict=True):
        assert found.is_contiguous()
        assert_close(found, low, exact)


@pytest.mark.slow
def test_gpu_refuses_float64(gpu_results: dict[str, Any]) -> None:
    with pytest.raises(KernelUnavailable, match="attention_residual: float64"):
        raise gpu_results["float64"]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu._rows import row_warps
    from infilld.kernels.gpu.attention_residual import attention_residual_kernel

    pointers = (
        "x",
        "attended",
        "after_weight",
        "dense_weight",
        "expert_weight",
        "router_scale",
        "residual",
        "dense_in",
        "expert_in",
        "router_in",
    )
    strides = ("x_stride", "attended_stride")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        compiled = compile_kernel(
            attention_residual_kernel,
            {f"{name}_ptr": "*bf16" for name in pointers}
            | dict.fromkeys(strides, "i32")
            | dict.fromkeys(("eps", "root"), "fp32")
            | dict.fromkeys(("D", "BLOCK_D"), "constexpr"),
            {"D": 2816, "BLOCK_D": 4096},
            capability=capability,
            warps=row_warps(4096),
            aligned=(*(f"{name}_ptr" for name in pointers), *strides),
        )
    check_fits(compiled, capability, registers=39)
