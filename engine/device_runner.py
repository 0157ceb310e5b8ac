"""Runs the model on a GPU, without the host ever waiting inside a step.

Every shape a step can have is one of a few buckets, and every number it depends on is in memory
that does not move. So a pass is captured once for each bucket, and from then on replayed: the host
copies what is new, starts the replay, and goes on.

    passes ─▶ inputs of the bucket ─▶ replay: embed, layers, head ─▶ outputs ─▶ readings

What pads a bucket are copies of a canvas's first position, or of a text's last. They are sent to
that position's experts, so that padding asks for no weights of its own, and nobody attends to them.
"""

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import ModelConfig, SamplerConfig
from infilld.engine.draws import SeededDraws
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Belief, Pins, Reading
from infilld.engine.runner import BELIEF_TOKENS, Runner, imposed
from infilld.engine.sampler import denoise
from infilld.engine.slab import CacheSlab, SlabCache
from infilld.engine.stack import Impl
from infilld.engine.stopping import AllOf
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.canvas_attention import canvas_attention
from infilld.kernels.prefix_attention import prefix_attention
from infilld.kernels.route import Routes

CANVAS_BUCKETS = (16, 32, 64, 128, 256)
ROW_BUCKETS = (1, 2, 3, 4, 6, 8)
# Of a prompt: what typing adds, and what a long one is read in.
PIECE_BUCKETS = (8, 32, 128, 256, 512)
# Texts that are weighed: candidates of a gap, with the suffix behind them.
READ_ROW_BUCKETS = (1, 2, 4, 8, 16)
READ_BUCKETS = (8, 16, 32, 64, 128)
# A gap of a line with its suffix, alone and with a draft.
WARM_BUCKETS = ((1, 32), (2, 32), (1, 64), (2, 64))
# Candidates of a line, few and many.
WARM_READS = ((2, 16), (4, 16), (8, 16), (8, 32))
# Sets of banned tokens that one captured pass takes.
_MOST_BANS = 24


class _Captured:
    """A computation over a bucket: where it reads, and where it writes once it is captured.

    Args:
        inputs: tensors by name, at addresses that do not change.
        compute: of the inputs; waits for nothing.
        pool: memory of the graphs; None: it is never captured.

    Attributes:
        inputs: as given. placing: what its inputs say of places, in prefixes and in itself; None:
            nothing yet.
    """

    def __init__(
        self,
        inputs: dict[str, Tensor],
        compute: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
        pool: Any | None,
    ) -> None:
        self.inputs, self._compute, self._pool = inputs, compute, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: tuple[Tensor, ...] = ()
        self.placing: object = None

    def run(self) -> tuple[Tensor, ...]:
        """Compute of what the inputs hold; the next run may write where this one did."""
        if self._pool is None:
            return self._compute(self.inputs)
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._outputs

    def _capture(self) -> torch.cuda.CUDAGraph:
        # The inputs are filled: what a prompt's piece stores while it is tried is what it should.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Compiles every kernel: nothing may be compiled while a graph is captured.
            for _ in range(2):
                self._compute(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile: the daemon loads, and its clock answers.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode=mode):
            # Graphs of the pool may write where others do: who replays one copies what it gave
            # before the next.
            self._outputs = self._compute(self.inputs)
        return graph


class DeviceRunner(Runner):
    """A `Runner` whose prefixes and passes stay on a GPU.

    Args:
        config, tensors, device, dtype, impl, belief_tokens: as of `Runner`.
        slots: prefixes that are held at once. context_tokens: of the longest.
        margin_tokens: how far a prefix can be cut back in sliding layers.
        cache_dtype: of keys and values; None: as the hidden states.
        captures: whether passes become CUDA graphs; None: on CUDA.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: MutableMapping[str, Tensor | QuantizedWeight],
        *,
        device: torch.device,
        dtype: torch.dtype,
        impl: Impl,
        slots: int,
        context_tokens: int,
        margin_tokens: int = 512,
        cache_dtype: torch.dtype | None = None,
        belief_tokens: int = BELIEF_TOKENS,
        captures: bool | None = None,
    ) -> None:
        super().__init__(
            config, tensors, device=device, dtype=dtype, impl=impl, belief_tokens=belief_tokens
        )
        self.slab = CacheSlab(
            config,
            device,
            cache_dtype or dtype,
            slots=slots,
            context_tokens=context_tokens,
            margin_tokens=margin_tokens,
        )
        self._context_tokens = context_tokens
        captures = device.type == "cuda" if captures is None else captures
        self._pool = torch.cuda.graph_pool_handle() if captures else None
        self._captured: dict[tuple[object, ...], _Captured] = {}
        # All buckets read the same: what is banned is copied there before every pass.
        self._banned = self._zeros(_MOST_BANS, config.vocab_tokens, dtype=torch.bool)
        self._lengths = sorted({min(n, config.canvas_tokens) for n in CANVAS_BUCKETS})

    @property
    def context_tokens(self) -> int:
        """Longest prefix that there is room for."""
        return min(self._context_tokens, super().context_tokens)

    @property
    def most_prefixes(self) -> int:
        """Prefix caches that there may be at once."""
        return self.slab.slots

    def new_cache(self, margin_tokens: int | None = None) -> PrefixCache:
        """An empty prefix cache of the slab; its margin is the slab's."""
        return self.slab.lease()

    def warm_up(self) -> None:
        """Compile, and capture, what nearly every request needs, before the first one waits."""
        cache = self.new_cache()
        for tokens in PIECE_BUCKETS:
            if tokens <= self.context_tokens:
                self.encode(torch.zeros(tokens, dtype=torch.int64), cache)
                cache.trim(0)
        last = self.encode(torch.zeros(1, dtype=torch.int64), cache)
        self.best(last, self._zeros(self.config.vocab_tokens, dtype=torch.bool))
        draws, twice = SeededDraws(0, self.device), SamplerConfig(max_steps=2)
        for rows, length in WARM_BUCKETS:
            if length <= self.config.canvas_tokens:
                # With all of a step, not the pass alone.
                canvas = self._zeros(rows, length)
                pins = Pins(mask=canvas.bool(), tokens=canvas)
                denoise(self, cache, canvas, twice, draws, stop=AllOf(()), pins=pins, greedy=True)
        for rows, tokens in WARM_READS:
            read = self.read([torch.zeros(tokens, dtype=torch.int64)] * rows, cache)
            self.log_probabilities(torch.cat(read), self._zeros(rows * tokens))

    @torch.inference_mode()
    def read(self, rows: Sequence[Tensor], cache: PrefixCache) -> list[Tensor]:
        """Read token rows [N] causally, each after the prefix; hidden states [N, D] of each."""
        if len(rows) > READ_ROW_BUCKETS[-1]:
            half = len(rows) // 2
            return [*self.read(rows[:half], cache), *self.read(rows[half:], cache)]
        lengths = [len(row) for row in rows]
        wide = next(n for n in READ_ROW_BUCKETS if n >= len(rows))
        longest = next((n for n in READ_BUCKETS if n >= max(lengths)), max(lengths))
        reading = self._tokens_pass(wide, longest, writes=False)
        hidden = self._fill_tokens(reading, [row.cpu() for row in rows], cache)
        return [own[:count].clone() for own, count in zip(hidden, lengths, strict=False)]

    @torch.inference_mode()
    def run(self, passes: Sequence[CanvasPass]) -> list[Reading]:
        """One pass over the canvases of several prefixes, of any lengths, side by side."""
        rows = sum(len(each.canvas) for each in passes)
        bans = sum(0 if each.ask.banned is None else len(each.ask.banned.rows) for each in passes)
        if len(passes) > 1 and (rows > ROW_BUCKETS[-1] or bans >= _MOST_BANS):
            half = len(passes) // 2
            return [*self.run(passes[:half]), *self.run(passes[half:])]
        wide = next((n for n in ROW_BUCKETS if n >= rows), rows)
        longest = max(each.canvas.shape[1] for each in passes)
        length = next((n for n in self._lengths if n >= longest), longest)
        top = max(each.ask.top or 1 for each in passes)
        is_drawn = any(each.ask.draws is not None for each in passes)
        is_weighed = any(each.ask.weighed is not None for each in passes)
        key = ("canvas", wide, length, top, is_drawn, is_weighed)
        captured = self._captured.get(key)
        if captured is None:
            is_bucket = wide in ROW_BUCKETS and length in self._lengths
            inputs = self._canvas_inputs(wide, length, top)
            compute = partial(self._canvas_pass, is_drawn=is_drawn, is_weighed=is_weighed)
            captured = _Captured(inputs, compute, self._pool if is_bucket else None)
            if is_bucket:
                self._captured[key] = captured
        # From step to step only what the canvases hold changes, not where they stand.
        placing = self._placing(passes)
        if captured.placing != placing:
            captured.placing = None
            self._place(captured.inputs, passes)
            captured.placing = placing
        self._fill(captured.inputs, passes)
        return self._sorted_out(passes, captured.run(), length)

    @torch.inference_mode()
    def experts_touched(self, each: CanvasPass) -> list[int]:
        """How many experts each layer reads in a pass over a canvas; for reports."""
        touched: list[int] = []

        def count(layer: int, routes: Routes) -> None:
            touched.append(len(torch.unique(routes.ids)))

        rows, length = each.canvas.shape
        inputs = self._canvas_inputs(rows, length, each.ask.top or 1)
        self._place(inputs, [each])
        self._fill(inputs, [each])
        self._canvas_hidden(inputs, on_routes=count)
        return touched

    # Prompts.

    def _encode_piece(self, tokens: Tensor, cache: PrefixCache) -> Tensor:
        assert isinstance(cache, SlabCache)
        count = len(tokens)
        # Padding is stored too, behind what counts: at the end of a slot there is no room for it.
        room = self._context_tokens - cache.tokens
        bucket = next((n for n in PIECE_BUCKETS if count <= n <= room), count)
        cache.make_room(bucket)
        ids = tokens.cpu()
        hidden = self._fill_tokens(self._tokens_pass(1, bucket, writes=True), [ids], cache)
        hidden = hidden[0, :count].clone()
        cache.extend(ids)
        return hidden

    def _tokens_pass(self, rows: int, length: int, *, writes: bool) -> _Captured:
        """A causal pass over rows of tokens; a graph where its shape is one of the buckets."""
        key = ("tokens", rows, length, writes)
        found = self._captured.get(key)
        if found is None:
            shape = (rows, length)
            inputs = {name: self._zeros(*shape) for name in ("tokens", "positions", "routed_as")}
            numbers = ["slots", *(f"count_{kind}" for kind in self.config.kinds)]
            inputs |= {name: self._zeros(rows, dtype=torch.int32) for name in numbers}
            is_bucket = length in (PIECE_BUCKETS if writes else READ_BUCKETS)
            compute = partial(self._read_tokens, writes=writes)
            found = _Captured(inputs, compute, self._pool if is_bucket else None)
            if is_bucket:
                self._captured[key] = found
        return found

    def _fill_tokens(
        self, tokens_pass: _Captured, rows: Sequence[Tensor], cache: PrefixCache
    ) -> Tensor:
        """Hidden states [R, T, D] of rows [N] behind one prefix; what pads them means nothing."""
        inputs = tokens_pass.inputs
        wide, length = inputs["tokens"].shape
        padded = [*rows, *[rows[0]] * (wide - len(rows))]
        ends = torch.tensor([len(row) for row in padded])[:, None] - 1
        places = torch.arange(length).expand(wide, length).minimum(ends)
        ids = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True)
        self._put(inputs["tokens"], ids.gather(1, places))
        self._put(inputs["positions"], places + cache.tokens)
        self._put(inputs["routed_as"], places + length * torch.arange(wide)[:, None])
        self._put(inputs["slots"], torch.tensor([_slot(cache)] * wide))
        for kind in self.config.kinds:
            self._put(inputs[f"count_{kind}"], torch.tensor([cache.stored(kind)] * wide))
        return tokens_pass.run()[0].view(wide, length, -1)

    def _read_tokens(self, inputs: dict[str, Tensor], *, writes: bool) -> tuple[Tensor, ...]:
        shape = inputs["tokens"].shape

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kind = self.config.layer_kinds[layer]
            q, k, v = (t.view(*shape, *t.shape[1:]) for t in (query, key, value))
            return prefix_attention(
                q,
                k,
                v,
                self.slab.keys[layer],
                self.slab.values[layer],
                inputs["slots"],
                inputs[f"count_{kind}"],
                window=self.config.sliding_window if kind == "sliding" else None,
                writes=writes,
                impl=self.stack.impl,
            ).flatten(0, 1)

        hidden = self.stack.run(
            self.stack.embed(inputs["tokens"].flatten()),
            inputs["positions"].flatten(),
            attend,
            is_encoder=True,
            routed_as=inputs["routed_as"].flatten(),
        )
        return (hidden,)

    # Canvases.

    def _canvas_inputs(self, rows: int, length: int, top: int) -> dict[str, Tensor]:
        return {
            "canvas": self._zeros(rows, length),
            "belief_ids": self._zeros(rows, length, top),
            "belief_probabilities": self._zeros(rows, length, top, dtype=torch.float32),
            "told": self._zeros(rows, length, dtype=torch.float32),
            "positions": self._zeros(rows, length),
            "routed_as": self._zeros(rows, length),
            "slots": self._zeros(rows, dtype=torch.int32),
            "lengths": self._zeros(rows, dtype=torch.int32),
            "temperature": self._zeros(rows, length, dtype=torch.float32) + 1.0,
            "banned": self._banned,
            "ban_row": self._zeros(rows, length),
            "targets": self._zeros(rows, length),
            "uniforms": self._zeros(rows, length, 2, dtype=torch.float32),
            **{
                f"{name}_{kind}": self._zeros(rows, dtype=torch.int32)
                for name in ("first", "count")
                for kind in self.config.kinds
            },
        }

    def _canvas_hidden(
        self,
        inputs: dict[str, Tensor],
        on_routes: Callable[[int, Routes], None] | None = None,
    ) -> Tensor:
        """Normed hidden states [R * L, D]."""
        rows, length = inputs["canvas"].shape
        signal = self.stack.embed_belief(
            inputs["belief_ids"].flatten(0, 1), inputs["belief_probabilities"].flatten(0, 1)
        )
        # The block has no biases: it adds nothing where the signal is 0. Chosen, not multiplied:
        # what an earlier pass left there may be NaN.
        signal = torch.where(inputs["told"].flatten()[:, None] > 0, signal, 0)
        x = self.stack.condition(self.stack.embed(inputs["canvas"].flatten()), signal)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            kind = self.config.layer_kinds[layer]
            q, k, v = (t.view(rows, length, *t.shape[1:]) for t in (query, key, value))
            return canvas_attention(
                q,
                k,
                v,
                self.slab.keys[layer],
                self.slab.values[layer],
                inputs["slots"],
                inputs[f"first_{kind}"],
                inputs[f"count_{kind}"],
                inputs["lengths"],
                impl=self.stack.impl,
            ).flatten(0, 1)

        return self.stack.run(
            x,
            inputs["positions"].flatten(),
            attend,
            is_encoder=False,
            routed_as=inputs["routed_as"].flatten(),
            on_routes=on_routes,
        )

    def _canvas_pass(
        self, inputs: dict[str, Tensor], *, is_drawn: bool, is_weighed: bool
    ) -> tuple[Tensor, ...]:
        found = self.stack.read_head(
            self._canvas_hidden(inputs),
            temperature=inputs["temperature"].flatten(),
            top=inputs["belief_ids"].shape[-1],
            banned=inputs["banned"],
            ban_row=inputs["ban_row"].flatten(),
            # Beside bans they take a second product with the whole head: only where they are asked.
            targets=inputs["targets"].flatten() if is_weighed else None,
            uniforms=inputs["uniforms"].flatten(0, 1) if is_drawn else None,
        )
        sample = found.argmax if found.sample is None else found.sample
        logs, weighed = found.log_probability, found.target_log_probability
        return (*found[:5], sample, logs if weighed is None else weighed)

    def _placing(self, passes: Sequence[CanvasPass]) -> object:
        """All that `_place` depends on, beside the bucket."""
        return [
            (
                _slot(each.cache),
                each.cache.tokens,
                *(each.cache.visible(kind) for kind in self.config.kinds),
                each.canvas.shape,
            )
            for each in passes
        ]

    def _place(self, inputs: dict[str, Tensor], passes: Sequence[CanvasPass]) -> None:
        """Say where each row stands: in its prefix, and among the positions of the bucket."""
        rows, length = inputs["canvas"].shape
        filled = [each for each in passes for _ in range(len(each.canvas))]
        # Rows that nobody asked for repeat the first one.
        filled += [passes[0]] * (rows - len(filled))
        caches = [each.cache for each in filled]
        used = torch.tensor([each.canvas.shape[1] for each in filled])
        own = torch.arange(length).expand(rows, length)
        places = torch.where(own < used[:, None], own, 0)
        starts = torch.tensor([cache.tokens for cache in caches])
        self._put(inputs["positions"], places + starts[:, None])
        self._put(inputs["routed_as"], places + length * torch.arange(rows)[:, None])
        self._put(inputs["lengths"], used)
        self._put(inputs["slots"], torch.tensor([_slot(cache) for cache in caches]))
        for kind in self.config.kinds:
            seen = torch.tensor([cache.visible(kind) for cache in caches])
            self._put(inputs[f"first_{kind}"], seen[:, 0])
            self._put(inputs[f"count_{kind}"], seen[:, 1])

    def _fill(self, inputs: dict[str, Tensor], passes: Sequence[CanvasPass]) -> None:
        """Copy what the passes read to where their bucket reads it; the rest repeats the first."""
        at = bans = 0
        for each in passes:
            count, used_here = each.canvas.shape
            bans = self._fill_rows(inputs, slice(at, at + count), used_here, each, bans)
            at += count
        for name in ("canvas", "belief_ids", "belief_probabilities", "told"):
            inputs[name][at:] = inputs[name][:1]
        for name in ("temperature", "ban_row", "targets", "uniforms"):
            inputs[name][at:] = inputs[name][:1]

    def _fill_rows(
        self,
        inputs: dict[str, Tensor],
        rows: slice,
        used: int,
        each: CanvasPass,
        bans: int,
    ) -> int:
        """One pass's own rows; returns how many sets of banned tokens are taken with it."""
        ask = each.ask

        def put(name: str, values: Tensor) -> None:
            target = inputs[name][rows]
            target[:, :used] = values
            target[:, used:] = target[:, :1]

        put("canvas", each.canvas)
        inputs["told"][rows] = float(each.belief is not None)
        if isinstance(each.belief, Belief):
            top, given = inputs["belief_ids"].shape[-1], each.belief.ids.shape[-1]
            spare = top - given
            pad = (0, spare)
            put("belief_ids", torch.nn.functional.pad(each.belief.ids, pad)[..., :top])
            put(
                "belief_probabilities",
                torch.nn.functional.pad(each.belief.probabilities, pad)[..., :top],
            )
        elif each.belief is not None:
            raise TypeError("a runner's passes are told a Belief, not logits")
        inputs["temperature"][rows] = float(ask.temperature)
        if ask.banned is None:
            # The last set bans nothing.
            inputs["ban_row"][rows] = _MOST_BANS - 1
        else:
            taken = len(ask.banned.rows)
            if bans + taken >= _MOST_BANS:
                raise ValueError(f"a pass takes {_MOST_BANS - 1} sets of banned tokens")
            inputs["banned"][bans : bans + taken] = ask.banned.rows
            put("ban_row", ask.banned.places + bans)
            bans += taken
        if ask.weighed is not None:
            put("targets", ask.weighed)
        if ask.draws is not None:
            put("uniforms", ask.draws.uniforms(*each.canvas.shape))
        return bans

    def _sorted_out(
        self, passes: Sequence[CanvasPass], found: Sequence[Tensor], length: int
    ) -> list[Reading]:
        """Each pass's own part of what was read, copied from where the next replay writes."""
        readings, at = [], 0
        argmax, logs, entropy, ids, probabilities, sample, weighed = (
            part.view(-1, length, *part.shape[1:]) for part in found
        )
        for each in passes:
            rows, used = each.canvas.shape
            own = (slice(at, at + rows), slice(0, used))
            at += rows
            proposal = argmax if each.ask.draws is None else sample
            reading = Reading(
                argmax=argmax[own].clone(),
                log_probability=logs[own].clone(),
                entropy_nats=entropy[own].clone(),
                proposal=proposal[own].clone(),
                belief=Belief(ids=ids[own].clone(), probabilities=probabilities[own].clone()),
                weighed=None if each.ask.weighed is None else weighed[own].clone(),
            )
            readings.append(reading if each.ask.pins is None else imposed(reading, each.ask.pins))
        return readings

    # Numbers on their way to the device.

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _put(self, target: Tensor, values: Tensor) -> None:
        """Copy host numbers to the device without waiting for it."""
        target.copy_(self._pinned(values.to(target.dtype)), non_blocking=True)

    def _pinned(self, values: Tensor) -> Tensor:
        # A copy from pageable memory would make the host wait for the device.
        return values.pin_memory() if self.device.type == "cuda" else values


def _slot(cache: PrefixCache) -> int:
    assert isinstance(cache, SlabCache)
    return cache.slot
