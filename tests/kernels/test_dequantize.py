import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import check_fits, compile_kernel
from few_bits import FORM_COLUMNS, FORMS, form, random_weight
from interpreter import run_gpu
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable
from infilld.kernels._weights import Kind, QuantizedWeight
from infilld.kernels.dequantize import dequantize


def one(
    kind: Kind, code: int, *, scale: float = 1.0, bias: float | None = None, factor: float = 1.0
) -> float:
    """The value of one code."""
    columns = 16
    if kind in ("int4", "nvfp4"):
        codes = torch.full((1, columns // 2), code * 17, dtype=torch.uint8)
    else:
        codes = torch.full((1, columns), code, dtype=torch.uint8)
        codes = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    dtype = torch.float8_e4m3fn if kind == "nvfp4" else torch.float32
    weight = QuantizedWeight(
        kind=kind,
        codes=codes,
        scales=torch.full((1, 1), scale).to(dtype),
        biases=None if bias is None else torch.full((1, 1), bias),
        factor=torch.tensor(factor),
        group=columns,
    )
    values = dequantize(weight, impl="reference")
    assert (values == values[0, 0]).all()
    return float(values[0, 0])


class TestReference:
    """The definition has the properties its docstring promises."""

    def test_int4_is_around_eight(self) -> None:
        assert [one("int4", code) for code in (0, 7, 8, 15)] == [-8.0, -1.0, 0.0, 7.0]

    def test_int4_with_a_bias_starts_at_zero(self) -> None:
        assert [one("int4", code, scale=0.5, bias=-1.0) for code in (0, 2, 15)] == [-1.0, 0.0, 6.5]

    def test_int8_has_a_sign_with_and_without_bias(self) -> None:
        assert [one("int8", code) for code in (0, 127, 128, 255)] == [0.0, 127.0, -128.0, -1.0]
        assert one("int8", 255, scale=2.0, bias=0.5) == -1.5

    def test_e2m1(self) -> None:
        values = [one("nvfp4", code) for code in range(16)]
        assert values[:8] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        assert values[8:] == [-value for value in values[:8]]

    def test_e4m3(self) -> None:
        assert [one("fp8", code) for code in (0x38, 0x7E, 0x01, 0xB8)] == [1.0, 448.0, 2**-9, -1.0]

    def test_scale_bias_and_factor(self) -> None:
        assert one("int4", 5, scale=0.25, bias=1.0, factor=2.0) == 2.0 * (0.25 * 5 + 1.0)

    def test_low_nibbles_are_even_columns_and_groups_are_consecutive(self) -> None:
        weight = QuantizedWeight(
            kind="int4",
            codes=torch.tensor([[0x98, 0xA9, 0x98, 0xA9]], dtype=torch.uint8),
            scales=torch.tensor([[1.0, 10.0]]),
            group=4,
        )
        expected = [[0.0, 1.0, 1.0, 2.0, 0.0, 10.0, 10.0, 20.0]]
        assert dequantize(weight, impl="reference").tolist() == expected

    @pytest.mark.parametrize("name", FORMS)
    def test_experts_are_independent(self, name: str) -> None:
        weight = form(name, 3, 5)
        alone = QuantizedWeight(
            kind=weight.kind,
            group=weight.group,
            **{key: part[1] for key, part in weight.parts.items()},
        )
        whole = dequantize(weight, impl="reference")
        assert whole.shape == weight.shape == (3, 5, FORM_COLUMNS)
        assert torch.equal(whole[1], dequantize(alone, impl="reference"))

    def test_is_rounded_once(self) -> None:
        weight = form("int4-g32-affine", 4)
        exact = dequantize(weight, dtype=torch.float64, impl="reference")
        found = dequantize(weight, dtype=torch.bfloat16, impl="reference")
        assert torch.equal(found, exact.float().bfloat16())


def test_refuses_another_type() -> None:
    with pytest.raises(ValueError, match=r"torch.int8: expected one of"):
        dequantize(form("int4-g32", 4), dtype=torch.int8, impl="reference")


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="impl='cpu'"):
        dequantize(form("int4-g32", 4), impl="cpu")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors could be moved")
def test_gpu_refuses_cpu_tensors() -> None:
    pytest.importorskip("triton")
    with pytest.raises(KernelUnavailable, match="needs a CUDA device"):
        dequantize(form("int4-g32", 4), impl="gpu")


def _cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {
        f"{name}-{str(dtype).removeprefix('torch.')}": {"weight": form(name, 2, 3), "dtype": dtype}
        for name in FORMS
        for dtype in ((torch.float32, torch.bfloat16) if "g32" in name else (torch.float32,))
    }
    cases["one-row"] = {"weight": form("int8-row", 1), "dtype": torch.float32}
    cases["no-rows"] = {"weight": form("int4-g32", 0), "dtype": torch.float32}
    long = random_weight((3, 272), kind="nvfp4", group=16)
    cases["long"] = {"weight": long, "dtype": torch.float32}
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("dequantize")
    return dict(zip(CASES, run_gpu("dequantize", list(CASES.values()), folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_gives_the_same_values(name: str, gpu_results: dict[str, Any]) -> None:
    found = gpu_results[name]
    assert not isinstance(found, Exception), found
    expected = dequantize(**CASES[name], impl="reference")
    assert found.dtype == expected.dtype
    if CASES[name]["weight"].biases is None and CASES[name]["weight"].factor is None:
        assert torch.equal(found, expected)
    else:
        # A GPU may round scale * code + bias once.
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_compiles_without_spills(capability: int, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu.dequantize import BLOCK_K, BLOCK_N, dequantize_kernel

    pointers = {"codes_ptr": "*u8", "scales_ptr": "*bf16" if kind == "int4" else "*u8"}
    pointers |= {"biases_ptr": pointers["scales_ptr"], "factor_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = {
        "KIND": kind,
        "AFFINE": kind == "int4",
        "FACTOR": True,
        "ROW_FACTOR": True,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "INTERPRET": False,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        compiled = compile_kernel(
            dequantize_kernel,
            pointers
            | dict.fromkeys(("ROWS", "N", "K", "G"), "i32")
            | dict.fromkeys(constants, "constexpr"),
            constants,
            capability=capability,
            warps=4,
            aligned=(*pointers, "K", "G"),
        )
    check_fits(compiled, capability, registers=96)


# The PTX cannot run here; it can be read. Every instruction it uses, on Python's integers.


def bf16(bits: int) -> float:
    return float(torch.tensor([bits << 16], dtype=torch.int64).to(torch.int32).view(torch.float32))


def bf16_bits(value: float) -> int:
    """Bits of a float64 that float32 holds, rounded once to bfloat16."""
    bits = int(torch.tensor([value], dtype=torch.float32).bfloat16().view(torch.int16))
    return bits & 0xFFFF


def run_ptx(text: str, operands: dict[str, int]) -> dict[str, int]:
    """Registers after the instructions."""
    registers = dict(operands)

    def value(name: str) -> int:
        return int(name, 0) if name[0].isdigit() else registers[name]

    for line in re.split(r"[;\n]", text.strip("{} \n")):
        if not line.strip() or ".reg" in line:
            continue
        name, rest = line.strip().split(" ", 1)
        if rest.startswith("{"):
            *targets, source = re.findall(r"[$\w]+", rest)
            for i, target in enumerate(targets):
                registers[target] = value(source) >> 16 * i & 0xFFFF
            continue
        target, *sources = (part.strip() for part in rest.split(","))
        a, *others = (value(source) for source in sources)
        if name == "mov.b32":
            out = a
        elif name == "and.b32":
            out = a & others[0]
        elif name == "shr.u32":
            out = a >> others[0]
        elif name == "shl.b32":
            out = a << others[0] & 0xFFFFFFFF
        elif name == "lop3.b32":
            assert others[2] == 0xEA
            out = a & others[0] | others[1]
        elif name == "prmt.b32":
            both = a | others[0] << 32
            out = sum((both >> 8 * (others[1] >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        else:
            assert name == "fma.rn.bf16x2"
            halves = [[bf16(x >> 16 * i & 0xFFFF) for x in (a, *others)] for i in (0, 1)]
            out = sum(bf16_bits(x * y + z) << 16 * i for i, (x, y, z) in enumerate(halves))
        registers[target] = out
    return registers


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_ptx_takes_a_scale_in_two_parts(kind: Kind) -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu._dequant import decoder

    scale = float(torch.tensor(0.01234).half())
    bits = int(torch.tensor([64 * scale]).view(torch.int32)) >> 16
    rest = 64 * scale - bf16(bits)
    pairs = [bits * 0x10001, bf16_bits(rest) * 0x10001]
    assert bf16(bf16_bits(rest)) == rest
    assert rest
    results = 8 if kind == "int4" else 4
    operands = {f"${results + 1 + i}": pair for i, pair in enumerate(pairs * (results // 4))}
    text = decoder(kind, affine=False, scaling="split")
    for code in range(16 if kind == "int4" else 256):
        word = code * (0x11111111 if kind == "int4" else 0x01010101)
        registers = run_ptx(text, operands | {f"${results}": word})
        exact = scale * (code - (8 if kind == "int4" else 128))
        for i in range(results):
            assert abs(bf16(registers[f"${i}"]) - exact) <= abs(exact) * (2.0**-8 + 2.0**-14)


def decoded(kind: Kind, words: Tensor, *, affine: bool, scale: float | None, bias: float) -> Tensor:
    """Results of the decoder for each word, in the order of its codes [words, results]."""
    from infilld.kernels.gpu._dequant import BYTE_PAIRS, DOUBLE, NIBBLE_PAIRS, decoder

    results = 8 if kind in ("int4", "nvfp4") else 4
    scaled = scale is not None
    arguments: list[int] = []
    if scale is not None and kind != "nvfp4":
        high = 2.0**116 if kind == "int4" else 2.0**120
        word = bf16_bits(scale * 2.0**120) | bf16_bits(scale * high) << 16
        text = (NIBBLE_PAIRS if kind == "int4" else BYTE_PAIRS).value
        pairs = run_ptx(text, {"$4": word})
        arguments = [pairs[f"${i}"] for i in range(4)]
        if affine:
            doubled = run_ptx(DOUBLE.value, {"$2": word})
            biases = run_ptx(DOUBLE.value, {"$2": bf16_bits(bias * 2.0**-13) * 0x10001})
            arguments = [doubled["$0"], biases["$0"], doubled["$1"], biases["$1"]]
    elif scale is not None:
        arguments = [bf16_bits(scale * 2.0**118) * 0x10001] * 2
    text = decoder(kind, affine=affine, scaling="bf16" if scaled else "row")
    rows = []
    for word in words.tolist():
        operands = {f"${results}": word & 0xFFFFFFFF}
        operands |= {f"${results + 1 + i}": argument for i, argument in enumerate(arguments)}
        registers = run_ptx(text, operands)
        rows.append([bf16(registers[f"${i}"]) for i in range(results)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("scale", [None, 0.0123, 2.0**-20, 3.7])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8", "nvfp4"])
def test_ptx_decodes_every_code(kind: Kind, scale: float | None, affine: bool) -> None:
    pytest.importorskip("triton")
    if (affine and kind != "int4") or (kind == "fp8" and scale is not None):
        pytest.skip("there is no such form")
    if scale is not None:
        scale = bf16(bf16_bits(scale))
        if kind == "nvfp4":
            scale = float(torch.tensor(scale).to(torch.float8_e4m3fn).float())
    bias = bf16(bf16_bits(-1.5 * (scale or 0)))
    # Bytes of a word in the order of the codes they hold: 0, 2, 1, 3.
    codes = torch.arange(256)
    if kind == "fp8":
        codes = codes[(codes & 127) != 127]
        codes = torch.cat((codes, codes[:2]))
    words = (codes.view(-1, 4)[:, [0, 2, 1, 3]] << torch.tensor([0, 8, 16, 24])).sum(-1)
    found = decoded(kind, words, affine=affine, scale=scale, bias=bias)

    def values(plane: Tensor) -> Tensor:
        if kind == "int4":
            exact = plane.double() - (0 if affine else 8)
        elif kind == "int8":
            exact = plane.double() - 128
        elif kind == "fp8":
            exact = plane.to(torch.uint8).view(torch.float8_e4m3fn).double()
        else:
            table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
            exact = torch.cat((table, -table))[plane]
        if scale is None:
            return exact / 64 if kind in ("int4", "int8") else exact
        rounded = (exact * scale + (bias if affine else 0)).to(torch.float32).bfloat16()
        return rounded.double() * (2.0**-8 if kind == "nvfp4" else 2.0**-13)

    shape = codes.view(-1, 4)
    if kind in ("int4", "nvfp4"):
        expected = torch.cat((values(shape & 15), values(shape >> 4)), dim=-1)
    else:
        expected = values(shape)
    assert torch.equal(found, expected)
