import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import CAPABILITIES, check_fits, compile_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import run_gpu
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable
from infilld.kernels.accept import Accepted, accept

INF, NAN = float("inf"), float("nan")


def make(entropy: Tensor, *, budget: float = 0.1, pinned: Tensor | None = None) -> dict[str, Any]:
    """Arguments in which every token says where it comes from."""
    rows, tokens = entropy.shape
    index = torch.arange(rows * tokens).view(rows, tokens)
    return {
        "entropy_nats": entropy.float(),
        "proposal": 10_000 + index,
        "noise": 20_000 + index,
        "pinned": pinned,
        "pins": None if pinned is None else 30_000 + index,
        "budget_nats": budget,
    }


def random_entropy(rows: int, tokens: int, seed: int) -> Tensor:
    """Entropies as a canvas has them: many near 0, some large, some equal."""
    draw = torch.Generator().manual_seed(seed)
    entropy = torch.rand(rows, tokens, generator=draw) ** 8 * 12
    return torch.where(torch.rand(rows, tokens, generator=draw) < 0.2, 0.01, entropy)


def random_mask(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.rand(rows, tokens, generator=torch.Generator().manual_seed(seed)) < 0.3


def run(**call: Any) -> Accepted:
    return accept(**call, impl="reference")


def where(mask: Tensor) -> list[int]:
    return mask[0].nonzero().flatten().tolist()


def accepted_of(*entropy: float, budget: float = 0.1, pinned: tuple[int, ...] = ()) -> list[int]:
    mask = torch.zeros(1, len(entropy), dtype=torch.bool)
    mask[0, list(pinned)] = True
    return where(
        run(**make(torch.tensor([entropy]), budget=budget, pinned=mask if pinned else None))[1]
    )


class TestReference:
    """The definition has the properties its docstring promises."""

    def test_accepts_while_the_entropy_before_fits(self) -> None:
        # 0.05, 0.06 are ranked before 3.0: 0.11 in all, so 3.0 does not fit.
        assert accepted_of(3.0, 0.06, 0.05) == [1, 2]

    def test_own_entropy_does_not_count(self) -> None:
        assert accepted_of(5.0, 0.1, 9.0) == [0, 1]

    def test_lowest_is_always_accepted(self) -> None:
        assert accepted_of(7.0, 6.0, 8.0, budget=0.0) == [1]

    def test_certain_positions_are_free(self) -> None:
        assert accepted_of(0.0, 2.0, 0.0, 0.0, budget=0.0) == [0, 1, 2, 3]

    def test_equal_entropies_go_to_the_lower_position(self) -> None:
        assert accepted_of(0.5, 0.2, 0.2, 0.2, budget=0.1) == [1]
        assert accepted_of(0.5, 0.2, 0.2, 0.2, budget=0.3) == [1, 2]

    @pytest.mark.parametrize("tiny", [-0.0, -1e-9, -1e-3])
    def test_negative_counts_as_zero(self, tiny: float) -> None:
        # Ranked by position among the zeros, and not paid back to the budget.
        assert accepted_of(0.0, tiny, 0.15, 9.0, budget=0.1) == [0, 1, 2]

    def test_tokens_come_from_the_right_place(self) -> None:
        pinned = torch.tensor([[False, False, False, True]])
        canvas, _ = run(**make(torch.tensor([[0.0, 9.0, 8.0, 0.0]]), pinned=pinned))
        assert canvas.tolist() == [[10_000, 20_001, 10_002, 30_003]]

    def test_pins_spend_no_budget(self) -> None:
        assert accepted_of(0.09, 5.0, 0.2, pinned=(0,)) == [2]
        assert accepted_of(0.09, 5.0, 0.2) == [0, 2]

    def test_all_pinned(self) -> None:
        canvas, accepted = run(**make(torch.rand(2, 5), pinned=torch.ones(2, 5, dtype=torch.bool)))
        assert not accepted.any()
        assert (canvas >= 30_000).all()

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_infinite_is_not_accepted(self, bad: float) -> None:
        assert accepted_of(bad, 0.0, bad, budget=1e9) == [1]
        assert accepted_of(bad, 0.0, bad, budget=INF) == [1]

    def test_nan_and_infinity_rank_alike(self) -> None:
        assert accepted_of(INF, NAN, budget=INF) == [0]
        assert accepted_of(NAN, INF, budget=INF) == [0]

    def test_infinite_is_accepted_when_nothing_else_is_free(self) -> None:
        assert accepted_of(0.0, NAN, NAN, pinned=(0,)) == [1]

    def test_infinite_budget_accepts_everything_finite(self) -> None:
        assert accepted_of(*[12.0] * 256, budget=INF) == list(range(256))

    def test_huge_entropies_do_not_overflow(self) -> None:
        assert accepted_of(3e38, 2e38, 1e38, budget=1500.0) == [1, 2]

    def test_budget_is_taken_as_float32(self) -> None:
        exact = torch.tensor(0.1)
        assert accepted_of(float(exact), 0.5, budget=0.1) == [0, 1]

    def test_arguments_are_not_changed(self) -> None:
        call = make(random_entropy(3, 17, 1), pinned=random_mask(3, 17, 2))
        before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in call.items()}
        run(**call)
        assert all(
            torch.equal(v, before[k]) if isinstance(v, Tensor) else v == before[k]
            for k, v in call.items()
        )

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
    def test_empty(self, shape: tuple[int, int]) -> None:
        canvas, accepted = run(**make(torch.empty(shape)))
        assert canvas.shape == accepted.shape == shape

    def test_rows_are_independent(self) -> None:
        entropy, mask = random_entropy(6, 33, 3), random_mask(6, 33, 4)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        whole = run(**make(entropy, pinned=mask)).accepted
        permuted = run(**make(entropy[order], pinned=mask[order])).accepted
        assert torch.equal(permuted, whole[order])

    def test_a_pinned_tail_changes_nothing(self) -> None:
        entropy = random_entropy(4, 20, 5)
        padded = torch.cat((entropy, torch.full((4, 12), NAN)), dim=1)
        mask = torch.zeros(4, 32, dtype=torch.bool)
        mask[:, 20:] = True
        short = run(**make(entropy)).accepted
        assert torch.equal(run(**make(padded, pinned=mask)).accepted[:, :20], short)

    def test_a_larger_budget_accepts_no_less(self) -> None:
        entropy = random_entropy(8, 64, 6)
        masks = [run(**make(entropy, budget=b)).accepted for b in (0.0, 0.01, 0.1, 1.0, 10.0)]
        for less, more in pairwise(masks):
            assert not (less & ~more).any()

    @settings(deadline=None, max_examples=60)
    @given(
        st.lists(
            st.one_of(st.floats(0, 13, width=32), st.sampled_from([0.0, 0.05, NAN, INF])),
            min_size=1,
            max_size=40,
        ),
        st.floats(0, 5, width=32),
        st.integers(0, 2**32),
    )
    def test_agrees_with_the_sentence(
        self, entropy: list[float], budget: float, mask_bits: int
    ) -> None:
        pinned = tuple(i for i in range(len(entropy)) if mask_bits >> i & 1 and i % 3 == 0)
        free = [i for i in range(len(entropy)) if i not in pinned]
        nats = [INF if value != value else value for value in entropy]
        ranked = sorted(free, key=lambda i: (nats[i], i))
        expected, spent = [], 0
        for rank, i in enumerate(ranked):
            if rank == 0 or (nats[i] < INF and spent <= int(budget * 2**40)):
                expected.append(i)
            spent += int(min(nats[i], 1024.0) * 2**40)
        assert accepted_of(*entropy, budget=budget, pinned=pinned) == sorted(expected)


def break_shape(call: dict[str, Any]) -> None:
    call["noise"] = call["noise"][:, 1:]


def break_dtype(call: dict[str, Any]) -> None:
    call["proposal"] = call["proposal"].int()


def break_precision(call: dict[str, Any]) -> None:
    call["entropy_nats"] = call["entropy_nats"].double()


def break_pins(call: dict[str, Any]) -> None:
    call["pins"] = None


def break_budget(call: dict[str, Any]) -> None:
    call["budget_nats"] = -0.1


def break_budget_number(call: dict[str, Any]) -> None:
    call["budget_nats"] = NAN


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_shape, r"noise is \[2, 7\], expected \[R, L\] = \[2, 8\]"),
        (break_dtype, "proposal is torch.int32"),
        (break_precision, "entropy_nats is torch.float64"),
        (break_pins, "belong together"),
        (break_budget, "budget_nats=-0.1"),
        (break_budget_number, "budget_nats=nan"),
    ],
)
def test_refuses(damage: Callable[[dict[str, Any]], None], message: str) -> None:
    call = make(torch.rand(2, 8), pinned=torch.zeros(2, 8, dtype=torch.bool))
    damage(call)
    with pytest.raises(ValueError, match=message):
        run(**call)


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="impl='cpu'"):
        accept(**make(torch.rand(1, 2)), impl="cpu")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors could be moved")
def test_gpu_refuses_cpu_tensors() -> None:
    with pytest.raises(KernelUnavailable, match="needs a CUDA device"):
        accept(**make(torch.rand(1, 2)), impl="gpu")


def test_gpu_without_triton_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    with pytest.raises(KernelUnavailable, match="Triton is not installed"):
        accept(**make(torch.rand(1, 2)), impl="gpu")


# Length 1, odd, around the block sizes, the model's own; budgets that bite at different ranks.
SHAPES = [(1, 1), (3, 7), (2, 16), (2, 17), (1, 64), (1, 100), (1, 255), (1, 256)]


def awkward() -> Tensor:
    """Rows that try ties, signed zeros, subnormals and what is not finite."""
    rows = [
        [0.0] * 20,
        [0.0, -0.0] * 10,
        [-1e-9, 0.0, -0.0, 1e-45, 1e-38] * 4,
        [NAN] * 20,
        [INF, NAN] * 10,
        [NAN, 0.3, INF, 0.3, 0.05] * 4,
        [0.1, 0.05, 0.05] + [5.0] * 17,
        [3e38, 1e38, 2000.0, 1024.0] * 5,
        [float(torch.tensor(0.1))] * 20,
    ]
    return torch.tensor(rows)


def _cases() -> dict[str, dict[str, Any]]:
    cases = {}
    for rows, tokens in SHAPES:
        entropy = random_entropy(rows, tokens, seed=tokens)
        mask = random_mask(rows, tokens, seed=tokens + 1)
        if tokens < 64 or tokens == 256:  # the interpreter takes a second for a long row
            cases[f"{rows}x{tokens}"] = make(entropy)
        cases[f"{rows}x{tokens}-pins"] = make(entropy, pinned=mask, budget=0.7)
    cases["no-budget"] = make(random_entropy(3, 40, 8), budget=0.0)
    cases["no-limit"] = make(random_entropy(3, 40, 9), budget=INF)
    cases["awkward"] = make(awkward())
    cases["awkward-pins"] = make(awkward(), pinned=random_mask(9, 20, 10), budget=1500.0)
    cases["all-pinned"] = make(torch.rand(2, 9), pinned=torch.ones(2, 9, dtype=torch.bool))
    cases["no-rows"] = make(torch.empty(0, 9))
    cases["no-positions"] = make(torch.empty(3, 0))
    strided = make(random_entropy(3, 40, 11), pinned=random_mask(3, 40, 12))
    cases["strided"] = {
        name: value[:, ::2] if isinstance(value, Tensor) else value
        for name, value in strided.items()
    }
    return cases


CASES = _cases()


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("accept")
    too_long = {"too-long": make(torch.rand(1, 257))}
    calls = CASES | too_long
    return dict(zip(calls, run_gpu("accept", list(calls.values()), folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_decides_as_the_reference(name: str, gpu_results: dict[str, Any]) -> None:
    expected = run(**CASES[name])
    found = gpu_results[name]
    assert not isinstance(found, Exception), found
    assert torch.equal(found[0], expected.canvas)
    assert torch.equal(found[1], expected.accepted)


@pytest.mark.slow
def test_gpu_refuses_what_does_not_fit(gpu_results: dict[str, Any]) -> None:
    with pytest.raises(KernelUnavailable, match="has 257 positions, this kernel takes 256"):
        raise gpu_results["too-long"]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu.accept import accept_kernel

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        compiled = compile_kernel(
            accept_kernel,
            {
                "entropy_ptr": "*fp32",
                "proposal_ptr": "*i64",
                "noise_ptr": "*i64",
                "pinned_ptr": "*i1",
                "pins_ptr": "*i64",
                "canvas_ptr": "*i64",
                "accepted_ptr": "*i1",
                "budget_nats": "fp32",
                "L": "i32",
                "PINS": "constexpr",
                "BLOCK_L": "constexpr",
            },
            {"PINS": True, "BLOCK_L": 256},
            capability=capability,
            warps=4,
        )
    check_fits(compiled, capability, registers=128)
