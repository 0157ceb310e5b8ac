"""What a CPU runs gives what the operations' definitions give."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.kernels.cpu import experts, packed
from infilld.kernels.cpu.attention_residual import attention_residual
from infilld.kernels.cpu.experts import ExpertWeights
from infilld.kernels.cpu.feed_forward_residual import feed_forward_residual
from infilld.kernels.cpu.gated import gated
from infilld.kernels.cpu.head import head
from infilld.kernels.cpu.norm_rope import head_weights, norm_rope
from infilld.kernels.cpu.packed import PackedWeight, Way, fastest, fits_half
from infilld.kernels.cpu.route import route
from infilld.kernels.reference.attention_residual import attention_residual as defined_attention
from infilld.kernels.reference.feed_forward_residual import feed_forward_residual as defined_layer
from infilld.kernels.reference.head import head as defined_head
from infilld.kernels.reference.norm_rope import norm_rope as defined_rope
from infilld.kernels.route import route as defined_route

EPS = 1e-6
# Both are float32; they add and multiply in different orders.
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 2e-5}
TOKENS = pytest.mark.parametrize("tokens", [0, 1, 7, 64])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def bf16_weight(*shape: int) -> Tensor:
    """Random float32 numbers that bfloat16 holds, as those of a checkpoint."""
    return torch.randn(shape).div(shape[-1] ** 0.5).bfloat16().float()


class TestNorms:
    @TOKENS
    @pytest.mark.parametrize("values", [0, 2], ids=["values-are-keys", "values"])
    def test_norm_rope(self, tokens: int, values: int) -> None:
        heads, keys, size = 4, 2, 8
        qkv = torch.randn(tokens, (heads + keys + values) * size) * 3
        q_weight, k_weight = torch.rand(size) + 0.5, torch.rand(size) + 0.5
        angles = torch.rand(tokens, size // 2) * 9
        cosine, sine = (torch.cat((each, each), -1) for each in (angles.cos(), angles.sin()))
        signed = torch.cat((-angles.sin(), angles.sin()), -1)
        ours = norm_rope(
            qkv,
            head_weights(q_weight, k_weight, heads=heads, key_heads=keys),
            cosine[:, None],
            signed[:, None],
            key_heads=keys,
            eps=EPS,
        )
        defined = defined_rope(
            qkv, q_weight, k_weight, cosine, sine, heads=heads, key_heads=keys, eps=EPS
        )
        for mine, theirs in zip(ours, defined, strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)

    @pytest.mark.parametrize("tokens", [1, 7, 64])
    @pytest.mark.parametrize("size", [1.0, 1e-4], ids=["large", "as small as eps"])
    def test_residuals(self, tokens: int, size: float) -> None:
        width, k = 24, 2
        x, attended, dense = torch.randn(3, tokens, width).unbind()
        x, attended, dense = x * size, attended * size, dense * size
        rows = torch.randn(tokens * k, width) * size
        place = torch.randperm(tokens * k)
        weights = [torch.rand(width) + 0.5 for _ in range(8)]
        wide = width**0.5
        residual, unit = attention_residual(x, attended, weights[0] * wide, eps=EPS)
        norms = [unit * weights[n] * wide for n in (1, 2)]
        defined = defined_attention(x, attended, *weights[:4], eps=EPS)
        router_in = unit * weights[3]
        for mine, theirs in zip((residual, *norms, router_in), defined, strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)

        scalar = torch.tensor([0.7])
        routed = rows[place].view(tokens, k, width).sum(1)
        first, second, third, last = weights[4:]
        found = feed_forward_residual(
            residual,
            dense,
            routed,
            first * wide,
            second * wide,
            third * wide,
            last * wide,
            scalar,
            eps=EPS,
        )
        expected = defined_layer(
            residual, dense, rows, place, first, second, third, last, scalar, eps=EPS
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, **CLOSE)

    def test_gated(self) -> None:
        both = torch.linspace(-30, 30, 4096).view(4, 1024)
        gate, up = both.chunk(2, -1)
        exact = F.gelu(gate.double(), approximate="tanh") * up
        torch.testing.assert_close(gated(both).double(), exact, atol=2e-5, rtol=1e-5)


class TestExperts:
    @TOKENS
    def test_route(self, tokens: int) -> None:
        scores, scale = torch.randn(tokens, 12), torch.rand(12) + 0.5
        scores[:, 3] = scores[:, 5]  # a tie goes to the lower id
        ids, weights = route(scores, scale, chosen=3)
        defined = defined_route(scores, scale, chosen=3, impl="reference")
        assert torch.equal(ids, defined.ids)
        torch.testing.assert_close(weights, defined.weights, **CLOSE)

    @pytest.mark.parametrize("tokens", [1, 7, 64])
    @pytest.mark.parametrize("path", ["_all", "_all_packed", "_padded", "_grouped"])
    @pytest.mark.parametrize("is_skewed", [False, True])
    def test_every_path(
        self, tokens: int, path: str, is_skewed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        count, width, hidden, k = 6, 16, 8, 2
        gate_up, down = bf16_weight(count, 2 * hidden, width), bf16_weight(count, width, hidden)
        x, scores = torch.randn(tokens, width), torch.randn(tokens, count)
        if is_skewed:
            scores[:, 4] += 100
        weights, ids = scores.softmax(-1).topk(k, -1)
        monkeypatch.setattr(experts, "MOST_IN_VAIN", 10**9 if path == "_all" else -1)
        monkeypatch.setattr(experts, "SPARE_ROWS", 10**9 if path == "_padded" else -(10**9))
        monkeypatch.setattr(experts, "MOST_PACKED_ROWS", 10**9 if path == "_all_packed" else -1)
        if path == "_all_packed" and "half" not in fastest(torch.float32):
            pytest.skip("this torch has no half precision products")
        monkeypatch.setattr(experts, "fastest", lambda dtype: ("half",))
        taken: list[str] = []
        monkeypatch.setattr(ExpertWeights, path, _noting(getattr(ExpertWeights, path), taken))
        out = ExpertWeights(gate_up, down)(x, ids, weights)
        assert taken == [path]
        torch.testing.assert_close(out, _one_by_one(x, gate_up, down, ids, weights), **CLOSE)


def _noting(method: Callable[..., Tensor], taken: list[str]) -> Callable[..., Tensor]:
    def noted(*args: Any) -> Tensor:
        taken.append(method.__name__)
        return method(*args)

    return noted


def _one_by_one(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, share in zip(ids[token].tolist(), weights[token], strict=True):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            out[token] += share * (down[expert] @ (F.gelu(gate, approximate="tanh") * up))
    return out


class TestPacked:
    @pytest.mark.parametrize("way", ["plain", "blocked", "half"])
    @pytest.mark.parametrize("tokens", [0, 1, 33])
    def test_every_way(self, way: Way, tokens: int) -> None:
        if way not in fastest(torch.float32):
            pytest.skip(f"this torch has no {way} products")
        weight, x = bf16_weight(48, 32), torch.randn(tokens, 32)
        made = PackedWeight(weight, way)
        assert (made.shape, made.way) == ((48, 32), way)
        torch.testing.assert_close(made(x), x @ weight.T, **CLOSE)

    def test_half_holds_bfloat16_numbers_and_not_float32_ones(self) -> None:
        weight = bf16_weight(64, 64)
        assert fits_half(weight)
        assert not fits_half(torch.randn(64, 64))
        assert not fits_half(weight * 1e6)

    def test_no_layout_that_loses_numbers_is_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packed, "fastest", lambda dtype: ("half", "plain"))
        assert PackedWeight(torch.randn(8, 8)).way == "plain"
        assert PackedWeight(bf16_weight(8, 8)).way == "half"

    def test_what_this_torch_lacks_is_left_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lacking(weight: Tensor) -> Any:
            raise AttributeError("no such library")

        monkeypatch.setitem(packed._PACKERS, "blocked", lacking)
        monkeypatch.setitem(packed._PACKERS, "half", lacking)
        assert fastest.__wrapped__(torch.float32) == ("plain",)


class TestHead:
    @pytest.mark.parametrize("tokens", [0, 1, 70])
    @pytest.mark.parametrize("vocab", [256, 300])
    @pytest.mark.parametrize("is_asked_more", [False, True])
    def test_every_field(
        self, tokens: int, vocab: int, is_asked_more: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("infilld.kernels.cpu.head.LARGEST_SCORES", 1)
        embedding, hidden = bf16_weight(vocab, 32) * 8, torch.randn(tokens, 32)
        more: dict[str, Any] = {"banned": None, "ban_row": None, "targets": None, "uniforms": None}
        if is_asked_more:
            more = {
                "banned": torch.rand(2, vocab) < 0.5,
                "ban_row": torch.randint(2, (tokens,)),
                "targets": torch.randint(vocab, (tokens,)),
                "uniforms": torch.rand(tokens, 2),
            }
        options = {"softcap": 30.0, "temperature": torch.rand(tokens) + 0.4, "top": 5, **more}
        ours = head(hidden, PackedWeight(embedding, "plain"), **options)
        for mine, theirs in zip(ours, defined_head(hidden, embedding, **options), strict=True):
            if theirs is None:
                assert mine is None
            else:
                torch.testing.assert_close(mine, theirs, **CLOSE)

    def test_nothing_but_banned_tokens_is_not_a_distribution(self) -> None:
        found = head(
            torch.randn(1, 8),
            PackedWeight(torch.randn(128, 8), "plain"),
            softcap=30.0,
            temperature=torch.ones(1),
            top=2,
            banned=torch.ones(1, 128, dtype=torch.bool),
            ban_row=torch.zeros(1, dtype=torch.int64),
            targets=None,
            uniforms=None,
        )
        assert found[2].isnan().all()
