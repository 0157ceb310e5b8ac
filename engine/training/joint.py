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
from infilld.engine.training.copying import IGNORED
from infilld.engine.training.examples import Batch
from infilld.engine.training.head import believe, head_loss
from infilld.kernels.accept import accept

# Positions that are given count a little, so that their belief stays meaningful.
_HEAD_WEIGHT = 0.1
# Fillers far behind the end of a fill are many and easy.
_SPARE_WEIGHT = 0.2
_FULL_NOISE = 0.5
# Drafted canvases keep their draft as it is as often; else they are noised, at most so much.
_MOST_DRAFT_NOISE = 0.6
# Share of the other canvases that start from what the encoder would have written.
_READ = 0.2
_TEMPERATURES = (0.4, 1.0)
# The sampler's entropy budget, and up to so many times as much: as later steps have it.
_BUDGET_NATS = 0.1
_BUDGET_SPREAD = 100.0
# What the first pass is told about its canvas: nothing, as `generate` begins, or which positions
# are given; then, for canvases that start from no draft, whether what the noise spared counts.
_TOLD, _SPARED_COUNT = 0.9, 0.5


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies, nats: of encoder tokens, of gap positions; `total` is minimised.

    There is no `gap` loss where a batch has no canvases.
    """

    total: Tensor
    encoder: Tensor
    gap: Tensor | None


def corrupt(batch: Batch, vocab_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Canvas [B, C, L] whose gap positions are replaced by uniform tokens, at random rates.

    The rate is 1 for some canvases, because that is where an infill starts, and uniform in
    (0, 1) for the others. Drafted canvases start from their draft, as it is or partly noised.
    Heads and padding stay as they are. Also returned: what was replaced, [B, C, L] bool.
    """
    shape, device = batch.canvas.shape, batch.canvas.device
    rate = torch.rand(shape[:2], generator=generator).clamp(min=1e-3)
    is_extreme = torch.rand(shape[:2], generator=generator) < _FULL_NOISE
    drafted = batch.drafted.cpu()
    rate = torch.where(drafted, _MOST_DRAFT_NOISE * rate, rate)
    rate = torch.where(is_extreme, (~drafted).float(), rate)
    hit = (torch.rand(shape, generator=generator) < rate[..., None]).to(device) & batch.gap
    noise = torch.randint(vocab_tokens, shape, generator=generator).to(device)
    given = torch.where(batch.drafted[..., None], batch.first, batch.canvas)
    return torch.where(hit, noise, given), hit


def accept_by_entropy(entropy_nats: Tensor, budget_nats: Tensor) -> Tensor:
    """Positions [B, C, L] bool the sampler accepts: the surest, while the rest of them fit.

    Args:
        entropy_nats: [B, C, L], infinite where nothing may be accepted. budget_nats: [B, C].
    """
    rows = entropy_nats.flatten(0, 1)
    # The operation takes one budget for all rows: entropies are measured in units of their own.
    scaled = rows * (_BUDGET_NATS / budget_nats.flatten())[:, None]
    unused = torch.zeros_like(rows, dtype=torch.int64)
    taken = accept(
        scaled,
        unused,
        unused,
        ~rows.isfinite(),
        unused,
        budget_nats=_BUDGET_NATS,
        impl="gpu" if rows.is_cuda else "reference",
    )
    return taken.accepted.view_as(entropy_nats)


def encoder_mask(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Causal mask [N, N] bool; `window` is W of a sliding layer. None: all that came before."""
    if window is None or window >= tokens:
        return None
    at = torch.arange(tokens, device=device)
    return (at[None] <= at[:, None]) & (at[:, None] - at[None] < window)


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

    def losses(self, batch: Batch, *, unrolled_steps: int) -> Losses:
        """Causal loss of the encoder plus the loss of noised canvases.

        Args:
            batch: clean examples.
            unrolled_steps: denoising steps taken without gradient before the pass that is scored.
                It then sees what the sampler would hand it: the model's own accepted tokens, fresh
                noise everywhere else, and its belief. Without them a small model, which cannot
                tell how much of a canvas is noise, learns to repeat whatever token it sees.
        """
        keys: list[tuple[Tensor, Tensor]] = []
        read = self._encode(batch, keys)
        encoder_loss = self._causal_loss(read, batch)
        if not batch.canvas.shape[1]:
            return Losses(self.encoder_weight * encoder_loss, encoder_loss.detach(), None)
        attend, positions = self._attend_canvas(batch, keys), self._positions(batch)
        canvas, given = self._first_canvas(batch, read)
        signal = self._first_signal(canvas, given)
        with torch.no_grad():
            for _ in range(unrolled_steps):
                hidden = self._denoise(canvas.flatten(1), signal, attend, positions)
                canvas, signal = self._step(hidden, batch)
        hidden = self._denoise(canvas.flatten(1), signal, attend, positions)
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

    @torch.no_grad()
    def _first_canvas(self, batch: Batch, read: Tensor) -> tuple[Tensor, Tensor]:
        """What the canvases [B, C, L] start from: noise, a found draft, or what was expected.

        The last is a draft of the encoder's: each token as it would have written it after the
        true ones before it. Hidden states [B, N, D] of the text are there anyhow.

        Also returned: which positions are given, as pin or draft, [B, C, L] bool.
        """
        canvas, hit = corrupt(batch, self.model.config.vocab_tokens, self.generator)
        counted = torch.rand(batch.starts.shape, generator=self.generator) < _SPARED_COUNT
        spared = (counted.to(canvas.device) | batch.drafted)[..., None] & ~hit
        given = ~batch.gap | spared
        chosen = torch.rand(batch.starts.shape, generator=self.generator) < _READ
        b, c = (chosen.to(canvas.device) & ~batch.drafted).nonzero(as_tuple=True)
        length = torch.arange(canvas.shape[2], device=canvas.device)
        at = (batch.starts[b, c, None] + length).clamp(max=batch.encoder.shape[1] - 1)
        clean = batch.canvas[b, c]
        # A cut within the middle, and the middle's end, may make other tokens of the same text.
        same = (batch.encoder[b[:, None], at] == clean) & batch.gap[b, c]
        hidden = read[b[:, None], at - 1][same]
        heat = torch.ones(len(hidden), device=hidden.device)
        table, softcap = self.model.embed_tokens.weight, self.model.config.softcap
        clean[same] = believe(hidden, table, softcap, heat).argmax
        canvas[b, c], given[b, c] = clean, True
        return canvas, given

    @torch.no_grad()
    def _first_signal(self, canvas: Tensor, given: Tensor) -> Tensor | None:
        """What the first pass is told [B, C * L, D]: given tokens are certain, others could be any.

        Without it a small model cannot tell a pin or a draft from noise.
        """
        if float(torch.rand((), generator=self.generator)) >= _TOLD:
            return None
        model = self.model
        certain = model.embed(canvas.flatten(1))
        anything = model.embed_tokens.weight.float().mean(0) * model.config.width**0.5
        return torch.where(given.flatten(1)[..., None], certain, anything.to(certain.dtype))

    def _step(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The next canvas [B, C, L], and what the sampler feeds back [B, C * L, D].

        Heads stay what they are, in the canvas and in the belief.
        """
        model, shape, device = self.model, batch.canvas.shape, hidden.device
        gap = batch.gap.flatten(1)
        low, high = _TEMPERATURES
        heat = low + (high - low) * torch.rand(shape[:2], generator=self.generator)
        heat = heat.to(device)[..., None].expand(shape).flatten(1)
        table = model.embed_tokens.weight
        belief = believe(hidden[gap], table, model.config.softcap, heat[gap])
        signal = model.embed(batch.canvas.flatten(1)).to(hidden.dtype)
        signal[gap] = belief.embedding * model.config.width**0.5
        entropy = torch.full(shape, torch.inf, device=device)
        entropy[batch.gap] = belief.entropy_nats
        spread = torch.rand(shape[:2], generator=self.generator)
        accepted = accept_by_entropy(entropy, (_BUDGET_NATS * _BUDGET_SPREAD**spread).to(device))
        noise = torch.randint(model.config.vocab_tokens, shape, generator=self.generator)
        canvas = torch.where(batch.gap, noise.to(device), batch.canvas)
        argmax = torch.zeros_like(canvas)
        argmax[batch.gap] = belief.argmax
        return torch.where(accepted, argmax, canvas), signal

    def _encode(self, batch: Batch, keys: list[tuple[Tensor, Tensor]]) -> Tensor:
        model = self.model
        tokens = batch.encoder.shape[1]
        masks: dict[LayerKind, Tensor | None] = {
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


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention under a mask; None: causal, which skips what a mask would only hide."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=1.0, enable_gqa=True
    )
