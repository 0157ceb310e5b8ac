import os
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_compiling import compile_attention
from compiling import CAPABILITIES, check_fits
from interpreter import run_gpu
from tolerances import assert_close
from torch import Tensor

from infilld.kernels._launch import KernelUnavailable
from infilld.kernels.prefix_attention import prefix_attention

NAN = float("nan")


def make(
    *,
    tokens: int,
    count: int,
    window: int | None = None,
    writes: bool = True,
    heads: int = 4,
    key_heads: int = 2,
    size: int = 16,
    capacity: int = 40,
    slot: int = 1,
    dtype: torch.dtype = torch.float32,
    past_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments with NaN wherever nothing is stored yet."""
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(tokens, number, size, generator=draw)
        for number in (heads, key_heads, key_heads)
    )
    q *= 3 / size**0.5
    pasts = [torch.full((2, key_heads, capacity, size), NAN) for _ in range(2)]
    for past in pasts:
        past[slot, :, :count] = torch.randn(key_heads, count, size, generator=draw)
    return {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        "past_keys": pasts[0].to(past_dtype or dtype),
        "past_values": pasts[1].to(past_dtype or dtype),
        "slot": torch.tensor([slot], dtype=torch.int32),
        "count": torch.tensor([count], dtype=torch.int32),
        "window": window,
        "writes": writes,
    }


def in_rows(*, window: int | None = None, writes: bool = False) -> dict[str, Any]:
    """Three rows: two behind one prefix, and one behind none."""
    call = make(tokens=15, count=0 if writes else 9, window=window, writes=writes)
    for name in "qkv":
        call[name] = call[name].unflatten(0, (3, 5))
    call["slot"] = torch.tensor([1, 1, 0], dtype=torch.int32)
    call["count"] = torch.tensor([9, 4, 0], dtype=torch.int32)
    if writes:
        call = {name: t[1:] if name in ("q", "k", "v", "slot") else t for name, t in call.items()}
        call["count"] = torch.tensor([0, 0], dtype=torch.int32)
    return call


def widened(call: dict[str, Any]) -> dict[str, Any]:
    return {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in call.items()
    }


def run(call: dict[str, Any]) -> Tensor:
    """Result; the caller's cache is left as it was."""
    kept = {name: call[name].clone() for name in ("past_keys", "past_values")}
    return prefix_attention(**(call | kept), impl="reference")


def by_hand(call: dict[str, Any]) -> Tensor:
    """The definition again, one token and query head at a time, in float64."""
    call = widened(call)
    (tokens, heads, size), slot, count = call["q"].shape, int(call["slot"]), int(call["count"])
    group = heads // call["k"].shape[1]
    window = call["window"] or tokens + count
    out = torch.zeros(tokens, heads, size, dtype=torch.float64)
    for head in range(heads):
        keys, values = (
            torch.cat((call[past][slot, head // group, :count], call[new][:, head // group]))
            for past, new in (("past_keys", "k"), ("past_values", "v"))
        )
        for token in range(tokens):
            seen = slice(max(0, count + token + 1 - window), count + token + 1)
            weights = (keys[seen] @ call["q"][token, head]).softmax(-1)
            out[token, head] = weights @ values[seen]
    return out.flatten(1)


# tokens, count, window
SPANS: dict[str, tuple[int, int, int | None]] = {
    "one-token": (1, 0, None),
    "one-more": (1, 9, None),
    "nothing-before": (13, 0, None),
    "after-some": (7, 20, None),
    "window-within": (7, 20, 5),
    "window-reaches-back": (7, 20, 16),
    "window-wider-than-all": (7, 20, 64),
    "window-of-one": (7, 20, 1),
    "window-before-anything": (9, 0, 4),
    "window-as-long-as-past": (5, 8, 9),
}


class TestReference:
    """The definition does what its docstring says."""

    @pytest.mark.parametrize("name", SPANS)
    def test_is_causal_within_its_window(self, name: str) -> None:
        tokens, count, window = SPANS[name]
        call = make(tokens=tokens, count=count, window=window)
        assert (run(widened(call)) - by_hand(call)).abs().max() < 1e-12
        assert (run(call) - by_hand(call)).abs().max() < 1e-5

    @pytest.mark.parametrize("heads", [(1, 1), (3, 1), (6, 2), (4, 4)], ids=str)
    def test_query_heads_share_a_key_head(self, heads: tuple[int, int]) -> None:
        call = make(tokens=5, count=4, heads=heads[0], key_heads=heads[1])
        assert (run(call) - by_hand(call)).abs().max() < 1e-5

    @pytest.mark.parametrize("window", [None, 4, 11])
    def test_two_pieces_are_one(self, window: int | None) -> None:
        call = make(tokens=11, count=6, window=window)
        cache = {name: call[name].clone() for name in ("past_keys", "past_values")}
        parts = []
        for start, end in ((0, 4), (4, 11)):
            piece = {name: call[name][start:end] for name in ("q", "k", "v")}
            count = call["count"] + start
            parts.append(
                prefix_attention(**(call | cache | piece | {"count": count}), impl="reference")
            )
        assert (torch.cat(parts) - run(call)).abs().max() < 1e-5

    def test_writes_only_behind_what_is_stored(self) -> None:
        call = make(tokens=3, count=5)
        before = call["past_keys"].clone(), call["past_values"].clone()
        prefix_attention(**call, impl="reference")
        for name, new, old in (("past_keys", "k", before[0]), ("past_values", "v", before[1])):
            assert torch.equal(call[name][1, :, 5:8], call[new].transpose(0, 1))
            old[1, :, 5:8] = call[name][1, :, 5:8]
            assert torch.equal(call[name].nan_to_num(), old.nan_to_num())

    def test_without_writing_the_cache_is_only_read(self) -> None:
        call = make(tokens=3, count=5, writes=False)
        before = call["past_keys"].clone()
        found = prefix_attention(**call, impl="reference")
        assert torch.equal(call["past_keys"].nan_to_num(), before.nan_to_num())
        assert torch.equal(found, run(call | {"writes": True}))

    def test_without_writing_the_slot_may_be_full(self) -> None:
        call = make(tokens=3, count=40, writes=False)
        assert (run(call) - by_hand(call)).abs().max() < 1e-5

    def test_float8_is_read_as_it_is_and_written_without_overflow(self) -> None:
        call = make(tokens=3, count=5, past_dtype=torch.float8_e4m3fn)
        call["k"][1, 0, 0], call["k"][2, 1, 3] = 1e4, -1e4
        call["q"][:, :, :4] = 0
        assert (run(call) - by_hand(call)).abs().max() < 1e-5
        prefix_attention(**call, impl="reference")
        stored = call["past_keys"][1, :, 5:8].float()
        assert stored[0, 1, 0] == 448
        assert stored[1, 2, 3] == -448
        assert torch.equal(
            stored, call["k"].clamp(-448, 448).to(torch.float8_e4m3fn).float().transpose(0, 1)
        )

    def test_own_keys_are_not_rounded_to_the_cache(self) -> None:
        wide, narrow = (
            make(tokens=6, count=0, past_dtype=dtype) for dtype in (None, torch.float8_e4m3fn)
        )
        assert torch.equal(run(narrow), run(wide))

    def test_type_of_the_queries_is_kept(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert run(make(tokens=3, count=5, dtype=dtype)).dtype == dtype

    @pytest.mark.parametrize("window", [None, 4])
    def test_rows_are_what_each_is_alone(self, window: int | None) -> None:
        call = in_rows(window=window)
        together = run(call)
        for row in range(3):
            own = ("q", "k", "v")
            alone = call | {name: call[name][row] for name in own}
            alone |= {name: call[name][row : row + 1] for name in ("slot", "count")}
            assert torch.equal(together[row], run(alone))
        assert together.isfinite().all()

    def test_empty(self) -> None:
        assert run(make(tokens=0, count=5)).shape == (0, 64)


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("slot", 2, r"slot 2, there are 2 slots of 40 positions"),
            ("slot", -1, "slot -1"),
            ("count", -1, "positions"),
            ("count", 38, r"positions \[0, 41\) of slot 1"),
        ],
    )
    def test_values_out_of_range(self, name: str, value: int, message: str) -> None:
        call = make(tokens=3, count=5) | {name: torch.tensor([value], dtype=torch.int32)}
        with pytest.raises(ValueError, match=message):
            run(call)

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("q", lambda t: t[0], r"expected q \[R, T, H, A\]"),
            ("q", lambda t: t[:, :3], "3 query heads do not divide among 2 key heads"),
            ("k", lambda t: t[1:], r"k is \[2, 2, 16\], expected \[3, 2, 16\]"),
            ("v", lambda t: t.double(), "v is torch.float64, expected one of float32"),
            ("past_keys", lambda t: t[:, :1], "past_keys is"),
            ("past_values", lambda t: t.half(), "past_values is torch.float16"),
            ("count", lambda t: t.long(), "count is torch.int64, expected one of int32"),
            ("slot", lambda t: t[0], r"slot is \[\], expected \[1\]"),
            ("window", lambda _: 0, "window=0: expected 1 or more, or None"),
        ],
    )
    def test_arguments(self, name: str, change: Any, message: str) -> None:
        call = make(tokens=3, count=5)
        with pytest.raises(ValueError, match=message):
            prefix_attention(**(call | {name: change(call[name])}), impl="reference")

    def test_unknown_implementation(self) -> None:
        with pytest.raises(ValueError, match="expected 'gpu' or 'reference'"):
            prefix_attention(**make(tokens=3, count=5), impl="cuda")  # type: ignore[arg-type]


BF16, F8 = torch.bfloat16, torch.float8_e4m3fn
# A slot of 200 positions or more is cut into shares.
WIDE = 200
CASES = {
    name: make(tokens=tokens, count=count, window=window)
    for name, (tokens, count, window) in SPANS.items()
}
CASES |= {
    "shares": make(tokens=13, count=170, capacity=WIDE),
    "shares-window": make(tokens=25, count=170, window=90, capacity=WIDE),
    "shares-of-few-keys": make(tokens=5, count=3, capacity=WIDE),
    "three-heads-a-key": make(tokens=21, count=50, heads=3, key_heads=1, capacity=WIDE),
    "six-heads-two-keys-window": make(tokens=21, count=50, window=9, heads=6, capacity=WIDE),
    "read-only": make(tokens=5, count=40, writes=False),
    "bfloat16": make(tokens=9, count=101, window=70, dtype=BF16, capacity=WIDE),
    "float8": make(tokens=9, count=101, past_dtype=F8, capacity=WIDE),
    "float8-under-bfloat16": make(tokens=5, count=20, dtype=BF16, past_dtype=F8),
    "bfloat16-under-float32": make(tokens=5, count=20, past_dtype=BF16),
    "head-of-512": make(tokens=5, count=20, heads=2, key_heads=1, size=512),
    "empty": make(tokens=0, count=5),
    "rows": in_rows(),
    "rows-window": in_rows(window=4),
}
REFUSED = {
    "float64": (make(tokens=2, count=3, dtype=torch.float64), "float64"),
    "head-of-24": (make(tokens=2, count=3, size=24), "heads of 24"),
}


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("prefix_attention")
    calls = CASES | {name: call for name, (call, _) in REFUSED.items()}
    return dict(zip(calls, run_gpu("prefix_attention", list(calls.values()), folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_computes_as_the_reference(name: str, gpu_results: dict[str, Any]) -> None:
    found = gpu_results[name]
    assert not isinstance(found, Exception), found
    assert_close(found, run(CASES[name]), run(widened(CASES[name])))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_gpu_refuses_what_it_cannot_compute(name: str, gpu_results: dict[str, Any]) -> None:
    with pytest.raises(KernelUnavailable, match=REFUSED[name][1]):
        raise gpu_results[name]


def awkward_for_float8() -> dict[str, Any]:
    """New keys and values at every place where rounding to float8_e4m3fn could go wrong."""
    codes = torch.arange(127, dtype=torch.uint8).view(F8).float()
    between = (codes[1:] + codes[:-1]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(0.0)
    beside = torch.cat((between.nextafter(up), between.nextafter(down)))
    extremes = torch.tensor([447.9, 448.0, 464.0, 465.0, 1e30, 1e-30, torch.inf, NAN])
    sizes = torch.cat((codes, between, beside, extremes))
    numbers = torch.cat((sizes, -sizes))
    call = make(tokens=32, count=5, heads=2, past_dtype=F8)
    call["k"] = numbers.repeat(2)[: 32 * 2 * 16].view(32, 2, 16)
    call["v"] = numbers.flip(0).repeat(2)[: 32 * 2 * 16].view(32, 2, 16)
    return call


WRITES = {
    "float32": make(tokens=21, count=7),
    "several-blocks-and-shares": make(tokens=21, count=120, capacity=WIDE),
    "groups-that-share-blocks": make(tokens=21, count=7, heads=6, key_heads=2),
    "one-token": make(tokens=1, count=0),
    "bfloat16": make(tokens=21, count=7, dtype=BF16),
    "to-the-last-position": make(tokens=13, count=27),
    "float8": awkward_for_float8(),
    "float8-of-bfloat16": make(tokens=9, count=7, dtype=BF16, past_dtype=F8),
    "nothing": make(tokens=21, count=7, writes=False),
    "rows": in_rows(writes=True),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """The slots after the gpu implementation wrote to them."""
    folder = tmp_path_factory.mktemp("written")
    slots = run_gpu(
        "prefix_attention",
        list(WRITES.values()),
        folder,
        written=("past_keys", "past_values"),
    )
    return dict(zip(WRITES, slots, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_gpu_writes_as_the_reference(name: str, written: dict[str, list[Tensor]]) -> None:
    assert not isinstance(written[name], Exception), written[name]
    expected = {past: WRITES[name][past].clone() for past in ("past_keys", "past_values")}
    prefix_attention(**(WRITES[name] | expected), impl="reference")
    for found, right in zip(written[name], expected.values(), strict=True):
        assert found.dtype == right.dtype
        # Bit by bit, NaN and the sign of zero included.
        as_bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[found.element_size()]
        assert torch.equal(found.view(as_bits), right.view(as_bits))


# Of a thread, with Triton 3.7.1, and a tenth more; 255 is all there are.
MOST_REGISTERS = {
    256: {80: 227, 89: 213, 90: 252, 120: 217},
    512: {80: 196, 89: 195, 90: 196, 120: 196},
}


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("size", [256, 512])
def test_compiles_without_spills(size: int, capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    compiled = compile_attention(size, capability, tmp_path, causal=True)
    check_fits(compiled, capability, registers=MOST_REGISTERS[size][capability])
    # With heads of 512 a tile has 32 rows, and a warp group's product takes 64.
    name = "wgmma.mma_async" if (capability, size) == (90, 256) else "mma.sync"
    assert name in compiled.ptx
