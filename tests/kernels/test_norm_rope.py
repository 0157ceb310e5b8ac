import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import CAPABILITIES, check_fits, compile_kernel
from interpreter import run_gpu
from tolerances import assert_close
from torch import Tensor

from infilld.engine.config import Rope
from infilld.engine.layers import Rotation, rms_norm, rotate
from infilld.kernels._launch import KernelUnavailable
from infilld.kernels.norm_rope import norm_rope

EPS = 1e-6


def make(
    *,
    tokens: int,
    heads: int = 4,
    key_heads: int = 2,
    size: int = 16,
    values: bool = True,
    dtype: torch.dtype = torch.float32,
    table_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    width = (heads + (2 if values else 1) * key_heads) * size
    rotation = Rotation(Rope(theta=1e4, rotary_fraction=0.5), size)
    cosine, sine = rotation(torch.arange(7, 7 + tokens), table_dtype or dtype)
    return {
        "qkv": (torch.randn(tokens, width, generator=draw) * 5).to(dtype),
        "q_weight": (1 + torch.randn(size, generator=draw) / 4).to(dtype),
        "k_weight": (1 + torch.randn(size, generator=draw) / 4).to(dtype),
        "cosine": cosine,
        "sine": sine,
        "heads": heads,
        "key_heads": key_heads,
        "eps": EPS,
    }


def widened(call: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() if isinstance(t, Tensor) else t for name, t in call.items()}


def run(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return norm_rope(**call, impl="reference")


def by_layers(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """What the engine's layers compute, in their order of axes."""
    parts = call["qkv"].unflatten(1, (-1, len(call["q_weight"]))).transpose(0, 1)[None]
    heads, key_heads = call["heads"], call["key_heads"]
    rotary = (call["cosine"], call["sine"])
    keys = parts[:, heads : heads + key_heads]
    values = parts[:, heads + key_heads :] if parts.shape[1] > heads + key_heads else keys
    q = rotate(rms_norm(parts[:, :heads], call["q_weight"], EPS), rotary)
    k = rotate(rms_norm(keys, call["k_weight"], EPS), rotary)
    q, k, v = (each[0].transpose(0, 1) for each in (q, k, rms_norm(values, None, EPS)))
    return q, k, v


class TestReference:
    """The definition is what the layers compute."""

    @pytest.mark.parametrize("values", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize(("heads", "key_heads"), [(4, 2), (3, 1), (2, 2)])
    def test_equals_the_layers(
        self, heads: int, key_heads: int, dtype: torch.dtype, values: bool
    ) -> None:
        call = make(tokens=5, heads=heads, key_heads=key_heads, dtype=dtype, values=values)
        for found, expected in zip(run(call), by_layers(call), strict=True):
            assert found.is_contiguous()
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("tokens", [1, 13])
    def test_bfloat16_is_rounded_once(self, tokens: int) -> None:
        call = make(tokens=tokens, dtype=torch.bfloat16)
        wide = {n: t.float() if isinstance(t, Tensor) else t for n, t in call.items()}
        for found, expected in zip(run(call), by_layers(wide), strict=True):
            assert torch.equal(found, expected.bfloat16())

    def test_tables_may_be_wider(self) -> None:
        call = make(tokens=5, dtype=torch.bfloat16, table_dtype=torch.float32)
        assert run(call)[0].dtype == torch.bfloat16

    def test_norm_is_taken_before_the_turn(self) -> None:
        call = make(tokens=6)
        still = call | {
            "cosine": torch.ones_like(call["cosine"]),
            "sine": torch.zeros_like(call["sine"]),
        }
        assert torch.allclose(run(call)[2], run(still)[2])
        plain = call | {"q_weight": torch.ones(16), "k_weight": torch.ones(16)}
        for each in run(plain):
            assert torch.allclose(each.pow(2).mean(-1), torch.ones(1), atol=1e-4)

    def test_strided_rows(self) -> None:
        call = make(tokens=5)
        padded = torch.full((5, call["qkv"].shape[1] + 3), float("nan"))
        padded[:, : call["qkv"].shape[1]] = call["qkv"]
        strided = call | {"qkv": padded[:, : call["qkv"].shape[1]]}
        assert all(torch.equal(a, b) for a, b in zip(run(strided), run(call), strict=True))

    def test_empty(self) -> None:
        assert [each.shape for each in run(make(tokens=0))] == [(0, 4, 16), (0, 2, 16), (0, 2, 16)]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("heads", lambda _: 5, "heads=5 do not divide among key_heads=2"),
        ("qkv", lambda t: t[:, 1:], r"qkv is \[3, 127\], expected \[T, 128\]"),
        ("qkv", lambda t: t.long(), "qkv is torch.int64"),
        ("q_weight", lambda t: t[:15], r"q_weight is \[15\], expected \[A\] with an even A"),
        ("k_weight", lambda t: t[:14], r"k_weight is \[14\], expected \[16\]"),
        ("cosine", lambda t: t[1:], r"cosine is \[2, 16\], expected \[3, 16\]"),
        ("sine", lambda t: t.double(), "cosine is torch.float32, sine is torch.float64"),
    ],
)
def test_refuses(name: str, change: Any, message: str) -> None:
    call = make(tokens=3)
    with pytest.raises(ValueError, match=message):
        run(call | {name: change(call[name])})


def test_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="expected 'gpu' or 'reference'"):
        norm_rope(**make(tokens=3), impl="cuda")  # type: ignore[arg-type]


BF16 = torch.bfloat16
CASES = {
    "one-token": make(tokens=1),
    "no-values": make(tokens=5, values=False),
    "one-key-head": make(tokens=3, heads=3, key_heads=1, size=24),
    "bfloat16": make(tokens=4, dtype=BF16),
    "bfloat16-wide-tables": make(tokens=3, dtype=BF16, table_dtype=torch.float32),
    "smallest-head": make(tokens=2, heads=2, key_heads=2, size=2),
    "sliding": make(tokens=2, heads=16, key_heads=8, size=256, dtype=BF16),
    "full": make(tokens=2, heads=16, key_heads=2, size=512, values=False, dtype=BF16),
    "many-heads": make(tokens=2, heads=24, key_heads=12, size=128),
    "empty": make(tokens=0),
}
CASES["strided"] = make(tokens=5) | {
    "qkv": torch.cat((make(tokens=5)["qkv"], torch.full((5, 3), float("nan"))), dim=1)[:, :128]
}
CASES["transposed"] = make(tokens=5) | {"qkv": make(tokens=5)["qkv"].T.contiguous().T}


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("norm_rope")
    calls = CASES | {"float64": make(tokens=2, dtype=torch.float64)}
    return dict(zip(calls, run_gpu("norm_rope", list(calls.values()), folder), strict=True))


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
    with pytest.raises(KernelUnavailable, match="norm_rope: float64"):
        raise gpu_results["float64"]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("heads", "size", "values", "block"),
    [((16, 8), 256, True, (8, 128)), ((16, 2), 512, False, (4, 256))],
    ids=["sliding", "full"],
)
def test_compiles_without_spills(
    heads: tuple[int, int],
    size: int,
    values: bool,
    block: tuple[int, int],
    capability: int,
    tmp_path: Path,
) -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu.norm_rope import WARPS, norm_rope_kernel

    pointers = ("qkv", "q_weight", "k_weight", "cosine", "sine", "q", "k", "v")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        compiled = compile_kernel(
            norm_rope_kernel,
            {f"{name}_ptr": "*bf16" for name in pointers}
            | {"row_stride": "i32", "eps": "fp32"}
            | dict.fromkeys(("H", "K", "A", "VALUES", "BLOCK_H", "BLOCK_A"), "constexpr"),
            {
                "H": heads[0],
                "K": heads[1],
                "A": size,
                "VALUES": values,
                "BLOCK_H": block[0],
                "BLOCK_A": block[1],
            },
            capability=capability,
            warps=WARPS,
            aligned=(*(f"{name}_ptr" for name in pointers), "row_stride"),
        )
    check_fits(compiled, capability, registers=78)
