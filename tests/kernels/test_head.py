import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import check_fits, compile_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import run_gpu
from torch import Tensor

from infilld.engine.config import SamplerConfig
from infilld.engine.reading import Ask, Bans, read_logits
from infilld.engine.schedule import temperature
from infilld.kernels._launch import KernelUnavailable
from infilld.kernels.belief import belief
from infilld.kernels.head import HeadReading, head

INF, NAN = float("inf"), float("nan")
SOFTCAP = 5.0


def make(
    tokens: int,
    vocab: int,
    width: int,
    *,
    top: int = 4,
    bans: bool = False,
    whole: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments with everything asked; `whole` numbers make exact scores and many equal ones."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=draw)
    embedding = torch.randn(vocab, width, generator=draw)
    if whole:
        hidden, embedding = hidden.round(), embedding.round()
    banned = None
    if bans:
        banned = torch.rand(3, vocab, generator=draw) < 0.4
        banned[:, vocab // 2] = False
    return {
        "hidden": hidden.to(dtype),
        "embedding": embedding.to(dtype),
        "softcap": SOFTCAP,
        "temperature": torch.rand(tokens, generator=draw) + 0.3,
        "top": min(top, vocab),
        "banned": banned,
        "ban_row": torch.randint(3, (tokens,), generator=draw) if bans else None,
        "targets": torch.randint(vocab, (tokens,), generator=draw),
        "uniforms": torch.rand(tokens, 2, generator=draw),
    }


def given_scores(scores: Tensor, top: int, **more: Any) -> dict[str, Any]:
    """Arguments whose scores [T, V] are exactly these."""
    tokens = len(scores)
    plain = {
        "hidden": torch.eye(tokens),
        "embedding": scores.T.contiguous(),
        "softcap": SOFTCAP,
        "temperature": torch.ones(tokens),
        "top": top,
        "banned": None,
        "ban_row": None,
        "targets": None,
        "uniforms": None,
    }
    return plain | more


def run(**call: Any) -> HeadReading:
    return head(**call, impl="reference")


def exact(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, and log-probabilities with and without bans, [T, V] float64."""
    scores = call["hidden"].double() @ call["embedding"].double().T
    logits = torch.tanh(scores / SOFTCAP) * SOFTCAP / call["temperature"][:, None].double()
    free = logits.log_softmax(-1)
    if call["banned"] is not None:
        ban = call["banned"][call["ban_row"]]
        scores, logits = scores.masked_fill(ban, -INF), logits.masked_fill(ban, -INF)
    return scores, logits.log_softmax(-1), free


def drawn_slowly(shares: Tensor, uniforms: Tensor) -> int:
    """A token [V] drawn as the docstring says it."""
    tiles = torch.split(shares, 128)
    masses = torch.stack([tile.sum() for tile in tiles])
    u, v = uniforms.tolist()
    number = next(i for i, m in enumerate(masses.cumsum(0)) if m >= (1 - u) * masses.sum())
    within = tiles[number].cumsum(0)
    return 128 * number + next(i for i, m in enumerate(within) if m >= (1 - v) * within[-1])


def check(found: HeadReading, call: dict[str, Any]) -> None:
    """Everything about a reading but the sample, against float64."""
    scores, logs, free = exact(call)
    ids = scores.sort(dim=-1, descending=True, stable=True).indices[:, : call["top"]]
    assert torch.equal(found.top_ids, ids)
    assert torch.equal(found.argmax, ids[:, 0])
    chosen = logs.gather(1, ids)
    # Rounding of scores, in nats, where logits are at most SOFTCAP / 0.3.
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found.top_probabilities, chosen.exp(), **close)
    torch.testing.assert_close(found.log_probability, chosen[:, 0], **close)
    terms = torch.where(logs == -INF, 0.0, logs.exp() * logs)
    torch.testing.assert_close(found.entropy_nats, -terms.sum(-1), **close)
    assert (found.entropy_nats >= 0).all()
    if call["targets"] is None:
        assert found.target_log_probability is None
    else:
        at_targets = free.gather(1, call["targets"][:, None])[:, 0]
        torch.testing.assert_close(found.target_log_probability, at_targets, **close)


def aimed(call: dict[str, Any], seed: int) -> Tensor:
    """Uniforms far from any decision, and the tokens they draw: [T, 3] float32."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for logs in exact(call)[1]:
        shares = logs.exp()
        tiles = torch.nn.functional.pad(shares, (0, -len(shares) % 128)).view(-1, 128)
        token = int(torch.multinomial(torch.where(shares > 2e-3, shares, 0.0), 1, generator=draw))
        masses, within = tiles.sum(-1), tiles[token // 128]
        u = 1 - (masses[: token // 128].sum() + masses[token // 128] / 2) / masses.sum()
        v = 1 - (within[: token % 128].sum() + within[token % 128] / 2) / within.sum()
        rows.append([float(u), float(v), float(token)])
    return torch.tensor(rows).view(-1, 3)


class TestReference:
    """The definition has the properties its docstring promises."""

    @pytest.mark.parametrize("bans", [False, True])
    @pytest.mark.parametrize("shape", [(1, 1, 3), (5, 300, 16), (3, 128, 7), (2, 4096, 8)], ids=str)
    def test_agrees_with_float64(self, shape: tuple[int, int, int], bans: bool) -> None:
        call = make(*shape, bans=bans)
        check(run(**call), call)

    @settings(deadline=None, max_examples=60)
    @given(
        st.integers(1, 6),
        st.integers(1, 400),
        st.integers(1, 80),
        st.booleans(),
        st.integers(0, 2**32),
    )
    def test_equal_scores_go_to_the_lower_token(
        self, tokens: int, vocab: int, top: int, bans: bool, seed: int
    ) -> None:
        call = make(tokens, vocab, 2, top=top, bans=bans, whole=True, seed=seed)
        check(run(**call), call)

    def test_ranks_what_tanh_rounds_to_the_same(self) -> None:
        scores = torch.zeros(1, 300)
        scores[0, [7, 150, 290]] = torch.tensor([200.0, 300.0, 250.0])
        found = run(**given_scores(scores, 3))
        assert found.top_ids.tolist() == [[150, 290, 7]]
        assert (found.top_probabilities == found.top_probabilities[0, 0]).all()

    def test_bfloat16_is_read_as_it_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("infilld.kernels.reference.head.CONVERTED_TOKENS", 100)
        call = make(4, 300, 16, dtype=torch.bfloat16)
        check(run(**call), call)

    def test_parts_make_no_difference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        call = make(11, 300, 16, bans=True)
        whole = run(**call)
        monkeypatch.setattr("infilld.kernels.reference.head.LARGEST_SCORES", 3 * 384)
        monkeypatch.setattr("infilld.kernels.reference.head.FEWEST_ROWS", 1)
        for found, expected in zip(run(**call), whole, strict=True):
            assert found is not None
            assert expected is not None
            torch.testing.assert_close(found, expected)

    def test_is_what_the_sampler_reads_of_logits(self) -> None:
        shared = temperature(3, SamplerConfig())
        call = make(6, 200, 16, top=200, bans=True)
        call["temperature"] = shared.expand(6).contiguous()
        found = run(**call)
        logits = torch.tanh(call["hidden"] @ call["embedding"].T / SOFTCAP) * SOFTCAP
        bans = Bans(rows=call["banned"], places=call["ban_row"])
        ask = Ask(temperature=shared, banned=bans, weighed=call["targets"][None])
        expected = read_logits(logits[None], ask)
        assert torch.equal(found.argmax, expected.argmax[0])
        torch.testing.assert_close(found.log_probability, expected.log_probability[0])
        torch.testing.assert_close(found.entropy_nats, expected.entropy_nats[0])
        assert expected.weighed is not None
        torch.testing.assert_close(found.target_log_probability, expected.weighed[0])
        mean = call["embedding"].mean(0)
        told = belief(
            found.top_ids, found.top_probabilities, call["embedding"], mean, impl="reference"
        )
        assert isinstance(expected.belief, Tensor)
        torch.testing.assert_close(told, expected.belief[0].softmax(-1) @ call["embedding"])

    def test_draws_as_it_says(self) -> None:
        call = make(40, 300, 4, bans=True)
        found = run(**call)
        assert found.sample is not None
        shares = exact(call)[1].exp()
        expected = [drawn_slowly(*row) for row in zip(shares, call["uniforms"], strict=True)]
        assert found.sample.tolist() == expected

    def test_draws_each_token_as_often_as_it_should(self) -> None:
        count = 40_000
        call = make(1, 260, 4, seed=5)
        call |= {name: call[name].expand(count, -1) for name in ("hidden",)}
        call |= {"temperature": call["temperature"].expand(count).contiguous(), "targets": None}
        call["uniforms"] = torch.rand(count, 2, generator=torch.Generator().manual_seed(2))
        found = run(**call).sample
        assert found is not None
        share = exact(call | {"hidden": call["hidden"][:1]})[1][0].exp()
        seen = torch.bincount(found, minlength=260) / count
        assert ((seen - share).abs() <= 5 * (share * (1 - share) / count).sqrt() + 1e-4).all()

    @pytest.mark.parametrize("uniforms", [(0.0, 0.0), (1 - 2**-24, 1 - 2**-24)])
    def test_never_draws_what_is_banned(self, uniforms: tuple[float, float]) -> None:
        banned = torch.ones(1, 400, dtype=torch.bool)
        banned[0, [130, 140, 270]] = False
        call = given_scores(torch.zeros(1, 400), 1, banned=banned, ban_row=torch.tensor([0]))
        sample = run(**call | {"uniforms": torch.tensor([uniforms])}).sample
        assert sample is not None
        assert sample.tolist() == [270 if uniforms[0] == 0 else 130]

    def test_banned_tokens_come_last_with_no_probability(self) -> None:
        banned = torch.ones(1, 300, dtype=torch.bool)
        banned[0, [20, 200]] = False
        scores = torch.randn(1, 300)
        call = given_scores(scores, 5, banned=banned, ban_row=torch.tensor([0]))
        found = run(**call)
        assert set(found.top_ids[0, :2].tolist()) == {20, 200}
        assert found.top_ids[0, 2:].tolist() == [0, 1, 2]
        torch.testing.assert_close(found.top_probabilities.sum(), torch.tensor(1.0))
        assert found.top_probabilities[0, 2:].tolist() == [0, 0, 0]

    def test_a_ban_of_everything_is_seen(self) -> None:
        call = make(2, 300, 8, bans=True)
        call["banned"][:] = True
        found = run(**call)
        for field in ("entropy_nats", "log_probability", "top_probabilities"):
            assert getattr(found, field).isnan().all()
        assert found.sample is not None
        assert torch.equal(found.sample, found.argmax)
        assert found.target_log_probability is not None
        assert found.target_log_probability.isfinite().all()

    def test_a_large_banned_score_hides_nothing(self) -> None:
        scores = torch.tensor([[-9.0, -8.0, 9.0]])
        banned = torch.tensor([[False, False, True]])
        call = given_scores(scores, 2, banned=banned, ban_row=torch.tensor([0]))
        call["temperature"] = torch.tensor([0.05])
        found = run(**call)
        assert found.top_ids.tolist() == [[1, 0]]
        torch.testing.assert_close(found.top_probabilities.sum(), torch.tensor(1.0))

    def test_nan_is_seen_in_its_position(self) -> None:
        call = make(3, 300, 8)
        call["hidden"][1, 4] = NAN
        found = run(**call)
        for field in ("entropy_nats", "log_probability", "top_probabilities"):
            value = getattr(found, field)
            assert value[1].isnan().all()
            assert value[[0, 2]].isfinite().all()
        assert found.sample is not None
        assert found.sample[1] == found.argmax[1]
        assert ((found.top_ids >= 0) & (found.top_ids < 300)).all()

    def test_no_positions(self) -> None:
        found = run(**make(0, 300, 8, bans=True))
        assert found.top_ids.shape == found.top_probabilities.shape == (0, 4)
        assert found.argmax.shape == found.entropy_nats.shape == (0,)

    def test_only_what_is_asked_is_there(self) -> None:
        found = run(**make(2, 30, 8) | {"targets": None, "uniforms": None})
        assert found.sample is None
        assert found.target_log_probability is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 8).double()}, "hidden is torch.float64"),
        ({"embedding": torch.zeros(30, 9)}, r"expected \[V, D\] with D = 8"),
        ({"embedding": torch.zeros(30, 8).bfloat16()}, "embedding is torch.bfloat16 on cpu"),
        ({"embedding": torch.zeros(8, 30).T}, r"embedding has strides \(1, 30\)"),
        ({"softcap": 0.0}, "softcap=0.0"),
        ({"softcap": NAN}, "softcap=nan"),
        ({"top": 0}, "top=0: expected 1 to 30"),
        ({"top": 31}, "top=31: expected 1 to 30"),
        ({"temperature": torch.ones(3)}, r"temperature is \[3\], expected \[2\]"),
        ({"banned": torch.zeros(1, 30, dtype=torch.bool)}, "belong together"),
        (
            {"banned": torch.zeros(1, 31, dtype=torch.bool), "ban_row": torch.zeros(2).long()},
            r"banned is \[1, 31\], expected \[1, 30\]",
        ),
        (
            {"banned": torch.zeros(30, dtype=torch.bool), "ban_row": torch.zeros(2).long()},
            r"banned is \[30\], expected \[B, V\]",
        ),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "targets is torch.int32"),
        ({"uniforms": torch.zeros(2)}, r"uniforms is \[2\], expected \[2, 2\]"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**make(2, 30, 8) | changes)


def test_refuses_an_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="impl='tpu'"):
        head(**make(2, 30, 8), impl="tpu")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors could be moved")
def test_gpu_refuses_cpu_tensors() -> None:
    with pytest.raises(KernelUnavailable, match="needs a CUDA device"):
        head(**make(2, 30, 8), impl="gpu")


def close_calls() -> Tensor:
    """Scores [2, 300] that 16 bits do not tell apart, the best of them with the highest ids."""
    scores = torch.zeros(2, 300)
    scores[0, [3, 100, 131, 259, 290]] = 4.0 + torch.arange(5) * 2.0**-20
    scores[1, [3, 100, 131, 259, 290]] = torch.tensor([60.0, 61.0, 61.0, 62.0, 63.0])
    return scores


def _cases() -> dict[str, dict[str, Any]]:
    cases = {
        "1x1x3": make(1, 1, 3),
        "5x300x16-bans": make(5, 300, 16, top=8, bans=True),
        "2x800x40": make(2, 800, 40, top=3),  # more tiles than are kept
        "17x257x20": make(17, 257, 20, top=1),
        "2x200x64-top-64": make(2, 200, 64, top=64),
        "3x128x96-bfloat16": make(3, 128, 96, dtype=torch.bfloat16),
        "3x130x72-float16-bans": make(3, 130, 72, dtype=torch.float16, bans=True),
        "equals": make(3, 700, 2, top=8, whole=True),
        "equals-bans": make(3, 700, 2, top=8, whole=True, bans=True),
        "close-calls": given_scores(close_calls(), 4),
        "nothing-asked": make(2, 30, 8) | {"targets": None, "uniforms": None},
        "no-positions": make(0, 300, 8, bans=True),
    }
    mostly = given_scores(torch.randn(1, 300, generator=torch.Generator().manual_seed(3)), 5)
    mostly |= {"banned": torch.ones(1, 300, dtype=torch.bool), "ban_row": torch.tensor([0])}
    mostly["banned"][0, [20, 200]] = False
    cases["mostly-banned"] = mostly
    strided = make(4, 300, 32, bans=True)
    cases["strided"] = strided | {
        "hidden": torch.randn(32, 4).T,
        # Behind every row stands what must not be read.
        "embedding": torch.cat((torch.randn(300, 32), torch.full((300, 9), NAN)), 1)[:, :32],
        "temperature": torch.rand(8)[::2] + 0.3,
        "banned": torch.rand(600, 3).T[:, ::2] < 0.4,
        "uniforms": torch.rand(2, 4).T,
    }
    return cases


CASES = _cases()
for _index, _case in enumerate(CASES.values()):
    if _case["uniforms"] is not None:
        _case["uniforms"] = aimed(_case, _index)[:, :2]


def broken() -> dict[str, Any]:
    call = make(3, 300, 8, bans=True)
    call["hidden"][1, 4] = NAN
    call["banned"][2] = True
    call["ban_row"] = torch.tensor([0, 1, 2])
    return call


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("head")
    calls = CASES | {"broken": broken(), "too-many": make(1, 100, 4, top=65)}
    return dict(zip(calls, run_gpu("head", list(calls.values()), folder), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_gpu_decides_as_the_reference(name: str, gpu_results: dict[str, Any]) -> None:
    found, call = gpu_results[name], CASES[name]
    assert not isinstance(found, Exception), found
    found, expected = HeadReading(*found), run(**call)
    if len(call["hidden"]):
        check(found, call)
    for field in ("argmax", "top_ids", "sample"):
        mine, theirs = getattr(found, field), getattr(expected, field)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs), field
    if found.sample is not None and len(call["hidden"]):
        tokens = aimed(call, list(CASES).index(name))[:, 2].long()
        assert torch.equal(found.sample, tokens)


@pytest.mark.slow
def test_gpu_shows_nan_and_a_ban_of_everything(gpu_results: dict[str, Any]) -> None:
    found = HeadReading(*gpu_results["broken"])
    for field in ("entropy_nats", "log_probability", "top_probabilities"):
        value = getattr(found, field)
        assert value[1:].isnan().all(), field
        assert value[0].isfinite().all()
    assert found.sample is not None
    assert torch.equal(found.sample[1:], found.argmax[1:])
    assert ((found.top_ids >= 0) & (found.top_ids < 300)).all()
    assert found.target_log_probability is not None
    assert found.target_log_probability.isnan().tolist() == [False, True, False]


@pytest.mark.slow
def test_gpu_refuses_what_does_not_fit(gpu_results: dict[str, Any]) -> None:
    with pytest.raises(KernelUnavailable, match="the 65 best of 100 tokens"):
        raise gpu_results["too-many"]


SHARED_ARGUMENTS = {
    "hidden_ptr": "*bf16",
    "embedding_ptr": "*bf16",
    "temperature_ptr": "*fp32",
    "banned_ptr": "*i1",
    "ban_row_ptr": "*i64",
}
SHAPE = {
    "T": "i32",
    "V": "i32",
    "D": "i32",
    "stride_t": "i32",
    "stride_v": "i32",
    "stride_ban": "i32",
    "stride_stat": "i32",
    "tiles": "i32",
    "softcap": "fp32",
}
MULTIPLES_OF_16 = ("V", "D", "stride_t", "stride_v", "stride_ban", "tiles")
# Positions of a block, whether there are bans, architecture: the most registers of Triton 3.6.0,
# 3.7.1 and 3.9.0, and 10 % more.
SCORE_REGISTERS = {
    (16, False, 80): 86,
    (16, False, 90): 79,
    (64, True, 80): 139,
    (64, True, 89): 139,
    (64, True, 90): 132,
    (64, True, 120): 134,
    (128, False, 90): 244,
    (128, True, 89): 249,
}
# Tokens kept, architecture.
READ_REGISTERS = {(8, 80): 169, (8, 89): 169, (8, 90): 132, (8, 120): 138, (64, 90): 232}


def compiled_for(
    name: str, arguments: dict[str, str], constants: dict[str, Any], capability: int, warps: int
) -> Any:
    from infilld.kernels.gpu import head as module

    signature = SHARED_ARGUMENTS | arguments | SHAPE
    return compile_kernel(
        getattr(module, name),
        signature | dict.fromkeys(constants, "constexpr"),
        constants,
        capability=capability,
        warps=warps,
        aligned=(*(key for key in signature if key.endswith("_ptr")), *MULTIPLES_OF_16),
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize(("tokens", "bans", "capability"), SCORE_REGISTERS)
def test_scores_compile_without_spills(tokens: int, bans: bool, capability: int) -> None:
    compiled = compiled_for(
        "score_kernel",
        {"codes_ptr": "*i16", "stats_ptr": "*fp32"},
        {
            "BANNED": bans,
            "EVEN_D": True,
            "BLOCK_T": tokens,
            "BLOCK_V": 128,
            "BLOCK_D": 64,
            "INTERPRET": False,
        },
        capability,
        warps=4 if tokens < 64 else 8,
    )
    check_fits(compiled, capability, registers=SCORE_REGISTERS[tokens, bans, capability])
    is_wide = capability == 90 and tokens >= 64
    assert ("wgmma.mma_async" if is_wide else "mma.sync") in compiled.ptx


READ_ARGUMENTS = {
    "targets_ptr": "*i64",
    "uniforms_ptr": "*fp32",
    "codes_ptr": "*i16",
    "stats_ptr": "*fp32",
    "argmax_ptr": "*i64",
    "log_probability_ptr": "*fp32",
    "entropy_ptr": "*fp32",
    "top_ids_ptr": "*i64",
    "top_probabilities_ptr": "*fp32",
    "sample_ptr": "*i64",
    "target_log_ptr": "*fp32",
}


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize(("top", "capability"), READ_REGISTERS)
def test_readings_compile_without_spills(top: int, capability: int) -> None:
    compiled = compiled_for(
        "read_kernel",
        READ_ARGUMENTS,
        {
            "TOP": top,
            "BANNED": True,
            "UNBANNED_TOO": True,
            "SAMPLED": True,
            "TARGETS": True,
            "BLOCK_V": 128,
            "BLOCK_TILES": 2048,
            "KEPT_TILES": top,
            "CANDIDATES": 2 * top,
            "BLOCK_D": 512 if top <= 8 else 128,
        },
        capability,
        warps=8,
    )
    check_fits(compiled, capability, registers=READ_REGISTERS[top, capability])
