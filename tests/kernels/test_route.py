import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiling import CAPABILITIES, check_fits, compile_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import run_gpu
from torch import Tensor

from infilld.engine.layers import Router, rms_norm
from infilld.kernels._launch import KernelUnavailable
from infilld.kernels.route import Routes, route

INF, NAN = float("inf"), float("nan")


def make(scores: Tensor, chosen: int, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    scale = torch.rand(scores.shape[1], generator=draw) + 0.5
    return {"scores": scores, "per_expert_scale": scale, "chosen": chosen}


def random_scores(tokens: int, experts: int, seed: int) -> Tensor:
    """Scores with many equal ones, also at the border of the chosen."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=draw) * 3).round() / 2


def run(**call: Any) -> Routes:
    return route(**call, impl="reference")


def check(routes: Routes, tokens: int, experts: int, chosen: int) -> None:
    """What the lists promise, checked the slow way."""
    expert_of = routes.ids.flatten().tolist()
    expected = sorted(range(tokens * chosen), key=lambda r: (expert_of[r], r))
    assert routes.order.tolist() == expected
    assert [routes.order[i].item() for i in routes.place.tolist()] == list(range(len(expected)))
    assert routes.tiles.shape == (min(experts, len(expected)) + len(expected) // 64, 3)
    tiles = [tuple(tile) for tile in routes.tiles.tolist()]
    wanted = []
    sorted_experts = sorted(expert_of)
    for expert in sorted(set(expert_of)):
        first, left = sorted_experts.index(expert), sorted_experts.count(expert)
        while left:
            wanted.append((expert, first, min(64, left)))
            first, left = first + min(64, left), left - min(64, left)
    assert tiles == wanted + [(-1, 0, 0)] * (len(tiles) - len(wanted))


class TestReference:
    """The definition has the properties its docstring promises."""

    def test_equal_scores_go_to_the_lower_expert(self) -> None:
        scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, -0.0, 0.0, -0.0, -1.0]])
        assert run(**make(scores, 2)).ids.tolist() == [[1, 2], [0, 1]]

    def test_weights_are_shares_among_the_chosen_times_the_scale(self) -> None:
        call = make(torch.tensor([[0.0, 1.0, 3.0, 2.0]]), 2)
        share = torch.tensor([3.0, 2.0]).softmax(-1)
        torch.testing.assert_close(run(**call).weights[0], share * call["per_expert_scale"][2:])

    def test_is_what_the_model_routes_by(self) -> None:
        shape = SimpleNamespace(rms_eps=1e-6, width=24, experts=12, experts_per_token=3)
        router = Router(shape)  # type: ignore[arg-type]
        torch.nn.init.normal_(router.per_expert_scale)
        residual = torch.randn(9, 24)
        with torch.no_grad():
            weights, ids = router(residual)
            normed = rms_norm(residual, None, router.eps)
            scores = router.proj(normed * router.scale * router.root)
        found = route(scores, router.per_expert_scale.detach(), chosen=3, impl="reference")
        assert torch.equal(found.ids, ids)
        torch.testing.assert_close(found.weights, weights)

    def test_bfloat16_scores_are_read_as_they_are(self) -> None:
        scores = random_scores(5, 16, 1)
        found, expected = run(**make(scores.bfloat16(), 4)), run(**make(scores, 4))
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.weights, expected.weights)

    @pytest.mark.parametrize("bad", [NAN, -NAN])
    def test_nan_is_seen_in_the_weights_of_its_token(self, bad: float) -> None:
        scores = random_scores(3, 8, 2)
        scores[1, 5] = bad
        found = run(**make(scores, 2))
        assert found.ids[1, 0] == 5
        assert found.weights[1].isnan().all()
        assert found.weights[[0, 2]].isfinite().all()

    def test_everything_to_one_expert_makes_full_tiles_first(self) -> None:
        scores = torch.zeros(150, 4)
        scores[:, 2] = 1.0
        tiles = run(**make(scores, 1)).tiles.tolist()
        assert tiles == [[2, 0, 64], [2, 64, 64], [2, 128, 22], [-1, 0, 0], [-1, 0, 0], [-1, 0, 0]]

    def test_no_tokens(self) -> None:
        found = run(**make(torch.empty(0, 16), 4))
        assert found.ids.shape == found.weights.shape == (0, 4)
        assert found.order.shape == found.place.shape == (0,)
        assert found.tiles.shape == (0, 3)

    def test_dtypes(self) -> None:
        dtypes = [tensor.dtype for tensor in run(**make(random_scores(2, 8, 3), 2))]
        assert dtypes == [torch.int64, torch.float32, torch.int32, torch.int32, torch.int32]

    @settings(deadline=None, max_examples=60)
    @given(st.integers(0, 90), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
    def test_lists_are_what_they_say(
        self, tokens: int, experts: int, chosen: int, seed: int
    ) -> None:
        chosen = min(chosen, experts)
        scores = random_scores(tokens, experts, seed)
        found = run(**make(scores, chosen))
        for row, ids in zip(scores.tolist(), found.ids.tolist(), strict=True):
            assert ids == sorted(range(experts), key=lambda e: (-row[e], e))[:chosen]
        check(found, tokens, experts, chosen)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(4)}, r"scores are torch.float32 \[4\]"),
        ({"scores": torch.zeros(2, 4).double()}, "scores are torch.float64"),
        ({"per_expert_scale": torch.zeros(5)}, r"expected floating point \[E\] = \[4\]"),
        ({"per_expert_scale": torch.zeros(4, dtype=torch.int64)}, "per_expert_scale is torch.int"),
        ({"chosen": 0}, "chosen=0: expected 1 to 4"),
        ({"chosen": 5}, "chosen=5: expected 1 to 4"),
        ({"per_expert_scale": torch.zeros(4, device="meta")}, "per_expert_scale is on meta"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**make(torch.zeros(2, 4), 2) | changes)


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="impl='cpu'"):
        route(**make(torch.zeros(2, 4), 2), impl="cpu")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors could be moved")
def test_gpu_refuses_cpu_tensors() -> None:
    with pytest.raises(KernelUnavailable, match="needs a CUDA device"):
        route(**make(torch.zeros(2, 4), 2), impl="gpu")


def _cases() -> dict[str, dict[str, Any]]:
    cases = {
        f"{tokens}x{experts}-{chosen}": make(random_scores(tokens, experts, tokens), chosen)
        for tokens, experts, chosen in [
            (1, 1, 1),
            (3, 7, 7),
            (17, 16, 8),
            (2, 40, 3),
            (130, 8, 8),  # more routes than a block, and several tiles of an expert
        ]
    }
    crowded = torch.zeros(140, 6)
    crowded[:, 4] = 1.0
    crowded[64:128, 1] = 2.0
    cases["crowded"] = make(crowded, 1)
    cases["bfloat16"] = make(random_scores(5, 16, 5).bfloat16(), 4)
    cases["scale-bfloat16"] = make(random_scores(5, 16, 5), 4)
    cases["scale-bfloat16"]["per_expert_scale"] = torch.linspace(0.5, 2, 16).bfloat16()
    awkward = random_scores(6, 8, 6)
    awkward[0, 3], awkward[1, :], awkward[2, 5] = NAN, -INF, INF
    awkward[3, :], awkward[4, ::2] = torch.tensor([0.0, -0.0]).repeat(4), -NAN
    cases["awkward"] = make(awkward, 3)
    cases["no-tokens"] = make(torch.empty(0, 16), 4)
    cases["strided"] = make(random_scores(5, 32, 7)[:, ::2], 4)
    cases["transposed"] = make(random_scores(16, 5, 8).T, 4)
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("route")
    return dict(zip(CASES, run_gpu("route", list(CASES.values()), folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_decides_as_the_reference(name: str, gpu_results: dict[str, Any]) -> None:
    expected = run(**CASES[name])
    found = gpu_results[name]
    assert not isinstance(found, Exception), found
    found = Routes(*found)
    for field in ("ids", "order", "place", "tiles"):
        assert torch.equal(getattr(found, field), getattr(expected, field)), field
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-5, atol=0, equal_nan=True)


KERNELS: dict[str, tuple[dict[str, str], dict[str, Any], tuple[str, ...], int]] = {
    "choose_kernel": (
        {
            "scores_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "ids_ptr": "*i64",
            "weights_ptr": "*fp32",
            "T": "i32",
            "E": "i32",
            "stride_t": "i32",
            "stride_e": "constexpr",
        },
        {"stride_e": 1, "CHOSEN": 8, "BLOCK_T": 4, "BLOCK_E": 128, "BLOCK_K": 8},
        ("scores_ptr", "E", "stride_t"),
        44,
    ),
    "lists_kernel": (
        {
            "ids_ptr": "*i64",
            "order_ptr": "*i32",
            "place_ptr": "*i32",
            "tiles_ptr": "*i32",
            "routes": "i32",
            "E": "i32",
            "most": "i32",
        },
        {"TILE_ROWS": 64, "BINS": 256, "BLOCK_N": 1024, "BLOCK_TILES": 128},
        ("ids_ptr", "routes", "E"),
        88,
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability: int, name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu import route as module

    signature, constants, aligned, registers = KERNELS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        compiled = compile_kernel(
            getattr(module, name),
            signature | dict.fromkeys(constants, "constexpr"),
            constants,
            capability=capability,
            warps=4,
            aligned=aligned,
        )
    check_fits(compiled, capability, registers=registers)
