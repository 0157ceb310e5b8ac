"""The blocks of DiffusionGemma. They know nothing of prefixes, canvases or caches.

Attention is handed in: a layer computes queries, keys and values and asks `attend` for the
result, so that encoding, denoising, scoring and training share every weight and every line here.
Attribute names are the checkpoint's names.

Source: transformers 5.23.0, models/diffusion_gemma (semantics); parity.md lists the traps.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infilld.engine.config import LayerKind, ModelConfig, Rope

# (layer, q [B, H, N, A], k [B, K, N, A], v [B, K, N, A]) -> [B, H, N, A]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# cosine and sine, each [N, A]
Rotary = tuple[Tensor, Tensor]

# Up to this many experts every token visits all of them as one batched product: with few
# experts the arithmetic saved by routing is less than the launches and gathers it costs.
DENSE_EXPERTS = 8


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last axis, computed in float32, returned in x's dtype."""
    wide = x.float()
    normed = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        normed = normed * weight.float()
    return normed.to(x.dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn x [B, heads, N, A] by its positions; pairs are (i, i + A/2)."""
    cosine, sine = rotary
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-right, left), dim=-1) * sine


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU; the exact form is measurably wrong for this model."""
    return F.gelu(x, approximate="tanh")


class RMSNorm(nn.Module):
    """RMS norm over the last axis; the weight multiplies as it is (no `1 + w`)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Norm of x [..., width], same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


class Rotation(nn.Module):
    """Cosines and sines of positions, for one kind of layer."""

    frequencies: Tensor

    def __init__(self, rope: Rope, head_size: int) -> None:
        super().__init__()
        self.rope, self.head_size = rope, head_size
        self.register_buffer("frequencies", self.inverse_frequencies(), persistent=False)

    def inverse_frequencies(self) -> Tensor:
        """Radians per position [A / 2], float32; pairs beyond the rotary fraction do not turn."""
        turning = int(self.rope.rotary_fraction * self.head_size // 2)
        exponent = torch.arange(0, 2 * turning, 2, dtype=torch.float32) / self.head_size
        still = torch.zeros(self.head_size // 2 - turning)
        return torch.cat((1.0 / (self.rope.theta**exponent), still))

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Cosine and sine [N, A] of positions [N]; angles in float32, result in dtype."""
        angles = positions[:, None].float() * self.frequencies
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(dtype), both.sin().to(dtype)


class Attention(nn.Module):
    """Projections, norms and rotary of one layer.

    Full layers have no `v_proj`: the value is the key projection, taken before k_norm and rotary.
    There is no 1/sqrt(A): queries and keys are normed instead.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        heads, keys = config.heads, config.key_heads[kind]
        self.head_size, self.eps = config.head_sizes[kind], config.rms_eps
        self.q_proj = nn.Linear(config.width, heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(config.width, keys * self.head_size, bias=False)
        self.v_proj = (
            nn.Linear(config.width, keys * self.head_size, bias=False)
            if kind == "sliding"
            else None
        )
        self.o_proj = nn.Linear(heads * self.head_size, config.width, bias=False)
        self.q_norm = RMSNorm(self.head_size, self.eps)
        self.k_norm = RMSNorm(self.head_size, self.eps)

    def forward(self, x: Tensor, rotary: Rotary, attend: Attend, layer: int) -> Tensor:
        """Attention output [B, N, D] of x [B, N, D]."""
        query = rotate(self.q_norm(self._heads(self.q_proj(x))), rotary)
        key = self._heads(self.k_proj(x))
        value = key if self.v_proj is None else self._heads(self.v_proj(x))
        key = rotate(self.k_norm(key), rotary)
        out = attend(layer, query, key, rms_norm(value, None, self.eps))
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_size).transpose(1, 2)


class GatedMLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as x [..., width]."""
        out: Tensor = self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Router(nn.Module):
    """Picks experts from the *raw residual*, which it norms itself (without weight)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.root, self.chosen = (
            config.rms_eps,
            config.width**-0.5,
            config.experts_per_token,
        )
        self.proj = nn.Linear(config.width, config.experts, bias=False)
        self.scale = nn.Parameter(torch.ones(config.width))
        self.per_expert_scale = nn.Parameter(torch.ones(config.experts))

    def forward(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and expert ids, each [T, experts_per_token], for residual [T, D]."""
        scores = self.proj(rms_norm(residual, None, self.eps) * self.scale * self.root)
        weights, ids = scores.softmax(-1, dtype=torch.float32).topk(self.chosen, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.per_expert_scale[ids], ids


class Experts(nn.Module):
    """E gated MLPs as two 3-D tensors, gate rows first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.experts, config.width, config.expert_width
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.dense = experts <= DENSE_EXPERTS

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Weighted sum of the chosen experts: x [T, D], weights and ids [T, k] -> [T, D]."""
        return self._all(x, weights, ids) if self.dense else self._chosen(x, weights, ids)

    def _all(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        experts = self.gate_up_proj.shape[0]
        share = torch.zeros(len(x), experts, dtype=weights.dtype, device=x.device)
        share = share.scatter_add(1, ids, weights)
        gate, up = torch.matmul(x, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.matmul(gelu(gate) * up, self.down_proj.transpose(1, 2))
        return (out * share.T[:, :, None]).sum(0).to(x.dtype)

    def _chosen(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in sorted(set(ids.flatten().tolist())):
            token, place = torch.where(ids == expert)
            gate, up = F.linear(x[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            part = F.linear(gelu(gate) * up, self.down_proj[expert])
            part = part * weights[token, place, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


class Layer(nn.Module):
    """Attention, then a dense MLP and routed experts side by side on the same residual.

    `layer_scalar` belongs to the decoder; the encoder has its own and passes it in.
    """

    layer_scalar: Tensor

    def __init__(self, config: ModelConfig, kind: LayerKind) -> None:
        super().__init__()
        width, eps = config.width, config.rms_eps
        self.self_attn = Attention(config, kind)
        self.mlp = GatedMLP(width, config.dense_width)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.pre_feedforward_layernorm = RMSNorm(width, eps)
        self.post_feedforward_layernorm = RMSNorm(width, eps)
        self.post_feedforward_layernorm_1 = RMSNorm(width, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(width, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(width, eps)
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(
        self, x: Tensor, rotary: Rotary, attend: Attend, layer: int, scalar: Tensor
    ) -> Tensor:
        """Next hidden state [B, N, D] of x [B, N, D]; `scalar` [1] multiplies the result."""
        attended = self.self_attn(self.input_layernorm(x), rotary, attend, layer)
        residual = x + self.post_attention_layernorm(attended)
        out: Tensor = (residual + self._feed_forward(residual)) * scalar
        return out

    def _feed_forward(self, residual: Tensor) -> Tensor:
        dense = self.post_feedforward_layernorm_1(
            self.mlp(self.pre_feedforward_layernorm(residual))
        )
        tokens = residual.flatten(0, -2)
        weights, ids = self.router(tokens)
        routed = self.experts(self.pre_feedforward_layernorm_2(tokens), weights, ids)
        routed = self.post_feedforward_layernorm_2(routed.view_as(residual))
        out: Tensor = self.post_feedforward_layernorm(dense + routed)
        return out


class SelfConditioning(nn.Module):
    """Adds the last step's belief to the canvas embeddings, then norms the sum without weight.

    The norm stands *after* the addition, and also in the first step, where the signal is zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_eps
        self.pre_norm = RMSNorm(config.width, config.rms_eps)
        self.gate_proj = nn.Linear(config.width, config.dense_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.dense_width, bias=False)
        self.down_proj = nn.Linear(config.dense_width, config.width, bias=False)

    def forward(self, embedded: Tensor, signal: Tensor | None) -> Tensor:
        """Decoder input [R, L, D] from token embeddings and the belief's embedding [R, L, D]."""
        if signal is not None:
            normed = self.pre_norm(signal)
            hidden = gelu(self.gate_proj(normed)) * self.up_proj(normed)
            embedded = embedded + self.down_proj(hidden)
        return rms_norm(embedded, None, self.eps)
