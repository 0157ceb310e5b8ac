import os
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import CAPABILITIES, check_fits, compile_kernel
from interpreter import run_gpu
from tolerances import assert_close
from torch import Tensor

from infilld.engine.config import LayerKind, ModelConfig, Rope
from infilld.engine.layers import Layer, RMSNorm, Rotation, gelu, rms_norm
from infilld.kernels._launch import KernelUnavailable
from infilld.kernels.attention_residual import attention_residual
from infilld.kernels.feed_forward_residual import LayerOutput, feed_forward_residual
from infilld.kernels.norm_rope import norm_rope
from infilld.kernels.prefix_attention import prefix_attention

EPS = 1e-6


def make(
    *, tokens: int, width: int, chosen: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    names = ("dense_weight", "expert_weight", "after_weight", "next_weight")
    weights = {name: (1 + torch.randn(width, generator=draw) / 4).to(dtype) for name in names}
    routes = tokens * chosen
    return {
        "residual": (torch.randn(tokens, width, generator=draw) * 3).to(dtype),
        "dense": (torch.randn(tokens, width, generator=draw) * 7).to(dtype),
        "expert_rows": torch.randn(routes, width, generator=draw).to(dtype),
        "place": torch.randperm(routes, generator=draw).to(torch.int32),
        **weights,
        "scalar": torch.tensor([0.7]).to(dtype),
        "eps": EPS,
    }


def widened(call: dict[str, Any]) -> dict[str, Any]:
    return {
        name: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in call.items()
    }


def run(call: dict[str, Any]) -> LayerOutput:
    return feed_forward_residual(**call, impl="reference")


def by_layers(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the engine's layers compute, once the experts' rows are there."""
    tokens = len(call["residual"])
    routed = torch.zeros_like(call["residual"])
    for token, places in enumerate(call["place"].view(tokens, -1).tolist()):
        for place in places:
            routed[token] += call["expert_rows"][place]
    total = rms_norm(call["dense"], call["dense_weight"], EPS)
    total = total + rms_norm(routed, call["expert_weight"], EPS)
    x = (call["residual"] + rms_norm(total, call["after_weight"], EPS)) * call["scalar"]
    return x, rms_norm(x, call["next_weight"], EPS)


class TestReference:
    """The definition is what the layers compute."""

    @pytest.mark.parametrize(
        ("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-6)], ids=str
    )
    @pytest.mark.parametrize(("tokens", "width", "chosen"), [(1, 1, 1), (5, 48, 8), (3, 67, 2)])
    def test_equals_the_layers(
        self, tokens: int, width: int, chosen: int, dtype: torch.dtype, bound: float
    ) -> None:
        call = make(tokens=tokens, width=width, chosen=chosen, dtype=dtype)
        for found, expected in zip(run(call), by_layers(call), strict=True):
            assert found.dtype == dtype
            assert (found - expected).abs().max() < bound

    def test_bfloat16_is_rounded_at_the_end(self) -> None:
        call = make(tokens=5, width=48, dtype=torch.bfloat16)
        wide = {
            n: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t
            for n, t in call.items()
        }
        for found, exact in zip(run(call), run(wide), strict=True):
            assert torch.equal(found, exact.bfloat16())

    def test_rows_are_found_by_place(self) -> None:
        call = make(tokens=4, width=16)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        moved = call | {
            "expert_rows": call["expert_rows"][order],
            "place": order.argsort()[call["place"].long()].to(torch.int32),
        }
        assert all(torch.equal(a, b) for a, b in zip(run(moved), run(call), strict=True))

    def test_scalar_multiplies_the_state(self) -> None:
        call = make(tokens=4, width=16)
        once, twice = run(call), run(call | {"scalar": call["scalar"] * 2})
        assert torch.equal(twice.x, once.x * 2)
        assert torch.allclose(twice.normed, once.normed, atol=1e-5)

    def test_empty(self) -> None:
        assert [each.shape for each in run(make(tokens=0, width=8))] == [(0, 8)] * 2


CONFIG = ModelConfig(
    vocab_tokens=32,
    width=24,
    layers=2,
    heads=4,
    dense_width=20,
    experts=6,
    experts_per_token=3,
    expert_width=12,
    sliding_window=5,
    rms_eps=EPS,
    softcap=30.0,
    canvas_tokens=16,
    max_positions=64,
    layer_kinds=("sliding", "full"),
    key_heads={"sliding": 2, "full": 1},
    head_sizes={"sliding": 8, "full": 16},
    ropes={
        "sliding": Rope(theta=1e4, rotary_fraction=1.0),
        "full": Rope(theta=1e6, rotary_fraction=0.25),
    },
    eos_ids=(1,),
    pad_id=0,
    bos_id=2,
)


@torch.no_grad()
def layer_of_operations(
    layer: Layer, kind: LayerKind, x: Tensor, rotary: tuple[Tensor, Tensor], following: RMSNorm
) -> LayerOutput:
    """A causal layer over tokens [T, D], of operations and plain products."""
    attention, window = layer.self_attn, CONFIG.sliding_window if kind == "sliding" else None
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([each.weight for each in projections if each is not None])
    key_heads, size = CONFIG.key_heads[kind], CONFIG.head_sizes[kind]
    q, k, v = norm_rope(
        layer.input_layernorm(x) @ weight.T,
        attention.q_norm.weight,
        attention.k_norm.weight,
        *rotary,
        heads=CONFIG.heads,
        key_heads=key_heads,
        eps=EPS,
        impl="reference",
    )
    none = x.new_empty(1, key_heads, 0, size)
    zero = torch.zeros(1, dtype=torch.int32)
    attended = prefix_attention(
        q, k, v, none, none, zero, zero, window=window, writes=False, impl="reference"
    )
    residual, dense_in, expert_in, router_in = attention_residual(
        x,
        attention.o_proj(attended),
        layer.post_attention_layernorm.weight,
        layer.pre_feedforward_layernorm.weight,
        layer.pre_feedforward_layernorm_2.weight,
        layer.router.scale,
        eps=EPS,
        impl="reference",
    )
    weights, ids = layer.router.proj(router_in).softmax(-1).topk(CONFIG.experts_per_token)
    weights = weights / weights.sum(-1, keepdim=True) * layer.router.per_expert_scale[ids]
    gate, up = torch.einsum("td,tkfd->tkf", expert_in, layer.experts.gate_up_proj[ids]).chunk(
        2, dim=-1
    )
    down = layer.experts.down_proj[ids]
    rows = torch.einsum("tkf,tkdf->tkd", gelu(gate) * up, down) * weights[..., None]
    place = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(0))
    return feed_forward_residual(
        residual,
        layer.mlp(dense_in),
        rows.flatten(0, 1)[place.argsort()],
        place.to(torch.int32),
        layer.post_feedforward_layernorm_1.weight,
        layer.post_feedforward_layernorm_2.weight,
        layer.post_feedforward_layernorm.weight,
        following.weight,
        layer.layer_scalar,
        eps=EPS,
        impl="reference",
    )


@pytest.mark.parametrize("kind", ["sliding", "full"])
@torch.no_grad()
def test_operations_make_a_layer(kind: LayerKind) -> None:
    draw = torch.Generator().manual_seed(1)
    layer, following = Layer(CONFIG, kind), RMSNorm(CONFIG.width, EPS)
    for parameter in (*layer.parameters(), *following.parameters(), layer.layer_scalar):
        near = 1.0 if parameter.ndim == 1 else 0.0
        parameter.copy_(near + torch.randn(parameter.shape, generator=draw) / 4)
    x = torch.randn(9, CONFIG.width, generator=draw)
    rotary = Rotation(CONFIG.ropes[kind], CONFIG.head_sizes[kind])(torch.arange(9), x.dtype)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    mask = distance >= 0
    if kind == "sliding":
        mask &= distance < CONFIG.sliding_window

    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=1.0, enable_gqa=True
        )

    expected = layer(x[None], rotary, attend, 0, layer.layer_scalar)[0]
    found = layer_of_operations(layer, kind, x, rotary, following)
    assert (found.x - expected).abs().max() < 2e-5
    assert (found.normed - following(expected)).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("residual", lambda t: t[0], r"residual is \[8\], expected \[T, D\]"),
        ("dense", lambda t: t[1:], r"dense is \[1, 8\], expected \[2, 8\]"),
        ("dense", lambda t: t.bfloat16(), "dense is torch.bfloat16"),
        ("expert_rows", lambda t: t[1:], r"expert_rows is \[5, 8\], expected \[6, 8\]"),
        ("place", lambda t: t[1:], "place has 5 routes for 2 tokens, expected k for each"),
        ("place", lambda t: t[:0], "place has 0 routes for 2 tokens"),
        ("place", lambda t: t.long(), "place is torch.int64"),
        ("next_weight", lambda t: t[1:], r"next_weight is \[7\], expected \[8\]"),
        ("scalar", lambda t: t[0], r"scalar is \[\], expected \[1\]"),
    ],
)
def test_refuses(name: str, change: Any, message: str) -> None:
    call = make(tokens=2, width=8)
    with pytest.raises(ValueError, match=message):
        run(call | {name: change(call[name])})


def test_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="expected 'gpu' or 'reference'"):
        feed_forward_residual(**make(tokens=2, width=8), impl="cuda")  # type: ignore[arg-type]


BF16 = torch.bfloat16
CASES = {
    "one-number": make(tokens=1, width=1),
    "odd-width": make(tokens=3, width=67),
    "a-power-of-two": make(tokens=2, width=256),
    "bfloat16": make(tokens=5, width=96, dtype=BF16),
    "real-width": make(tokens=2, width=2816, dtype=BF16),
    "empty": make(tokens=0, width=8),
    "one-expert": make(tokens=3, width=20, chosen=1),
    "eight-experts": make(tokens=3, width=40, chosen=8, dtype=BF16),
}
_WIDE = make(tokens=4, width=48)
CASES["strided"] = _WIDE | {
    name: torch.cat((_WIDE[name], torch.full((len(_WIDE[name]), 5), float("nan"))), dim=1)[:, :48]
    for name in ("residual", "dense", "expert_rows")
}
CASES["transposed"] = _WIDE | {"expert_rows": _WIDE["expert_rows"].T.contiguous().T}


@pytest.fixture(scope="module")
def gpu_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("feed_forward_residual")
    calls = CASES | {"float64": make(tokens=2, width=8, dtype=torch.float64)}
    return dict(
        zip(calls, run_gpu("feed_forward_residual", list(calls.values()), folder), strict=True)
    )


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
    with pytest.raises(KernelUnavailable, match="feed_forward_residual: float64"):
        raise gpu_results["float64"]


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_without_spills(capability: int, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from infilld.kernels.gpu._rows import row_warps
    from infilld.kernels.gpu.feed_forward_residual import feed_forward_residual_kernel

    pointers = (
        "residual",
        "dense",
        "expert_rows",
        "place",
        "dense_weight",
        "expert_weight",
        "after_weight",
        "next_weight",
        "scalar",
        "x",
        "normed",
    )
    strides = ("residual_stride", "dense_stride", "expert_stride")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        compiled = compile_kernel(
            feed_forward_residual_kernel,
            {f"{name}_ptr": "*bf16" for name in pointers}
            | {"place_ptr": "*i32"}
            | dict.fromkeys(strides, "i32")
            | dict.fromkeys(("eps",), "fp32")
            | dict.fromkeys(("D", "CHOSEN", "BLOCK_D"), "constexpr"),
            {"D": 2816, "CHOSEN": 8, "BLOCK_D": 4096},
            capability=capability,
            warps=row_warps(4096),
            aligned=(*(f"{name}_ptr" for name in pointers), *strides),
        )
    check_fits(compiled, capability, registers=58)
