"""One training pass: the encoder once, every canvas of the batch on its keys.

Source of the joint form: NeMo Automodel's dllm guide and BD3-LM (all blocks of a sequence in one
pass, strict mask: a canvas sees encoder tokens before its own start, never at or after it).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.engine.config import LayerKind
from infilld.engine.layers import Attend, Rotary
from infilld.engine.model import DiffusionGemma
from infilld.engine.training.examples import IGNORED, Batch
from infilld.engine.training.head import believed_embedding, head_loss

# Positions that are given count a little, so that their belief stays meaningful.
_HEAD_WEIGHT = 0.1
# Fillers far behind the end of a fill are many and easy.
_SPARE_WEIGHT = 0.2
_FULL_NOISE = 0.3
_TEMPERATURES = (0.4, 1.0)


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies, nats: of encoder tokens, of gap positions; `total` is minimised."""

    total: Tensor
    encoder: Tensor
    gap: Tensor


def corrupt(batch: Batch, vocab_tokens: int, generator: torch.Generator) -> Tensor:
    """Canvas [B, C, L] whose gap positions are replaced by uniform tokens, at random rates.

    The rate is 1 for some canvases, because that is where an infill starts, and uniform in
    (0, 1) for the others. Heads and padding stay as they are.
    """
    shape, device = batch.canvas.shape, batch.canvas.device
    rate = torch.rand(shape[:2], generator=generator).clamp(min=1e-3)
    rate = torch.where(torch.rand(shape[:2], generator=generator) < _FULL_NOISE, 1.0, rate)
    hit = (torch.rand(shape, generator=generator) < rate[..., None]).to(device) & batch.gap
    noise = torch.randint(vocab_tokens, shape, generator=generator).to(device)
    return torch.where(hit, noise, batch.canvas)


def encoder_mask(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Causal mask [N, N] bool; `window` is W of a sliding layer."""
    at = torch.arange(tokens, device=device)
    mask = at[None] <= at[:, None]
    return mask if window is None else mask & (at[:, None] - at[None] < window)


def canvas_mask(batch: Batch, window: int | None) -> Tensor:
    """What canvas positions may see: [B, 1, C * L, N + C * L] bool.

    Encoder tokens strictly before the canvas's start (the last W - 1 of them in a sliding layer,
    the same for every position of the canvas), and the canvas itself without padding.
    """
    canvases, length = batch.canvas.shape[1:]
    at = torch.arange(batch.encoder.shape[1], device=batch.canvas.device)
    starts = batch.starts[..., None]
    prefix = at < starts
    if window is not None:
        prefix &= at >= starts - (window - 1)
    prefix = prefix[:, :, None].expand(-1, -1, length, -1).flatten(1, 2)
    owner = torch.arange(canvases, device=at.device).repeat_interleave(length)
    own = (owner[:, None] == owner[None]) & (batch.gap | batch.head).flatten(1)[:, None]
    # A padding position sees itself, so that no row of the softmax is empty.
    own = own | torch.eye(canvases * length, dtype=torch.bool, device=at.device)
    return torch.cat((prefix, own), dim=-1)[:, None]


class JointPass:
    """Losses of a model on batches; draws noise from its own generator.

    Args:
        model: being trained; its own layers run.
        generator: of noise rates and noise, on the CPU.
        encoder_weight: of the causal loss.
    """

    def __init__(
        self, model: DiffusionGemma, generator: torch.Generator, *, encoder_weight: float = 1.0
    ) -> None:
        self.model, self.generator, self.encoder_weight = model, generator, encoder_weight

    def losses(self, batch: Batch, *, self_condition: bool) -> Losses:
        """Causal loss of the encoder plus the loss of noised canvases.

        Args:
            batch: clean examples.
            self_condition: first run a pass without gradient, and give its belief to the second.
        """
        config = self.model.config
        keys: list[tuple[Tensor, Tensor]] = []
        encoder_loss = self._causal_loss(self._encode(batch, keys), batch)
        noised = corrupt(batch, config.vocab_tokens, self.generator)
        attend, positions = self._attend_canvas(batch, keys), self._positions(batch)
        signal = None
        if self_condition:
            with torch.no_grad():
                hidden = self._denoise(noised.flatten(1), None, attend, positions)
                signal = self._signal(hidden, batch)
        hidden = self._denoise(noised.flatten(1), signal, attend, positions)
        used = (batch.gap | batch.head).flatten(1)
        labels = batch.canvas.flatten(1)[used]
        in_gap = batch.gap.flatten(1)[used]
        weights = torch.where(in_gap, 1.0, _HEAD_WEIGHT)
        weights = torch.where(batch.spare.flatten(1)[used], _SPARE_WEIGHT, weights)
        canvas_loss, nats = self._head(hidden[used], labels, weights / weights.sum())
        total = canvas_loss + self.encoder_weight * encoder_loss
        return Losses(total, encoder_loss.detach(), nats[in_gap].mean())

    def _causal_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        scored = batch.encoder_labels != IGNORED
        labels = batch.encoder_labels[scored]
        weights = torch.full(labels.shape, 1.0 / max(1, len(labels)), device=hidden.device)
        return self._head(hidden[scored], labels, weights)[0]

    def _head(self, hidden: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        model = self.model
        return head_loss(hidden, model.embed_tokens.weight, labels, weights, model.config.softcap)

    def _signal(self, hidden: Tensor, batch: Batch) -> Tensor:
        """What the sampler feeds back [B, C * L, D]: beliefs in the gap, the truth in the head."""
        model = self.model
        gap = batch.gap.flatten(1)
        # The sampler hands logits on after dividing by its temperature.
        low, high = _TEMPERATURES
        heat = low + (high - low) * torch.rand(batch.canvas.shape[:2], generator=self.generator)
        heat = heat.to(hidden.device)[..., None].expand(batch.canvas.shape).flatten(1)
        rows = believed_embedding(
            hidden[gap], model.embed_tokens.weight, model.config.softcap, heat[gap]
        )
        signal = model.embed(batch.canvas.flatten(1)).to(hidden.dtype)
        signal[gap] = rows * model.config.width**0.5
        return signal

    def _encode(self, batch: Batch, keys: list[tuple[Tensor, Tensor]]) -> Tensor:
        model = self.model
        tokens = batch.encoder.shape[1]
        masks: dict[LayerKind, Tensor] = {
            "full": encoder_mask(tokens, None, model.device),
            "sliding": encoder_mask(tokens, model.config.sliding_window, model.device),
        }

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys.append((key, value))
            return _attention(query, key, value, masks[model.config.layer_kinds[layer]])

        x = model.embed(batch.encoder)
        positions = torch.arange(tokens, device=model.device)[None].expand(len(x), -1)
        return self._layers(x, positions, attend, model.encoder_scalars)

    def _denoise(
        self, canvas: Tensor, signal: Tensor | None, attend: Attend, positions: Tensor
    ) -> Tensor:
        model = self.model
        x = model.self_conditioning(model.embed(canvas), signal)
        scalars = torch.cat([layer.get_buffer("layer_scalar") for layer in model.layers])
        return self._layers(x, positions, attend, scalars)

    def _attend_canvas(self, batch: Batch, keys: list[tuple[Tensor, Tensor]]) -> Attend:
        config = self.model.config
        masks: dict[LayerKind, Tensor] = {
            "full": canvas_mask(batch, None),
            "sliding": canvas_mask(batch, config.sliding_window),
        }

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            prefix_key, prefix_value = keys[layer]
            all_keys = torch.cat((prefix_key, key), dim=2)
            all_values = torch.cat((prefix_value, value), dim=2)
            return _attention(query, all_keys, all_values, masks[config.layer_kinds[layer]])

        return attend

    def _positions(self, batch: Batch) -> Tensor:
        length = torch.arange(batch.canvas.shape[2], device=batch.canvas.device)
        return (batch.starts[..., None] + length).flatten(1)

    def _layers(self, x: Tensor, positions: Tensor, attend: Attend, scalars: Tensor) -> Tensor:
        model = self.model
        rotary: dict[LayerKind, Rotary] = {}
        for kind in model.config.kinds:
            cosine, sine = model.rotations[kind](positions.flatten(), x.dtype)
            shape = (*positions.shape, cosine.shape[-1])
            rotary[kind] = (cosine.view(shape)[:, None], sine.view(shape)[:, None])
        for index, layer in enumerate(model.layers):
            kind = model.config.layer_kinds[index]
            x = layer(x, rotary[kind], attend, index, scalars[index : index + 1])
        hidden: Tensor = model.norm(x)
        return hidden


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=1.0, enable_gqa=True
    )
