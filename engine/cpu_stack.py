"""The layers as a CPU runs them: float32, weights packed once, few operations.

A canvas of 32 tokens is a hundred kilobytes: what surrounds the products costs more in calls than
in numbers, and each product that is split among cores waits for the slowest. So there is one
product for queries, keys and values, one for all experts, and the factors that norms, rotations
and scales share are multiplied into the weights once.
"""

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.engine.config import LayerKind, ModelConfig
from infilld.engine.layers import Rotary, Rotation
from infilld.engine.stack import AttendTokens, Projection, Stack, StackLayer
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.cpu.attention_residual import attention_residual
from infilld.kernels.cpu.experts import ExpertWeights
from infilld.kernels.cpu.feed_forward_residual import feed_forward_residual
from infilld.kernels.cpu.gated import gated
from infilld.kernels.cpu.head import head
from infilld.kernels.cpu.norm import root
from infilld.kernels.cpu.norm_rope import head_weights, norm_rope
from infilld.kernels.cpu.packed import PackedWeight
from infilld.kernels.cpu.route import route
from infilld.kernels.head import HeadReading
from infilld.kernels.route import Routes
from infilld.kernels.route import route as defined_route

# Positions whose cosines and sines are computed at once.
_TABLE_STEP = 1024


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer's weights as they are used. Those of norms over D are times sqrt(D)."""

    kind: LayerKind
    qkv: PackedWeight
    out: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    router: Tensor
    experts: ExpertWeights
    heads: Tensor
    after_attention: Tensor
    before_dense: Tensor
    before_experts: Tensor
    per_expert_scale: Tensor
    after_dense: Tensor
    after_experts: Tensor
    after_feed_forward: Tensor
    next_norm: Tensor
    decoder_scalar: Tensor
    encoder_scalar: Tensor


class CpuStack(Stack):
    """What `Stack` computes with plain float32 weights, in another form.

    Args:
        config: shapes. tensors: by name, all plain; they are taken out one by one.
    """

    def __init__(
        self, config: ModelConfig, tensors: MutableMapping[str, Tensor | QuantizedWeight]
    ) -> None:
        super().__init__(
            config,
            tensors,
            device=torch.device("cpu"),
            dtype=torch.float32,
            impl="reference",
        )
        self._wide = math.sqrt(config.width)
        self._head = PackedWeight(self.embedding)
        self._first_norm = self._first_norm * self._wide
        self._belief_norm = self._belief_norm * self._wide
        self._packed_belief_gate_up = _packed(self._belief_gate_up)
        self._packed_belief_down = _packed(self._belief_down)
        self._packed_layers: list[_Layer] = []
        while self.layers:
            # Taken out, so that no more than one layer is held in both forms.
            self._packed_layers.append(self._packed_layer(self.layers.pop(0)))
        self._tables: dict[LayerKind, Rotary] = {}

    def embed_belief(self, ids: Tensor, probabilities: Tensor) -> Tensor:
        """See `Stack.embed_belief`."""
        rest = (1.0 - probabilities.sum(-1, keepdim=True)).clamp_(min=0.0)
        known = F.embedding_bag(ids, self.embedding, per_sample_weights=probabilities, mode="sum")
        return known.addcmul_(rest, self.mean_embedding).mul_(self._embedding_scale)

    def condition(self, embedded: Tensor, signal: Tensor | None) -> Tensor:
        """See `Stack.condition`."""
        eps = self.config.rms_eps
        if signal is not None:
            normed = signal / root(signal, eps) * self._belief_norm
            hidden = gated(self._packed_belief_gate_up(normed))
            embedded = embedded + self._packed_belief_down(hidden)
        return embedded / root(embedded, eps) * self._wide

    def run(
        self,
        x: Tensor,
        positions: Tensor,
        attend: AttendTokens,
        *,
        is_encoder: bool,
        routed_as: Tensor | None = None,
        on_routes: Callable[[int, Routes], None] | None = None,
    ) -> Tensor:
        """See `Stack.run`."""
        config = self.config
        eps, chosen = config.rms_eps, config.experts_per_token
        rotary = {kind: self._turns(kind, positions) for kind in config.kinds}
        normed = x / root(x, eps) * self._first_norm
        for number, layer in enumerate(self._packed_layers):
            q, k, v = norm_rope(
                layer.qkv(normed),
                layer.heads,
                *rotary[layer.kind],
                key_heads=config.key_heads[layer.kind],
                eps=eps,
            )
            attended = layer.out(attend(number, q, k, v))
            residual, unit = attention_residual(x, attended, layer.after_attention, eps=eps)
            dense = layer.down(gated(layer.gate_up(unit * layer.before_dense)))
            scores = F.linear(unit, layer.router)
            if routed_as is not None:
                scores = scores.index_select(0, routed_as)
            if on_routes is not None:
                scale = layer.per_expert_scale
                on_routes(number, defined_route(scores, scale, chosen=chosen, impl="reference"))
            ids, weights = route(scores, layer.per_expert_scale, chosen=chosen)
            routed = layer.experts(unit * layer.before_experts, ids, weights)
            x, normed = feed_forward_residual(
                residual,
                dense,
                routed,
                layer.after_dense,
                layer.after_experts,
                layer.after_feed_forward,
                layer.next_norm,
                layer.encoder_scalar if is_encoder else layer.decoder_scalar,
                eps=eps,
            )
        return normed

    def read_head(
        self,
        hidden: Tensor,
        *,
        temperature: Tensor,
        top: int,
        banned: Tensor | None = None,
        ban_row: Tensor | None = None,
        targets: Tensor | None = None,
        uniforms: Tensor | None = None,
    ) -> HeadReading:
        """See `Stack.read_head`."""
        return HeadReading(
            *head(
                hidden,
                self._head,
                softcap=self.config.softcap,
                temperature=temperature,
                top=top,
                banned=banned,
                ban_row=ban_row,
                targets=targets,
                uniforms=uniforms,
            )
        )

    def _turns(self, kind: LayerKind, positions: Tensor) -> Rotary:
        """Cosines and sines [T, 1, A] as `norm_rope` reads them, from a table that grows."""
        needed = int(positions.max()) + 1 if len(positions) else 1
        if kind not in self._tables or len(self._tables[kind][0]) < needed:
            rotation: Rotation = self._rotations[kind]
            size = -(-needed // _TABLE_STEP) * _TABLE_STEP
            cosine, sine = rotation(torch.arange(size), torch.float32)
            left, right = sine.chunk(2, dim=-1)
            self._tables[kind] = (cosine[:, None], torch.cat((-left, right), dim=-1)[:, None])
        cosine, sine = self._tables[kind]
        return cosine.index_select(0, positions), sine.index_select(0, positions)

    def _packed_layer(self, layer: StackLayer) -> _Layer:
        config, wide = self.config, self._wide
        assert isinstance(layer.experts_gate_up, Tensor)
        assert isinstance(layer.experts_down, Tensor)
        return _Layer(
            kind=layer.kind,
            qkv=_packed(layer.qkv),
            out=_packed(layer.out),
            gate_up=_packed(layer.gate_up),
            down=_packed(layer.down),
            # The router's norm has no weight, and divides by sqrt(D) what the norm multiplies.
            router=layer.router * layer.router_scale,
            experts=ExpertWeights(layer.experts_gate_up, layer.experts_down),
            heads=head_weights(
                layer.q_norm,
                layer.k_norm,
                heads=config.heads,
                key_heads=config.key_heads[layer.kind],
            ),
            after_attention=layer.after_attention * wide,
            before_dense=layer.before_dense * wide,
            before_experts=layer.before_experts * wide,
            per_expert_scale=layer.per_expert_scale,
            after_dense=layer.after_dense * wide,
            after_experts=layer.after_experts * wide,
            after_feed_forward=layer.after_feed_forward * wide,
            next_norm=layer.next_norm * wide,
            decoder_scalar=layer.decoder_scalar,
            encoder_scalar=layer.encoder_scalar,
        )


def _packed(projection: Projection) -> PackedWeight:
    (weight,) = projection.weights
    assert isinstance(weight, Tensor)
    return PackedWeight(weight)
