import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import SHARED_LIMIT_BYTES, check_fits, is_pinned
from few_bits import (
    FORM_COLUMNS,
    FORMS,
    form,
    product_error,
    random_weight,
    rounding_error,
)
from interpreter import run_gpu
from matmuls import compile_matmul
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.dequantize import dequantize
from infilld.kernels.linear import linear
from infilld.kernels.quant_pack import quant_pack


def inputs(tokens: int, dtype: torch.dtype = torch.bfloat16, columns: int = FORM_COLUMNS) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


class TestReference:
    """The definition has the properties its docstring promises."""

    @pytest.mark.parametrize("name", FORMS)
    def test_is_a_product_with_the_values(self, name: str) -> None:
        x, weight = inputs(3, torch.float64), form(name, 7)
        values = dequantize(weight, dtype=torch.float64, impl="reference")
        found = linear(x, weight, impl="reference")
        torch.testing.assert_close(found, torch.einsum("tk,nk->tn", x, values))

    def test_is_rounded_once(self) -> None:
        x, weight = inputs(3), form("int4-g32", 7)
        wide = linear(x.float(), weight, impl="reference")
        assert torch.equal(linear(x, weight, impl="reference"), wide.bfloat16())

    def test_no_tokens(self) -> None:
        assert linear(inputs(0), form("int8-row", 7), impl="reference").shape == (0, 7)


def test_refuses_another_width() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 95\], expected \[2, 96\]"):
        linear(torch.zeros(2, 95), form("int4-g32", 4), impl="reference")


def test_refuses_experts() -> None:
    with pytest.raises(ValueError, match=r"\[2, 4, 96\], expected \[N, K\]"):
        linear(inputs(2), form("int4-g32", 2, 4), impl="reference")


def test_refuses_the_wrong_form() -> None:
    pytest.importorskip("triton")
    weight = form("int4-g32", 16)
    with pytest.raises(ValueError, match="the GPU reads weights in tiles"):
        linear(inputs(2), weight, impl="gpu")
    with pytest.raises(ValueError, match="by rows, not in tiles"):
        linear(inputs(2), quant_pack(weight, impl="reference"), impl="reference")
    with pytest.raises(ValueError, match="that is not gated"):
        linear(inputs(2), quant_pack(weight, gated=True, impl="reference"), impl="gpu")


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="impl='cpu'"):
        linear(inputs(2), form("int4-g32", 4), impl="cpu")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors could be moved")
def test_gpu_refuses_cpu_tensors() -> None:
    pytest.importorskip("triton")
    weight = quant_pack(form("int4-g32", 16), impl="reference")
    with pytest.raises(KernelUnavailable, match="needs a CUDA device"):
        linear(inputs(2), weight, impl="gpu")


def _cases() -> dict[str, tuple[Tensor, QuantizedWeight, int]]:
    """Name: x, weight, compute capability of the tiles."""
    cases = {
        f"{name}-sm{capability}": (inputs(3), form(name, 20), capability)
        for name in FORMS
        for capability in (80, 90)
    }
    cases |= {f"{name}-float32": (inputs(2, torch.float32), form(name, 20), 80) for name in FORMS}
    plain = form("int4-g32", 20)
    for tokens in (0, 1, 16, 17, 33, 65):
        cases[f"{tokens}-tokens"] = (inputs(tokens), plain, 90)
    cases["two-tiles"] = (inputs(2), form("int4-g32", 130), 80)
    cases["uneven-k"] = (
        inputs(2, columns=176),
        random_weight((20, 176), kind="nvfp4", group=16),
        80,
    )
    cases["k-of-one-step"] = (
        inputs(2, columns=16),
        random_weight((20, 16), kind="int4", group=16),
        80,
    )
    # Nine tiles along K, in two parts.
    cases["split"] = (inputs(3, columns=1056), random_weight((16, 1056), kind="int4", group=32), 80)
    cases["transposed"] = (inputs(FORM_COLUMNS).T[:5], plain, 80)
    cases["strided"] = (inputs(6)[::2], plain, 80)
    return cases


CASES = _cases()
NUMBERS = "float16"


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    calls = [
        {"x": x, "weight": quant_pack(weight, capability=capability, impl="gpu")}
        for x, weight, capability in CASES.values()
    ]
    half = {"x": inputs(2).half(), "weight": calls[0]["weight"]}
    found = run_gpu("linear", [*calls, half], tmp_path_factory.mktemp("linear"))
    return dict(zip([*CASES, NUMBERS], found, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_is_as_near_as_its_numbers_allow(name: str, gpu_results: dict[str, Any]) -> None:
    x, weight, _ = CASES[name]
    found = gpu_results[name]
    assert not isinstance(found, Exception), found
    exact = linear(x.double(), weight, impl="reference")
    values = dequantize(weight, impl="reference")
    has_row_scales = weight.biases is None and weight.group == weight.shape[-1]
    in_bf16 = not has_row_scales and (
        weight.scales.dtype == torch.bfloat16
        or (weight.scales.dtype == torch.float16 and weight.biases is None)
    )
    rounds = x.dtype == torch.bfloat16 or in_bf16
    allowed = rounding_error(exact, x.dtype) + product_error(x, values) * (1 if rounds else 2**-6)
    assert found.dtype == x.dtype
    assert found.shape == exact.shape
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.slow
def test_gpu_refuses_other_numbers(gpu_results: dict[str, Any]) -> None:
    with pytest.raises(KernelUnavailable, match=r"x is torch.float16, this kernel takes"):
        raise gpu_results[NUMBERS]


# Registers and lane-instructions a weight of the loop over K, seen with Triton 3.7.1.
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize(
    ("capability", "registers", "per_weight"),
    [(80, 127, 2.5), (89, 127, 2.45), (90, 109, 2.2), (120, 122, 2.45)],
)
def test_compiles_to_few_instructions(
    capability: int, registers: int, per_weight: float, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        loop = compile_matmul("linear", capability, block_t=16, kind="int4", group=64)
    check_fits(loop.compiled, capability, registers=int(registers * 1.1))
    if is_pinned():
        assert loop.compiled.shared_bytes <= SHARED_LIMIT_BYTES[capability] / 3
        assert loop.per_weight <= per_weight * 1.04, loop.per_weight
