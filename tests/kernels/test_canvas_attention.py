import os
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_compiling import compile_attention
from compiling import CAPABILITIES, check_fits, compile_kernel
from interpreter import run_gpu
from tolerances import assert_close
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable
from infilld.kernels.canvas_attention import canvas_attention

NAN = float("nan")
PER_ROW = ("q", "k", "v", "slots", "first", "count", "lengths")


def make(
    *,
    ranges: list[tuple[int, int, int, int]],
    tokens: int,
    heads: int = 4,
    key_heads: int = 2,
    size: int = 16,
    capacity: int = 24,
    dtype: torch.dtype = torch.float32,
    past_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for rows of (slot, first, count, length); whatever they do not cover is NaN."""
    draw = torch.Generator().manual_seed(seed)
    rows, slabs = len(ranges), 3
    q, k, v = (
        torch.randn(rows, tokens, number, size, generator=draw)
        for number in (heads, key_heads, key_heads)
    )
    # Scores of about the size that normed queries and keys have: not all one, not all alike.
    q *= 3 / size**0.5
    pasts = [torch.full((slabs, key_heads, capacity, size), NAN) for _ in range(2)]
    for slot, first, count, _ in ranges:
        for past in pasts:
            at = past[slot, :, first : first + count]
            at.copy_(torch.randn(at.shape, generator=draw))
    for row, (_, _, _, length) in enumerate(ranges):
        for own in (q, k, v):
            own[row, length:] = NAN
    columns = torch.tensor(ranges, dtype=torch.int32).unbind(1)
    return {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        "past_keys": pasts[0].to(past_dtype or dtype),
        "past_values": pasts[1].to(past_dtype or dtype),
        "slots": columns[0],
        "first": columns[1],
        "count": columns[2],
        "lengths": columns[3],
    }


def widened(call: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() if t.is_floating_point() else t for name, t in call.items()}


def run(call: dict[str, Any]) -> Tensor:
    return canvas_attention(**call, impl="reference")


def by_hand(call: dict[str, Any]) -> Tensor:
    """The definition again, one query head at a time, in float64."""
    call = widened(call)
    q, k, v = call["q"], call["k"], call["v"]
    rows, tokens, heads, size = q.shape
    group = heads // k.shape[2]
    out = torch.zeros(rows, tokens, heads, size, dtype=torch.float64)
    for row in range(rows):
        slot, first, count, length = (
            int(call[name][row]) for name in ("slots", "first", "count", "lengths")
        )
        for head in range(heads):
            at = (slot, head // group, slice(first, first + count))
            keys = torch.cat((call["past_keys"][at], k[row, :length, head // group]))
            values = torch.cat((call["past_values"][at], v[row, :length, head // group]))
            scores = q[row, :length, head] @ keys.T
            out[row, :length, head] = scores.softmax(-1) @ values
    return out.flatten(2)


# (slot, first, count, length) of each row
SPANS = {
    "one-position": ([(0, 0, 0, 1)], 1),
    "no-past": ([(0, 0, 0, 5), (1, 0, 0, 5)], 5),
    "rows-alike": ([(1, 2, 7, 6)] * 4, 6),
    "rows-differ": ([(2, 0, 24, 7), (0, 5, 3, 2), (1, 23, 1, 1), (0, 0, 0, 3)], 7),
    "rows-mixed": ([(0, 1, 4, 5), (1, 0, 9, 5), (0, 1, 4, 5), (0, 1, 4, 4)], 5),
    "empty-row": ([(0, 0, 6, 0), (0, 0, 6, 3)], 3),
    "odd": ([(2, 3, 11, 13)], 13),
}


class TestReference:
    """The definition does what its docstring says."""

    @pytest.mark.parametrize("name", SPANS)
    def test_is_a_softmax_over_past_and_canvas(self, name: str) -> None:
        ranges, tokens = SPANS[name]
        call = make(ranges=ranges, tokens=tokens)
        assert (run(widened(call)) - by_hand(call)).abs().max() < 1e-12
        assert (run(call) - by_hand(call)).abs().max() < 1e-5

    @pytest.mark.parametrize("heads", [(1, 1), (3, 1), (6, 2), (4, 4)], ids=str)
    def test_query_heads_share_a_key_head(self, heads: tuple[int, int]) -> None:
        call = make(ranges=[(0, 0, 5, 4)], tokens=4, heads=heads[0], key_heads=heads[1])
        assert (run(call) - by_hand(call)).abs().max() < 1e-5

    def test_positions_past_the_length_are_zero(self) -> None:
        found = run(make(ranges=[(0, 0, 3, 2), (0, 0, 3, 0)], tokens=4))
        assert (found[0, 2:] == 0).all()
        assert (found[1] == 0).all()
        assert (found[0, :2] != 0).any()

    def test_type_of_the_queries_is_kept(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert run(make(ranges=[(0, 0, 3, 2)], tokens=2, dtype=dtype)).dtype == dtype

    def test_bfloat16_is_rounded_once(self) -> None:
        call = make(ranges=[(0, 0, 20, 9)], tokens=9, dtype=torch.bfloat16)
        assert torch.equal(run(call), by_hand(call).float().bfloat16())

    def test_float8_past_is_taken_as_it_is(self) -> None:
        call = make(ranges=[(0, 4, 20, 9)], tokens=9, past_dtype=torch.float8_e4m3fn)
        assert (run(call) - by_hand(call)).abs().max() < 1e-5

    def test_rows_are_independent(self) -> None:
        ranges = [(0, 1, 4, 5), (1, 0, 9, 5), (0, 1, 4, 3)]
        call = make(ranges=ranges, tokens=5)
        order = torch.tensor([2, 0, 1])
        shuffled = call | {name: call[name][order] for name in PER_ROW}
        assert torch.equal(run(shuffled), run(call)[order])

    def test_padding_changes_nothing(self) -> None:
        call = make(ranges=[(0, 1, 4, 3)] * 2, tokens=8)
        shorter = call | {name: call[name][:, :3] for name in ("q", "k", "v")}
        assert (run(shorter) - run(call)[:, :3]).abs().max() < 1e-6

    def test_arguments_are_not_changed(self) -> None:
        call = make(ranges=[(0, 1, 4, 3)], tokens=5)
        before = {name: tensor.clone() for name, tensor in call.items()}
        run(call)
        assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in call.items())

    @pytest.mark.parametrize("shape", [(0, 4), (2, 0)], ids=str)
    def test_empty(self, shape: tuple[int, int]) -> None:
        rows, tokens = shape
        call = make(ranges=[(0, 0, 0, 0)] * max(rows, 1), tokens=tokens)
        found = run(call | {name: call[name][:rows] for name in PER_ROW})
        assert found.shape == (rows, tokens, 64)


class TestRefusals:
    @pytest.mark.parametrize(
        ("ranges", "message"),
        [
            ((3, 0, 4, 2), "slot 3, there are 3 slots of 24"),
            ((-1, 0, 4, 2), "slot -1"),
            ((0, 21, 4, 2), r"positions \[21, 25\)"),
            ((0, -1, 4, 2), r"positions \[-1, 3\)"),
            ((0, 0, 4, 6), "a canvas of 6 positions, expected 0 to 5"),
        ],
    )
    def test_values_out_of_range(self, ranges: tuple[int, ...], message: str) -> None:
        call = make(ranges=[(0, 0, 4, 2)], tokens=5)
        names = ("slots", "first", "count", "lengths")
        changed = {
            name: torch.tensor([value], dtype=torch.int32)
            for name, value in zip(names, ranges, strict=True)
        }
        with pytest.raises(ValueError, match=message):
            run(call | changed)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("q", lambda t: t[0], r"expected q \[R, L, H, A\]"),
            ("q", lambda t: t[:, :, :3], "3 query heads do not divide among 2 key heads"),
            ("k", lambda t: t[:, 1:], r"k is \[1, 4, 2, 16\], expected \[1, 5, 2, 16\]"),
            ("v", lambda t: t.double(), "v is torch.float64, expected one of float32"),
            ("past_keys", lambda t: t[:, :1], "past_keys is"),
            ("past_values", lambda t: t[:, :, 1:], "past_values is"),
            ("past_values", lambda t: t.half(), "past_values is torch.float16"),
            ("count", lambda t: t.long(), "count is torch.int64, expected one of int32"),
            ("lengths", lambda t: t[:0], r"lengths is \[0\], expected \[1\]"),
            ("slots", lambda t: t.to("meta"), "slots is on meta, expected cpu"),
        ],
    )
    def test_tensors(self, name: str, change: Any, message: str) -> None:
        call = make(ranges=[(0, 0, 4, 2)], tokens=5)
        with pytest.raises(ValueError, match=message):
            run(call | {name: change(call[name])})

    def test_unknown_implementation(self) -> None:
        with pytest.raises(ValueError, match="expected 'gpu' or 'reference'"):
            canvas_attention(
                **make(ranges=[(0, 0, 4, 2)], tokens=5),
                impl="cuda",  # type: ignore[arg-type]
            )


def strided(call: dict[str, Any]) -> dict[str, Any]:
    """The same values, none of them side by side but those of a stored position."""
    spread = {
        name: torch.stack((call[name], torch.full_like(call[name], NAN)), dim=-1)[..., 0]
        for name in ("q", "k", "v")
    }
    stored = {
        name: call[name].transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("past_keys", "past_values")
    }
    return call | spread | stored


BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
# A slot of 200 positions or more is cut into shares.
WIDE = 200
CASES = {name: make(ranges=ranges, tokens=tokens) for name, (ranges, tokens) in SPANS.items()}
CASES |= {
    "shares": make(ranges=[(2, 3, 190, 13)], tokens=13, capacity=WIDE),
    "shares-of-few-keys": make(ranges=[(1, 0, 20, 5), (0, 7, 0, 3)], tokens=5, capacity=WIDE),
    "shares-rows-differ": make(
        ranges=[(2, 0, 200, 7), (0, 5, 3, 2), (1, 199, 1, 0), (0, 100, 65, 3)],
        tokens=7,
        capacity=WIDE,
    ),
    "several-blocks": make(ranges=[(0, 2, 9, 21), (1, 0, 4, 9)], tokens=21, heads=6),
    "three-heads-a-key": make(
        ranges=[(0, 2, 150, 11)], tokens=11, heads=3, key_heads=1, capacity=WIDE
    ),
    "bfloat16": make(ranges=[(0, 1, 150, 9), (1, 0, 3, 4)], tokens=9, dtype=BF16, capacity=WIDE),
    "bfloat16-whole": make(ranges=[(0, 1, 15, 9)], tokens=9, heads=2, key_heads=1, dtype=BF16),
    "float8": make(ranges=[(0, 1, 150, 9), (1, 0, 3, 4)], tokens=9, past_dtype=F8, capacity=WIDE),
    "float8-under-bfloat16": make(ranges=[(0, 1, 17, 5)], tokens=5, dtype=BF16, past_dtype=F8),
    "bfloat16-under-float32": make(ranges=[(0, 1, 17, 5)], tokens=5, past_dtype=BF16),
    "head-of-64": make(ranges=[(0, 1, 17, 5)], tokens=5, size=64),
    "head-of-512": make(ranges=[(0, 1, 17, 5)], tokens=5, heads=2, key_heads=1, size=512),
    "strided": strided(make(ranges=[(0, 2, 150, 7), (1, 0, 4, 3)], tokens=7, capacity=WIDE)),
}
_ROW = make(ranges=[(0, 0, 3, 2)], tokens=2)
CASES["no-rows"] = _ROW | {name: _ROW[name][:0] for name in PER_ROW}
REFUSED = {
    "float64": (make(ranges=[(0, 0, 3, 2)], tokens=2, dtype=torch.float64), "float64"),
    "head-of-24": (make(ranges=[(0, 0, 3, 2)], tokens=2, size=24), "heads of 24"),
}
UNLIKE = _ROW | {"past_values": strided(_ROW)["past_values"]}


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("canvas_attention")
    calls = CASES | {name: call for name, (call, _) in REFUSED.items()} | {"unlike": UNLIKE}
    return dict(zip(calls, run_gpu("canvas_attention", list(calls.values()), folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_computes_as_the_reference(name: str, gpu_results: dict[str, Any]) -> None:
    found = gpu_results[name]
    assert not isinstance(found, Exception), found
    call = CASES[name]
    assert_close(found, run(call), run(widened(call)))
    for row, length in enumerate(call["lengths"].tolist()):
        assert (found[row, length:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_gpu_refuses_what_it_cannot_compute(name: str, gpu_results: dict[str, Any]) -> None:
    with pytest.raises(KernelUnavailable, match=REFUSED[name][1]):
        raise gpu_results[name]


@pytest.mark.slow
def test_gpu_refuses_slots_laid_out_differently(gpu_results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="past_keys and past_values have strides"):
        raise gpu_results["unlike"]


class TestShares:
    """Into how many shares the keys are cut."""

    def test_fill_the_device_but_are_not_tiny(self) -> None:
        pytest.importorskip("triton")
        from infilld.kernels.gpu._attention import LEAST_TILES, WAVES, shares_of

        for programs in (1, 2, 16, 200, 5000):
            for tiles in (1, 4, 9, 1000):
                shares = shares_of(programs, tiles, 132)
                assert shares >= 1
                assert shares == 1 or shares * programs <= WAVES * 132
                assert shares == 1 or shares * LEAST_TILES <= tiles
        assert shares_of(1, 10**6, 132) == WAVES * 132
        assert shares_of(1, 40, 132) == 40 // LEAST_TILES


# Of a thread, with Triton 3.7.1, and a tenth more; 255 is all there are.
MOST_REGISTERS = {
    256: {80: 196, 89: 185, 90: 241, 120: 192},
    512: {80: 194, 89: 195, 90: 255, 120: 196},
}


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("size", [256, 512])
def test_compiles_without_spills(size: int, capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    compiled = compile_attention(size, capability, tmp_path)
    check_fits(compiled, capability, registers=MOST_REGISTERS[size][capability])
    assert ("wgmma.mma_async" if capability == 90 else "mma.sync") in compiled.ptx
    # Keys and values reach shared memory without passing through registers.
    assert "cp.async.cg.shared" in compiled.ptx


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
def test_float8_compiles_where_no_type_is_one(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    compiled = compile_attention(256, 80, tmp_path, past=F8)
    check_fits(compiled, 80, registers=255)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_joining_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu._attention import join_kernel

    pointers = {
        "partial_ptr": "*fp32",
        "lse_ptr": "*fp32",
        "lengths_ptr": "*i32",
        "out_ptr": "*bf16",
    }
    numbers = dict.fromkeys(("L", "shares", "of_a_share"), "i32")
    constants = {"H": 16, "A": 512, "CAUSAL": False, "BLOCK_S": 32}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        compiled = compile_kernel(
            join_kernel,
            pointers | numbers | dict.fromkeys(constants, "constexpr"),
            constants,
            capability=capability,
            warps=2,
            aligned=tuple(pointers),
        )
    check_fits(compiled, capability, registers=46)
    assert compiled.shared_bytes <= 1024
