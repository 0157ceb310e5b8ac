import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import CAPABILITIES, check_fits, compile_kernel
from interpreter import run_gpu
from tolerances import assert_close
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable
from infilld.kernels.belief import belief

NAN = float("nan")


def make(
    tokens: int,
    kept: int,
    width: int,
    *,
    vocab: int = 50,
    mass: float = 0.9,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(tokens * kept + width)
    embedding = torch.randn(vocab, width, generator=draw).to(dtype)
    shares = torch.rand(tokens, kept, generator=draw)
    return {
        "ids": torch.randint(vocab, (tokens, kept), generator=draw),
        "probabilities": shares / shares.sum(-1, keepdim=True) * mass,
        "embedding": embedding,
        "mean": embedding.float().mean(0).to(dtype),
    }


def run(**call: Any) -> Tensor:
    return belief(**call, impl="reference")


def exact(call: dict[str, Any]) -> Tensor:
    """The same in float64, with the whole distribution written out."""
    embedding = call["embedding"].double()
    rest = (1 - call["probabilities"].double().sum(-1)).clamp(min=0)
    shares = torch.zeros(len(call["ids"]), len(embedding), dtype=torch.float64)
    shares.scatter_add_(1, call["ids"], call["probabilities"].double())
    out: Tensor = shares @ embedding + rest[:, None] * call["mean"].double()
    return out


class TestReference:
    """The definition has the properties its docstring promises."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_is_the_expected_row(self, dtype: torch.dtype) -> None:
        call = make(7, 5, 33, dtype=dtype)
        found = run(**call)
        assert_close(found, exact(call).to(dtype), exact(call))

    def test_all_tokens_give_the_whole_expectation(self) -> None:
        call = make(1, 1, 16)
        logits = torch.randn(3, 50)
        share, ids = logits.softmax(-1).topk(50, dim=-1)
        found = run(**call | {"ids": ids, "probabilities": share})
        torch.testing.assert_close(found, logits.softmax(-1) @ call["embedding"])

    def test_the_rest_is_spread_evenly(self) -> None:
        call = make(2, 3, 16)
        call["probabilities"] = torch.zeros(2, 3)
        torch.testing.assert_close(run(**call), call["embedding"].mean(0).expand(2, -1))

    def test_more_than_one_leaves_no_rest(self) -> None:
        call = make(1, 1, 16, mass=1.5)
        expected = call["embedding"][call["ids"][0]] * 1.5
        torch.testing.assert_close(run(**call), expected)

    def test_the_order_of_the_tokens_does_not_matter(self) -> None:
        call = make(4, 6, 16)
        turned = call | {name: call[name].flip(-1) for name in ("ids", "probabilities")}
        torch.testing.assert_close(run(**turned), run(**call))

    def test_nan_stays_in_its_row(self) -> None:
        call = make(3, 4, 16)
        call["probabilities"][1, 2] = NAN
        found = run(**call)
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()

    def test_many_rows_are_gathered_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        call = make(11, 4, 16)
        whole = run(**call)
        monkeypatch.setattr("infilld.kernels.reference.belief.LARGEST_GATHER", 3 * 4 * 16)
        assert torch.equal(run(**call), whole)

    def test_no_tokens(self) -> None:
        assert run(**make(0, 4, 16)).shape == (0, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": torch.zeros(2, 3, dtype=torch.int32)}, "ids are torch.int32"),
        ({"probabilities": torch.zeros(2, 4)}, r"expected float32 \[T, k\] = \[2, 3\]"),
        ({"probabilities": torch.zeros(2, 3).double()}, "probabilities are torch.float64"),
        ({"embedding": torch.zeros(50, 16).double()}, "embedding is torch.float64"),
        ({"embedding": torch.zeros(16, 50).T}, r"embedding has strides \(1, 50\)"),
        ({"mean": torch.zeros(17)}, r"expected floating point \[D\] = \[16\]"),
        ({"mean": torch.zeros(16, device="meta")}, "mean is on meta"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**make(2, 3, 16) | changes)


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="impl='cpu'"):
        belief(**make(2, 3, 16), impl="cpu")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors could be moved")
def test_gpu_refuses_cpu_tensors() -> None:
    with pytest.raises(KernelUnavailable, match="needs a CUDA device"):
        belief(**make(2, 3, 16), impl="gpu")


def _cases() -> dict[str, dict[str, Any]]:
    cases = {
        f"{tokens}x{kept}x{width}-{str(dtype)[6:]}": make(tokens, kept, width, dtype=dtype)
        for tokens, kept, width, dtype in [
            (1, 1, 1, torch.float32),
            (5, 3, 33, torch.float32),
            (3, 8, 512, torch.bfloat16),
            (2, 17, 700, torch.bfloat16),
            (2, 64, 40, torch.float16),
        ]
    }
    cases["more-than-one"] = make(2, 4, 40, mass=1.5)
    cases["no-tokens"] = make(0, 4, 16)
    cases["no-probability"] = make(3, 4, 16, mass=0.0)
    strided = make(4, 8, 40)
    cases["strided"] = strided | {
        "ids": strided["ids"][:, ::2],
        "probabilities": strided["probabilities"][:, ::2],
        # Every second row, and none of the padding behind a row.
        "embedding": torch.cat((torch.randn(100, 40), torch.full((100, 9), NAN)), 1)[::2, :40],
        "mean": torch.randn(80)[::2],
    }
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    spoilt = make(3, 4, 16)
    spoilt["probabilities"][1, 2] = NAN
    calls = CASES | {"nan": spoilt}
    folder = tmp_path_factory.mktemp("belief")
    return dict(zip(calls, run_gpu("belief", list(calls.values()), folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_is_as_close_as_the_reference(name: str, gpu_results: dict[str, Any]) -> None:
    expected = run(**CASES[name])
    found = gpu_results[name]
    assert not isinstance(found, Exception), found
    assert_close(found, expected, exact(CASES[name]), roundings=3)


@pytest.mark.slow
def test_gpu_keeps_nan_in_its_row(gpu_results: dict[str, Any]) -> None:
    found = gpu_results["nan"]
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu.belief import belief_kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        compiled = compile_kernel(
            belief_kernel,
            {
                "ids_ptr": "*i64",
                "probabilities_ptr": "*fp32",
                "embedding_ptr": "*bf16",
                "mean_ptr": "*bf16",
                "out_ptr": "*bf16",
                "D": "i32",
                "k": "i32",
                "stride_v": "i32",
                "BLOCK_D": "constexpr",
                "BLOCK_K": "constexpr",
            },
            {"BLOCK_D": 512, "BLOCK_K": 8},
            capability=capability,
            warps=4,
            aligned=("embedding_ptr", "mean_ptr", "out_ptr", "D", "stride_v"),
        )
    check_fits(compiled, capability, registers=53)
    assert "ld.global.v4" in compiled.ptx  # rows are read 16 bytes at a time
