"""Runs the model for the engine: prompts into caches, canvases into readings.

The attention is computed per prefix, everything else once over the tokens of all canvases. The head
is read only where somebody asks: what is pinned is known.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import LayerKind, ModelConfig
from infilld.engine.cpu_stack import CpuStack
from infilld.engine.model import ENCODE_CHUNK_TOKENS, MOST_PREFIXES, DiffusionGemma
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Belief, Pins, Reading
from infilld.engine.stack import Impl, Stack
from infilld.engine.threads import Threads
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.head import HeadReading

# Tokens of a belief. What the others have of the mass is spread evenly over all.
BELIEF_TOKENS = 16


class Runner:
    """A model that computes; see `CanvasModel` for what each method promises.

    Args:
        config, tensors, device, dtype, impl: as of `Stack`; "cpu" is a `CpuStack`, which takes
            plain float32 weights on a CPU.
        belief_tokens: that a pass tells the next.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: MutableMapping[str, Tensor | QuantizedWeight],
        *,
        device: torch.device,
        dtype: torch.dtype,
        impl: Impl | Literal["cpu"],
        belief_tokens: int = BELIEF_TOKENS,
    ) -> None:
        self.stack = (
            CpuStack(config, tensors)
            if impl == "cpu"
            else Stack(config, tensors, device=device, dtype=dtype, impl=impl)
        )
        self._belief_tokens = min(belief_tokens, config.vocab_tokens)
        self._threads = Threads()

    @classmethod
    def of(
        cls,
        model: DiffusionGemma,
        *,
        impl: Literal["reference", "cpu"] = "reference",
        belief_tokens: int = BELIEF_TOKENS,
    ) -> "Runner":
        """A runner over the weights of a model on a CPU; those that are not joined are shared."""
        return cls(
            model.config,
            dict(model.state_dict()),
            device=model.device,
            dtype=model.dtype,
            impl=impl,
            belief_tokens=belief_tokens,
        )

    @property
    def config(self) -> ModelConfig:
        """Shapes."""
        return self.stack.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.stack.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of hidden states and of the cache."""
        return self.stack.dtype

    @property
    def belief_tokens(self) -> int | None:
        """Tokens of a belief."""
        return self._belief_tokens

    @property
    def parameter_count(self) -> int:
        """Numbers that the weights stand for."""
        return self.stack.parameter_count

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self.stack.nbytes

    @property
    def context_tokens(self) -> int:
        """Longest prefix that leaves room for a canvas."""
        return self.config.max_positions - self.config.canvas_tokens

    @property
    def most_prefixes(self) -> int:
        """Prefix caches that there may be at once."""
        return MOST_PREFIXES

    def new_cache(self, margin_tokens: int | None = None) -> PrefixCache:
        """An empty prefix cache on this device; see `PrefixCache` for the margin."""
        return PrefixCache(self.config, self.device, self.dtype, margin_tokens=margin_tokens)

    @torch.inference_mode()
    def encode(
        self, tokens: Tensor, cache: PrefixCache, check: Callable[[], None] | None = None
    ) -> Tensor:
        """Read tokens [N] causally, extending the cache; their normed hidden states [N, D].

        Args:
            tokens: ids [N] int64. cache: the prefix so far.
            check: called before every piece of a long prompt; what it raises ends the encoding,
                and the pieces read so far stay in the cache.
        """
        parts = []
        for piece in torch.split(tokens, ENCODE_CHUNK_TOKENS):
            if check is not None:
                check()
            if len(piece):
                parts.append(self._encode_piece(piece, cache))
        if not parts:
            return torch.empty(0, self.config.width, device=self.device, dtype=self.dtype)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.inference_mode()
    def read(self, rows: Sequence[Tensor], cache: PrefixCache) -> list[Tensor]:
        """Read token rows [N] causally, each after the prefix; hidden states [N, D] of each."""
        start, lengths = cache.tokens, [len(row) for row in rows]
        masks: dict[tuple[LayerKind, int], Tensor] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kind = self.config.layer_kinds[layer]
            parts = [torch.split(tensor, lengths) for tensor in (query, key, value)]
            attended = []
            for q, k, v in zip(*parts, strict=True):
                keys, values = cache.join(layer, _heads_first(k), _heads_first(v))
                if (kind, len(q)) not in masks:
                    masks[kind, len(q)] = self._causal_mask(kind, start, len(q), keys.shape[2])
                attended.append(_attended(_heads_first(q), keys, values, masks[kind, len(q)]))
            return torch.cat(attended)

        positions = [torch.arange(start, start + n, device=self.device) for n in lengths]
        x = self.stack.embed(torch.cat(list(rows)).to(self.device))
        hidden = self.stack.run(x, torch.cat(positions), attend, is_encoder=True)
        return list(torch.split(hidden, lengths))

    def run(self, passes: Sequence[CanvasPass]) -> list[Reading]:
        """One pass over the canvases of several prefixes, of any lengths, side by side."""
        tokens = sum(each.canvas.numel() for each in passes)
        return self._threads.run(tokens, lambda: self._run(passes))

    @torch.inference_mode()
    def _run(self, passes: Sequence[CanvasPass]) -> list[Reading]:
        counts = [each.canvas.numel() for each in passes]
        x = torch.cat([self._input(each) for each in passes])

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            # Every row of a sliding layer sees the same rectangle: the last W - 1 cached
            # positions and the whole canvas. A window per row is a known bug of other engines.
            parts = [torch.split(tensor, counts) for tensor in (query, key, value)]
            attended = []
            for each, own in zip(passes, zip(*parts, strict=True), strict=True):
                rows = len(each.canvas)
                q, k, v = (_heads_first(tensor, rows) for tensor in own)
                attended.append(_attended(q, *each.cache.join(layer, k, v)))
            return torch.cat(attended) if len(attended) > 1 else attended[0]

        positions = torch.cat([_canvas_positions(each, self.device) for each in passes])
        hidden = self.stack.run(x, positions, attend, is_encoder=False)
        return self._readings(passes, torch.split(hidden, counts))

    @torch.inference_mode()
    def log_probabilities(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Of tokens [N] int64 behind hidden states [N, D]: [N] float32, nats."""
        found = self.stack.read_head(
            hidden, temperature=self._ones(len(hidden)), top=1, targets=tokens.to(self.device)
        )
        assert found.target_log_probability is not None
        return found.target_log_probability

    @torch.inference_mode()
    def best(self, hidden: Tensor, banned: Tensor) -> Tensor:
        """The most probable tokens [N] int64 behind [N, D] that are not banned [V] bool."""
        count = len(hidden)
        return self.stack.read_head(
            hidden,
            temperature=self._ones(count),
            top=1,
            banned=banned[None],
            ban_row=torch.zeros(count, dtype=torch.int64, device=self.device),
        ).argmax

    def _encode_piece(self, tokens: Tensor, cache: PrefixCache) -> Tensor:
        start, count = cache.tokens, len(tokens)
        masks: dict[LayerKind, Tensor] = {}

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kind = self.config.layer_kinds[layer]
            keys, values = cache.append(layer, _heads_first(key), _heads_first(value))
            if kind not in masks:
                masks[kind] = self._causal_mask(kind, start, count, keys.shape[2])
            return _attended(_heads_first(query), keys, values, masks[kind])

        positions = torch.arange(start, start + count, device=self.device)
        x = self.stack.embed(tokens.to(self.device))
        hidden = self.stack.run(x, positions, attend, is_encoder=True)
        cache.commit(tokens)
        return hidden

    def _causal_mask(self, kind: LayerKind, start: int, count: int, held: int) -> Tensor:
        """May query i see held key j? [count, held] bool; held keys end with the queries."""
        query = torch.arange(start, start + count, device=self.device)[:, None]
        key = torch.arange(start + count - held, start + count, device=self.device)[None]
        mask = key <= query
        if kind == "sliding":
            mask &= query - key < self.config.sliding_window
        return mask

    def _input(self, each: CanvasPass) -> Tensor:
        """What a canvas feeds into the layers, [R * L, D]."""
        embedded = self.stack.embed(each.canvas.flatten())
        if each.belief is None:
            return self.stack.condition(embedded, None)
        if not isinstance(each.belief, Belief):
            raise TypeError("a runner's passes are told a Belief, not logits")
        ids = each.belief.ids.flatten(0, 1)
        signal = self.stack.embed_belief(ids, each.belief.probabilities.flatten(0, 1))
        return self.stack.condition(embedded, signal)

    def _readings(self, passes: Sequence[CanvasPass], hidden: Sequence[Tensor]) -> list[Reading]:
        """What each pass asked for, of its hidden states [R * L, D]; one head for all of them."""
        asked = [_Asked.of(each, self.config.vocab_tokens) for each in passes]
        states = [own[part.places] for own, part in zip(hidden, asked, strict=True)]
        counts = [len(each) for each in states]
        has_bans = any(part.bans is not None for part in asked)
        nothing = torch.zeros(1, self.config.vocab_tokens, dtype=torch.bool, device=self.device)
        bans = [nothing if part.bans is None else part.bans for part in asked]
        offsets = [sum(map(len, bans[:number])) for number in range(len(bans))]
        found = self.stack.read_head(
            torch.cat(states) if len(states) > 1 else states[0],
            temperature=torch.cat(
                [each.ask.temperature.expand(n) for each, n in zip(passes, counts, strict=True)]
            ),
            top=max(each.ask.top or 1 for each in passes),
            banned=torch.cat(bans) if has_bans else None,
            ban_row=torch.cat([p.ban_rows + n for p, n in zip(asked, offsets, strict=True)])
            if has_bans
            else None,
            targets=torch.cat([part.targets for part in asked])
            if any(each.ask.weighed is not None for each in passes)
            else None,
            uniforms=torch.cat([part.uniforms for part in asked])
            if any(each.ask.draws is not None for each in passes)
            else None,
        )
        parts = [[None] * len(counts) if x is None else torch.split(x, counts) for x in found]
        return [
            _reading(each, part.places, HeadReading(*(column[number] for column in parts)))  # type: ignore[arg-type]
            for number, (each, part) in enumerate(zip(passes, asked, strict=True))
        ]

    def _ones(self, count: int) -> Tensor:
        return torch.ones(count, device=self.device)


@dataclass(frozen=True)
class _Asked:
    """What a pass asks of the head, position by position.

    Attributes:
        places: positions [n] int64 of R * L whose distribution is read.
        bans: [B, V] bool, or None. ban_rows: [n] int64, each position's row of them.
        targets: [n] int64. uniforms: [n, 2].
    """

    places: Tensor
    bans: Tensor | None
    ban_rows: Tensor
    targets: Tensor
    uniforms: Tensor

    @classmethod
    def of(cls, each: CanvasPass, vocab: int) -> "_Asked":
        """All of it, in the order of the positions."""
        ask, (rows, length) = each.ask, each.canvas.shape
        device = each.canvas.device
        places = torch.arange(rows * length, device=device)
        if ask.pins is not None and ask.weighed is None:
            places = places[~ask.pins.mask.flatten()]
        row_of = torch.zeros(length, dtype=torch.int64, device=device)
        if ask.banned is not None:
            row_of = ask.banned.places
        weighed = torch.zeros_like(each.canvas) if ask.weighed is None else ask.weighed
        drawn = torch.zeros(rows, length, 2, device=device)
        if ask.draws is not None:
            drawn = ask.draws.uniforms(rows, length)
        return cls(
            places=places,
            bans=None if ask.banned is None else ask.banned.rows,
            ban_rows=row_of.repeat(rows)[places],
            targets=weighed.flatten()[places],
            uniforms=drawn.flatten(0, 1)[places],
        )


def _reading(each: CanvasPass, places: Tensor, found: HeadReading) -> Reading:
    """A reading of all positions: what was read, and certainty where a token is pinned."""
    ask, shape = each.ask, each.canvas.shape

    def spread(values: Tensor, base: Tensor) -> Tensor:
        """The values at their places, the base elsewhere, [R, L, ...]."""
        if len(places) == base.shape[0]:
            base = values
        else:
            base[places] = values
        return base.view(*shape, *base.shape[1:])

    count, top = each.canvas.numel(), found.top_ids.shape[-1]
    given = each.canvas.flatten() if ask.pins is None else ask.pins.tokens.flatten()
    zeros = found.entropy_nats.new_zeros(count)
    proposal = found.argmax if ask.draws is None or found.sample is None else found.sample
    certain = found.top_probabilities.new_zeros(count, top)
    certain[:, 0] = 1.0
    reading = Reading(
        argmax=spread(found.argmax, given.clone()),
        log_probability=spread(found.log_probability, zeros.clone()),
        entropy_nats=spread(found.entropy_nats, zeros),
        proposal=spread(proposal, given.clone()),
        belief=Belief(
            ids=spread(found.top_ids, given[:, None].repeat(1, top)),
            probabilities=spread(found.top_probabilities, certain),
        ),
        weighed=None
        if ask.weighed is None or found.target_log_probability is None
        else found.target_log_probability.view(shape),
    )
    return reading if ask.pins is None or ask.weighed is None else imposed(reading, ask.pins)


def imposed(reading: Reading, pins: Pins) -> Reading:
    """The reading with its pinned positions certain, where they were read too."""
    mask, belief = pins.mask, reading.belief
    assert isinstance(belief, Belief)
    first = torch.zeros_like(belief.probabilities)
    first[..., 0] = 1.0
    return replace(
        reading,
        argmax=torch.where(mask, pins.tokens, reading.argmax),
        log_probability=reading.log_probability.masked_fill(mask, 0.0),
        entropy_nats=reading.entropy_nats.masked_fill(mask, 0.0),
        proposal=torch.where(mask, pins.tokens, reading.proposal),
        belief=Belief(
            ids=torch.where(mask[..., None], pins.tokens[..., None], belief.ids),
            probabilities=torch.where(mask[..., None], first, belief.probabilities),
        ),
    )


def _canvas_positions(each: CanvasPass, device: torch.device) -> Tensor:
    """Positions [R * L] of a pass: every row goes on where the prefix ends."""
    rows, length = each.canvas.shape
    start = each.cache.tokens
    return torch.arange(start, start + length, device=device).repeat(rows)


def _heads_first(x: Tensor, rows: int = 1) -> Tensor:
    """[R * N, heads, A] as [R, heads, N, A]."""
    return x.view(rows, -1, *x.shape[1:]).transpose(1, 2)


def _attended(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention [R * N, H * A] of queries [R, H, N, A]."""
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=1.0, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2).flatten(0, 1)
