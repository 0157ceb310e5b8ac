"""The layers as they are run: fused weights, joined operations, plain or in few bits.

`model.py` is the definition of the model and what training changes; this is the same computation
over `kernels/`, for inference alone. Which implementation of an operation runs is decided once.

    x, normed ─qkv─▶ norm, rotate ─▶ attend ─out─▶ + residual ─┬─ dense MLP ────────┐
                                                               ├─ router ─▶ routes  │
                                                               └─ experts ◀┘ ─rows──┴─▶ x, normed
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.engine.config import LayerKind, ModelConfig
from infilld.engine.layers import Rotary, Rotation, gelu, rms_norm
from infilld.kernels._tiles import TiledWeight
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.attention_residual import attention_residual
from infilld.kernels.belief import belief as expected_embedding
from infilld.kernels.expert_down import expert_down
from infilld.kernels.expert_gate_up import expert_gate_up
from infilld.kernels.feed_forward_residual import feed_forward_residual
from infilld.kernels.head import HeadReading, head
from infilld.kernels.linear import linear
from infilld.kernels.norm_rope import norm_rope
from infilld.kernels.quant_pack import quant_pack
from infilld.kernels.route import Routes, route

# A large embedding widened to float32 at once would be most of a small GPU.
_SUMMED_ROWS = 8192

Impl: TypeAlias = Literal["gpu", "reference"]
Weight: TypeAlias = Tensor | QuantizedWeight | TiledWeight
# (layer, q [T, H, A], k [T, K, A], v [T, K, A]) -> [T, H * A]
AttendTokens = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Projection:
    """One product with weights [N, K] that stand for rows of one matrix.

    They are joined where their form allows it, and applied one after the other where not.
    """

    def __init__(self, weights: Sequence[Weight], impl: Impl) -> None:
        self.weights, self._impl = weights, impl

    def __call__(self, x: Tensor) -> Tensor:
        """[T, N] of x [T, K]."""
        parts = [
            F.linear(x, weight)
            if isinstance(weight, Tensor)
            else linear(x, weight, impl=self._impl)
            for weight in self.weights
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True, kw_only=True)
class StackLayer:
    """Weights of one layer. Norms are named after the checkpoint's, in the order they are used."""

    kind: LayerKind
    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    router: Tensor
    experts_gate_up: Weight
    experts_down: Weight
    q_norm: Tensor
    k_norm: Tensor
    after_attention: Tensor
    before_dense: Tensor
    before_experts: Tensor
    router_scale: Tensor
    per_expert_scale: Tensor
    after_dense: Tensor
    after_experts: Tensor
    after_feed_forward: Tensor
    next_norm: Tensor
    decoder_scalar: Tensor
    encoder_scalar: Tensor


class Stack:
    """The weights of one text model on a device, and what is computed with them alone.

    Args:
        config: shapes.
        tensors: by the names of `DiffusionGemma.state_dict()`. They are taken out one by one, so
            that the device never holds them twice.
        device: where they go. dtype: of plain weights and hidden states.
        impl: of every operation.

    Attributes:
        config, device, dtype, impl: as given.
        embedding: [V, D], which is the head too. nbytes: of all weights.
        parameter_count: numbers they stand for.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: MutableMapping[str, Tensor | QuantizedWeight],
        *,
        device: torch.device,
        dtype: torch.dtype,
        impl: Impl,
    ) -> None:
        self.config, self.device, self.dtype, self.impl = config, device, dtype, impl
        self.nbytes = self.parameter_count = 0
        self.embedding = self._plain(tensors.pop("embed_tokens.weight"))
        # What a belief of nothing means: every token alike.
        self.mean_embedding = _mean(self.embedding)
        # sqrt(D) is rounded to the weights' dtype first, as the reference does.
        self._embedding_scale = self.embedding.new_tensor(config.width**0.5)
        prefix = "self_conditioning."
        self._belief_norm = self._plain(tensors.pop(f"{prefix}pre_norm.weight"))
        self._belief_gate_up = self._projection(
            tensors, [f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"]
        )
        self._belief_down = self._projection(tensors, [f"{prefix}down_proj.weight"])
        scalars = self._plain(tensors.pop("encoder_scalars"))
        norms = [
            *(f"layers.{n}.input_layernorm.weight" for n in range(1, config.layers)),
            "norm.weight",
        ]
        self._first_norm = self._plain(tensors.pop("layers.0.input_layernorm.weight"))
        self.layers = [
            self._layer(tensors, number, norm, scalars[number : number + 1])
            for number, norm in enumerate(norms)
        ]
        self._rotations = {
            kind: Rotation(config.ropes[kind], config.head_sizes[kind]).to(device)
            for kind in config.kinds
        }

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings times sqrt(D): [T] int64 -> [T, D]."""
        return F.embedding(tokens, self.embedding) * self._embedding_scale

    def embed_belief(self, ids: Tensor, probabilities: Tensor) -> Tensor:
        """Expected embedding times sqrt(D) [T, D] of the tokens [T, k] and their probabilities."""
        expected = expected_embedding(
            ids, probabilities, self.embedding, self.mean_embedding, impl=self.impl
        )
        return expected * self._embedding_scale

    def condition(self, embedded: Tensor, signal: Tensor | None) -> Tensor:
        """A canvas's input [T, D] of its token embeddings and a belief's [T, D]."""
        eps = self.config.rms_eps
        if signal is not None:
            normed = rms_norm(signal, self._belief_norm, eps)
            gate, up = self._belief_gate_up(normed).chunk(2, dim=-1)
            embedded = embedded + self._belief_down(gelu(gate) * up)
        return rms_norm(embedded, None, eps)

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
        """Normed hidden states [T, D] behind the last layer.

        Args:
            x: inputs [T, D]. positions: [T] int64.
            attend: computes a layer's attention.
            is_encoder: whether the encoder's layer scalars count, or the decoder's.
            routed_as: [T] int64, whose experts each token is sent to; None: its own. What is
                only padding must not ask for weights of its own.
            on_routes: gets every layer's routes.
        """
        config, impl = self.config, self.impl
        eps, chosen = config.rms_eps, config.experts_per_token
        rotary: dict[LayerKind, Rotary] = {
            kind: rotation(positions, x.dtype) for kind, rotation in self._rotations.items()
        }
        normed = rms_norm(x, self._first_norm, eps)
        for number, layer in enumerate(self.layers):
            q, k, v = norm_rope(
                layer.qkv(normed),
                layer.q_norm,
                layer.k_norm,
                *rotary[layer.kind],
                heads=config.heads,
                key_heads=config.key_heads[layer.kind],
                eps=eps,
                impl=impl,
            )
            attended = layer.out(attend(number, q, k, v))
            residual, dense_in, expert_in, router_in = attention_residual(
                x,
                attended,
                layer.after_attention,
                layer.before_dense,
                layer.before_experts,
                layer.router_scale,
                eps=eps,
                impl=impl,
            )
            gate, up = layer.gate_up(dense_in).chunk(2, dim=-1)
            dense = layer.down(gelu(gate) * up)
            scores = F.linear(router_in, layer.router)
            if routed_as is not None:
                scores = scores.index_select(0, routed_as)
            routes = route(scores, layer.per_expert_scale, chosen=chosen, impl=impl)
            if on_routes is not None:
                on_routes(number, routes)
            hidden = expert_gate_up(expert_in, layer.experts_gate_up, routes, impl=impl)
            rows = expert_down(hidden, layer.experts_down, routes, impl=impl)
            x, normed = feed_forward_residual(
                residual,
                dense,
                rows,
                routes.place,
                layer.after_dense,
                layer.after_experts,
                layer.after_feed_forward,
                layer.next_norm,
                layer.encoder_scalar if is_encoder else layer.decoder_scalar,
                eps=eps,
                impl=impl,
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
        """What the head says of hidden states [T, D]; arguments as of `kernels.head`."""
        return head(
            hidden,
            self.embedding,
            softcap=self.config.softcap,
            temperature=temperature,
            top=top,
            banned=banned,
            ban_row=ban_row,
            targets=targets,
            uniforms=uniforms,
            impl=self.impl,
        )

    # How weights are placed.

    def _layer(
        self,
        tensors: MutableMapping[str, Tensor | QuantizedWeight],
        number: int,
        next_norm: str,
        encoder_scalar: Tensor,
    ) -> StackLayer:
        at = f"layers.{number}."
        kind = self.config.layer_kinds[number]
        keys = [f"{at}self_attn.{name}_proj.weight" for name in "qkv"]

        def plain(name: str) -> Tensor:
            return self._plain(tensors.pop(at + name))

        return StackLayer(
            kind=kind,
            qkv=self._projection(tensors, [name for name in keys if name in tensors]),
            out=self._projection(tensors, [f"{at}self_attn.o_proj.weight"]),
            gate_up=self._projection(
                tensors, [f"{at}mlp.gate_proj.weight", f"{at}mlp.up_proj.weight"]
            ),
            down=self._projection(tensors, [f"{at}mlp.down_proj.weight"]),
            router=plain("router.proj.weight"),
            experts_gate_up=self._placed(tensors.pop(f"{at}experts.gate_up_proj"), is_gated=True),
            experts_down=self._placed(tensors.pop(f"{at}experts.down_proj")),
            q_norm=plain("self_attn.q_norm.weight"),
            k_norm=plain("self_attn.k_norm.weight"),
            after_attention=plain("post_attention_layernorm.weight"),
            before_dense=plain("pre_feedforward_layernorm.weight"),
            before_experts=plain("pre_feedforward_layernorm_2.weight"),
            router_scale=plain("router.scale"),
            per_expert_scale=plain("router.per_expert_scale"),
            after_dense=plain("post_feedforward_layernorm_1.weight"),
            after_experts=plain("post_feedforward_layernorm_2.weight"),
            after_feed_forward=plain("post_feedforward_layernorm.weight"),
            next_norm=self._plain(tensors.pop(next_norm)),
            decoder_scalar=plain("layer_scalar"),
            encoder_scalar=encoder_scalar,
        )

    def _plain(self, weight: Tensor | QuantizedWeight) -> Tensor:
        if not isinstance(weight, Tensor):
            raise TypeError(f"expected a plain tensor, not {weight.kind}")
        self.parameter_count += weight.numel()
        placed = weight.to(self.device, self.dtype)
        self.nbytes += placed.nbytes
        return placed

    def _placed(self, weight: Tensor | QuantizedWeight, *, is_gated: bool = False) -> Weight:
        if isinstance(weight, Tensor):
            return self._plain(weight).contiguous()
        self.parameter_count += torch.Size(weight.shape).numel()
        moved = weight.to(self.device)
        if self.impl == "gpu":
            # Tiles are made on the device: it is faster there, and one weight at a time.
            placed: Weight = quant_pack(moved, gated=is_gated, impl=self.impl)
        else:
            placed = moved
        self.nbytes += placed.nbytes
        return placed

    def _projection(
        self, tensors: MutableMapping[str, Tensor | QuantizedWeight], names: Sequence[str]
    ) -> Projection:
        joined = joined_rows([tensors.pop(name) for name in names])
        return Projection([self._placed(weight) for weight in joined], self.impl)


def _mean(rows: Tensor) -> Tensor:
    """Mean row [D] of [V, D] in its type, summed in float32, a part at a time."""
    sums = [part.float().sum(0) for part in torch.split(rows, _SUMMED_ROWS)]
    return (torch.stack(sums).sum(0) / len(rows)).to(rows.dtype)


def joined_rows(weights: Sequence[Tensor | QuantizedWeight]) -> list[Tensor | QuantizedWeight]:
    """The weights [N, K] as rows of one, or as they are where their forms differ."""
    plain = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(plain) == len(weights):
        return [torch.cat(plain)]
    packed = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    first = packed[0]
    alike = all(_form(weight) == _form(first) for weight in packed)
    if len(packed) != len(weights) or not alike:
        return list(weights)
    if len(packed) == 1:
        return [first]
    factor = None
    if first.factor is not None:
        # Each has its own: every row then says which.
        factor = torch.cat([w.factor.expand(w.shape[0]) for w in packed if w.factor is not None])
    return [
        replace(
            first,
            codes=torch.cat([weight.codes for weight in packed]),
            scales=torch.cat([weight.scales for weight in packed]),
            biases=None
            if first.biases is None
            else torch.cat([w.biases for w in packed if w.biases is not None]),
            factor=factor,
        )
    ]


def _form(weight: QuantizedWeight) -> tuple[object, ...]:
    has = (weight.biases is None, weight.factor is None)
    return (weight.kind, weight.group, weight.scales.dtype, *has, weight.shape[-1])
