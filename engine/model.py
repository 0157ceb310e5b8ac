"""DiffusionGemma: one stack of layers, read causally into a prefix cache or over a whole canvas.

    tokens ──embed──▶ layers, causal,        encoder scalars ──▶ cache, hidden
    canvas ──embed──▶ + belief ──▶ layers, bidirectional over [cache | canvas] ──▶ logits

Both directions use the same weights but for the layer scalars and the self-conditioning block.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infilld.engine.cache import PrefixCache
from infilld.engine.config import LayerKind, ModelConfig
from infilld.engine.layers import Attend, Layer, RMSNorm, Rotary, Rotation, SelfConditioning
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Belief, Reading, read_logits

# Of documents that are worked on at once, and a few that were.
MOST_PREFIXES = 8
# Prompts are encoded in pieces: the mask of a piece is [piece, prefix + piece] booleans.
ENCODE_CHUNK_TOKENS = 512


class DiffusionGemma(nn.Module):
    """The text model. Parameter names are the checkpoint's below `model.decoder.`.

    Attributes:
        config: shapes.
        encoder_scalars: [layers], the encoder's own layer scalars
            (`model.encoder.language_model.layers.n.layer_scalar`).
    """

    encoder_scalars: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_tokens, config.width)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layer_kinds)
        self.norm = RMSNorm(config.width, config.rms_eps)
        self.self_conditioning = SelfConditioning(config)
        self.rotations = nn.ModuleDict(
            {kind: Rotation(config.ropes[kind], config.head_sizes[kind]) for kind in config.kinds}
        )
        self.register_buffer("encoder_scalars", torch.ones(config.layers))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights and of the hidden states."""
        return self.embed_tokens.weight.dtype

    @property
    def belief_tokens(self) -> int | None:
        """Beliefs are all logits, as in the reference."""
        return None

    @property
    def parameter_count(self) -> int:
        """Numbers in its weights."""
        return sum(each.numel() for each in self.parameters())

    @property
    def nbytes(self) -> int:
        """Memory of its weights."""
        return sum(each.nbytes for each in (*self.parameters(), *self.buffers()))

    @property
    def context_tokens(self) -> int:
        """Longest prefix that leaves room for a canvas."""
        return self.config.max_positions - self.config.canvas_tokens

    @property
    def most_prefixes(self) -> int:
        """Prefix caches that there may be at once."""
        return MOST_PREFIXES

    def new_cache(self, margin_tokens: int | None = None) -> PrefixCache:
        """An empty prefix cache on this model's device; see `PrefixCache` for the margin."""
        return PrefixCache(self.config, self.device, self.dtype, margin_tokens=margin_tokens)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token embeddings times sqrt(D): [...] int64 -> [..., D]."""
        embedded: Tensor = self.embed_tokens(tokens)
        return embedded * self._embedding_scale()

    def embed_belief(self, belief: Belief | Tensor) -> Tensor:
        """Expected embedding [..., D] under softmax(belief [..., V]); the softmax is float32."""
        if isinstance(belief, Belief):
            table = self.embed_tokens.weight
            known = (belief.probabilities[..., None] * table[belief.ids].float()).sum(-2)
            rest = 1.0 - belief.probabilities.sum(-1, keepdim=True)
            expected = (known + rest * table.float().mean(0)).to(self.dtype)
            return expected * self._embedding_scale()
        # The reference carries the logits from step to step in the weights' dtype.
        probabilities = belief.to(self.dtype).softmax(-1, dtype=torch.float32).to(self.dtype)
        return probabilities @ self.embed_tokens.weight * self._embedding_scale()

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits [..., V] float32 of normed hidden states [..., D]."""
        raw = F.linear(hidden, self.embed_tokens.weight).float()
        return torch.tanh(raw / self.config.softcap) * self.config.softcap

    @torch.no_grad()
    def encode(
        self, tokens: Tensor, cache: PrefixCache, check: Callable[[], None] | None = None
    ) -> Tensor:
        """Read tokens [N] causally; extends the cache by N positions.

        Args:
            tokens: ids [N] int64.
            cache: the prefix so far.
            check: called before every piece of a long prompt; what it raises ends the encoding,
                and the pieces read so far stay in the cache.

        Returns:
            Normed hidden states [N, D] of these tokens; position i predicts token i + 1.
        """
        parts = []
        for piece in torch.split(tokens, ENCODE_CHUNK_TOKENS):
            if check is not None:
                check()
            parts.append(self._encode_piece(piece, cache))
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    @torch.no_grad()
    def denoise(self, canvas: Tensor, cache: PrefixCache, belief: Belief | Tensor | None) -> Tensor:
        """One pass over canvases [R, L] that share the cached prefix; the cache is only read.

        Args:
            canvas: token ids [R, L] int64, any L of 1 or more.
            cache: the encoded prefix.
            belief: [R, L, V] logits carried from the step before, or the sum of them; None in the
                first step.

        Returns:
            Soft-capped logits [R, L, V] float32.
        """
        signal = None if belief is None else self.embed_belief(belief)
        x = self.self_conditioning(self.embed(canvas), signal)
        start = cache.tokens

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Every row of a sliding layer sees the same rectangle: the last W - 1 cached
            # positions and the whole canvas. A window per row is a known bug of other engines.
            keys, values = cache.join(layer, key, value)
            return F.scaled_dot_product_attention(query, keys, values, scale=1.0, enable_gqa=True)

        return self.logits(self._run(x, self._places(start, x), attend, self._decoder_scalars()))

    @torch.no_grad()
    def denoise_together(self, passes: Sequence[CanvasPass]) -> list[Tensor]:
        """One pass over the canvases of several prefixes, of any lengths, side by side.

        Everything but the attention is computed once over all positions.

        Returns:
            For each its soft-capped logits [R, L, V] float32, as `denoise` would give them alone.
        """
        if len(passes) == 1:
            return [self.denoise(passes[0].canvas, passes[0].cache, passes[0].belief)]
        inputs, places, ends = [], [], []
        for each in passes:
            signal = None if each.belief is None else self.embed_belief(each.belief)
            x = self.self_conditioning(self.embed(each.canvas), signal)
            inputs.append(x.flatten(0, 1))
            rows, length = each.canvas.shape
            start = each.cache.tokens
            places.append(torch.arange(start, start + length, device=x.device).repeat(rows))
            ends.append(each.canvas.numel())
        positions = torch.cat(places)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            parts = [torch.split(tensor, ends, dim=2) for tensor in (query, key, value)]
            attended = []
            for each, own in zip(passes, zip(*parts, strict=True), strict=True):
                rows = len(each.canvas)
                queries, keys, values = (_unflatten(tensor, rows) for tensor in own)
                keys, values = each.cache.join(layer, keys, values)
                out = F.scaled_dot_product_attention(
                    queries, keys, values, scale=1.0, enable_gqa=True
                )
                attended.append(out.transpose(0, 1).flatten(1, 2))
            return torch.cat(attended, dim=1)[None]

        hidden = self._run(torch.cat(inputs)[None], positions, attend, self._decoder_scalars())
        logits = torch.split(self.logits(hidden[0]), ends)
        return [
            part.view(*each.canvas.shape, -1) for part, each in zip(logits, passes, strict=True)
        ]

    @torch.no_grad()
    def read(self, rows: Sequence[Tensor], cache: PrefixCache) -> list[Tensor]:
        """Read token rows [N] causally, each after the cached prefix, without extending it.

        Everything but the attention is computed once over the tokens of all rows.

        Returns:
            For each its normed hidden states [N, D]: what `encode` would return for it alone.
        """
        start, lengths = cache.tokens, [len(row) for row in rows]
        masks: dict[tuple[LayerKind, int], Tensor] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kind = self.config.layer_kinds[layer]
            parts = [torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)]
            attended = []
            for own, count in zip(zip(*parts, strict=True), lengths, strict=True):
                keys, values = cache.join(layer, own[1], own[2])
                if (kind, count) not in masks:
                    masks[kind, count] = self._causal_mask(layer, start, count, keys.shape[2])
                attended.append(_masked_attention(own[0], keys, values, masks[kind, count]))
            return torch.cat(attended, dim=2)

        x = self.embed(torch.cat(list(rows)).to(self.device))[None]
        positions = torch.cat([torch.arange(start, start + n, device=x.device) for n in lengths])
        hidden = self._run(x, positions, attend, self._encoder_scalars())
        return list(torch.split(hidden[0], lengths))

    def run(self, passes: Sequence[CanvasPass]) -> list[Reading]:
        """What each pass is asked for, of its logits."""
        logits = self.denoise_together(passes)
        return [read_logits(own, each.ask) for own, each in zip(logits, passes, strict=True)]

    @torch.no_grad()
    def log_probabilities(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Of tokens [N] int64 behind hidden states [N, D]: [N] float32, nats."""
        chosen = tokens[:, None].to(hidden.device)
        return self.logits(hidden).log_softmax(-1).gather(-1, chosen)[:, 0]

    @torch.no_grad()
    def best(self, hidden: Tensor, banned: Tensor) -> Tensor:
        """The most probable tokens [N] int64 behind [N, D] that are not banned [V] bool."""
        return self.logits(hidden).masked_fill(banned, -torch.inf).argmax(-1)

    def _encode_piece(self, tokens: Tensor, cache: PrefixCache) -> Tensor:
        start, count = cache.tokens, len(tokens)
        if count == 0:
            return torch.empty(0, self.config.width, device=self.device, dtype=self.dtype)
        masks: dict[LayerKind, Tensor] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kind = self.config.layer_kinds[layer]
            keys, values = cache.append(layer, key, value)
            if kind not in masks:
                masks[kind] = self._causal_mask(layer, start, count, keys.shape[2])
            return _masked_attention(query, keys, values, masks[kind])

        x = self.embed(tokens[None].to(self.device))
        hidden = self._run(x, self._places(start, x), attend, self._encoder_scalars())[0]
        cache.commit(tokens)
        return hidden

    def _places(self, start: int, x: Tensor) -> Tensor:
        """Positions [N] of x [R, N, D] behind a prefix of `start` tokens."""
        return torch.arange(start, start + x.shape[1], device=x.device)

    def _run(self, x: Tensor, positions: Tensor, attend: Attend, scalars: list[Tensor]) -> Tensor:
        rotary: dict[LayerKind, Rotary] = {
            kind: self.rotations[kind](positions, x.dtype) for kind in self.config.kinds
        }
        for index, layer in enumerate(self.layers):
            x = layer(x, rotary[self.config.layer_kinds[index]], attend, index, scalars[index])
        hidden: Tensor = self.norm(x)
        return hidden

    def _causal_mask(self, layer: int, start: int, count: int, held: int) -> Tensor:
        """May query i see held key j? [count, held] bool; held keys end with the queries."""
        query = torch.arange(start, start + count, device=self.device)[:, None]
        key = torch.arange(start + count - held, start + count, device=self.device)[None]
        mask = key <= query
        if self.config.layer_kinds[layer] == "sliding":
            mask &= query - key < self.config.sliding_window
        return mask

    def _embedding_scale(self) -> Tensor:
        # sqrt(D) is rounded to the weights' dtype first, as the reference does.
        return self.embed_tokens.weight.new_tensor(self.config.width**0.5)

    def _decoder_scalars(self) -> list[Tensor]:
        return [layer.get_buffer("layer_scalar") for layer in self.layers]

    def _encoder_scalars(self) -> list[Tensor]:
        return list(torch.split(self.encoder_scalars, 1))


def _unflatten(tensor: Tensor, rows: int) -> Tensor:
    """[1, H, R * L, A] as [R, H, L, A]."""
    return tensor[0].view(tensor.shape[1], rows, -1, tensor.shape[3]).transpose(0, 1)


def _masked_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True
    )
