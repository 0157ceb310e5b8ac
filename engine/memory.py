"""What a model takes of a device's memory, told before it is loaded.

A GB is 10^9 bytes here and wherever these numbers are shown.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from infilld.engine.checkpoints.quantizing import (
    Quantization,
    bits_per_weight,
    group_for,
    is_quantizable,
    is_quantized,
)
from infilld.engine.checkpoints.weights import CheckpointSummary, Part, expected_shapes, part_of
from infilld.engine.config import ModelConfig
from infilld.engine.errors import CheckpointMismatch, NotEnoughMemory
from infilld.engine.model import MOST_PREFIXES
from infilld.kernels._tiles import tile_layout
from infilld.kernels._weights import QuantizedWeight

KeyValues = Literal["float32", "bf16", "fp8"]

# Of what is free on a device, the rest is left to whatever else draws on it.
SHARE_OF_FREE = 0.95
# What is planned for where nobody says how much context is wanted.
DEFAULT_CONTEXT_TOKENS = 32_768
# Contexts are offered in steps of this many tokens.
_CONTEXT_STEP_TOKENS = 256
# One encoded prefix is held for each job side by side. Up to this budget only one, as context is
# worth more there; unless all take no more than this share of what the weights leave.
SMALL_BUDGET_BYTES = 24_000_000_000
_MOST_SLOTS, _SLOTS_SHARE = 4, 0.25
# A sliding layer keeps so much beyond its window: what may be cut back, and the piece being read.
_MARGIN_TOKENS, _PIECE_TOKENS = 512, 512
# Positions of a pass that several jobs share, and of the logits that are made at once.
_GPU_PASS_TOKENS, _CPU_PASS_TOKENS = 2048, 512
_LOGITS_TOKENS = 256
# Tensors [T, D] that are alive at once, at most: the residual, three norms of it, three results.
_HIDDEN_TENSORS = 8
# A pass over few rows splits the keys, and keeps a float32 result of every split until combined.
_SPLIT_TOKENS, _SPLITS = 256, 8
# An estimate, not measured: CUDA's context and the kernels' code 0.5 GB, graphs 0.2 GB. Where the
# context exists when free memory is asked for, it is counted twice.
_DRIVER_BYTES = 700_000_000

_SUMS = ("quantized", "plain", "embedding", "self_conditioning", "filling")
_KEY_VALUE_BYTES: dict[KeyValues, int] = {"float32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Bytes of a model's weights, as held.

    Attributes:
        storage: how to call them: "as stored", "int4".
        quantized: weights in few bits, with their scales.
        plain: everything else but what follows: router, norms, scalars, what is not quantized.
        embedding: table and head, which are one.
        self_conditioning: matrices that turn a belief into an input.
        filling: what weights in few bits take beside that on a GPU, where rows and columns are
            filled up to whole tiles.
    """

    storage: str
    quantized: int
    plain: int
    embedding: int
    self_conditioning: int
    filling: int

    @property
    def total(self) -> int:
        """All of them, without the filling."""
        return self.quantized + self.plain + self.embedding + self.self_conditioning

    @classmethod
    def of(cls, summary: CheckpointSummary, dtype: torch.dtype) -> "WeightBytes":
        """Of a checkpoint as it is, plain tensors in `dtype`."""
        sums = dict.fromkeys(_SUMS, 0)
        fillings = _fillings(summary.config)
        for line in summary.parts:
            plain_bytes = line.parameters * dtype.itemsize
            held_bytes = plain_bytes if line.held_bytes is None else line.held_bytes
            if line.part == "embedding":
                sums["embedding"] += held_bytes
            elif line.part == "self-conditioning":
                sums["self_conditioning"] += held_bytes
            elif line.kind is None or line.held_bytes is None:
                sums["plain"] += held_bytes
            else:
                sums["quantized"] += held_bytes
                sums["filling"] += math.ceil(held_bytes * fillings[line.part])
        return cls(storage="as stored", **sums)

    @classmethod
    def estimate(
        cls, config: ModelConfig, dtype: torch.dtype, quantization: Quantization | None
    ) -> "WeightBytes":
        """Of a checkpoint that is quantized while it is loaded; None: of a plain one."""
        sums = dict.fromkeys(_SUMS, 0)
        for name, shape in expected_shapes(config).items():
            count = math.prod(shape)
            if quantization is not None and is_quantizable(name, shape):
                held_bytes = math.ceil(count * bits_per_weight(shape[-1], quantization) / 8)
                sums["quantized"] += held_bytes
                sums["filling"] += math.ceil(held_bytes * tiles_filling(name, shape))
                continue
            part = part_of(name)
            place = {"embedding": "embedding", "self-conditioning": "self_conditioning"}
            sums[place.get(part, "plain")] += count * dtype.itemsize
        return cls(storage="plain" if quantization is None else quantization.kind, **sums)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Where the bytes go.

    Attributes:
        config: shapes.
        on_gpu: whether the device is a GPU.
        context_tokens: encoded prefix that is planned for.
        key_values: how keys and values are held.
        slots: encoded prefixes held at once.
        weights: bytes of the weights.
        key_value_bytes: keys and values of all slots.
        workspace_bytes: what one pass computes with.
        driver_bytes: context and graphs of the GPU; an estimate.
        budget_bytes: what may be used; None: not known.
    """

    config: ModelConfig
    on_gpu: bool
    context_tokens: int
    key_values: KeyValues
    slots: int
    weights: WeightBytes
    key_value_bytes: int
    workspace_bytes: int
    driver_bytes: int
    budget_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(count for _, count, _ in self.rows)

    @property
    def fits(self) -> bool:
        """Whether the budget is enough; true where it is not known."""
        return self.budget_bytes is None or self.total_bytes <= self.budget_bytes

    @property
    def rows(self) -> tuple[tuple[str, int, str], ...]:
        """Name, bytes and a remark, for each thing that takes memory."""
        prefixes = "1 prefix" if self.slots == 1 else f"{self.slots} prefixes"
        kept = f"{self.context_tokens:,} tokens, {self.key_values}, {prefixes}"
        named = (
            ("weights in few bits", self.weights.quantized, self.weights.storage),
            ("filling of their tiles", self.weights.filling if self.on_gpu else 0, ""),
            ("plain weights", self.weights.plain, ""),
            ("embedding and head", self.weights.embedding, ""),
            ("self-conditioning", self.weights.self_conditioning, ""),
            ("keys and values", self.key_value_bytes, kept),
            ("workspace", self.workspace_bytes, ""),
            ("CUDA context and graphs", self.driver_bytes, "an estimate"),
        )
        return tuple(row for row in named if row[1])

    def table(self) -> str:
        """The plan for people, a line for each thing, in GB of 10^9 bytes."""
        rows = [*self.rows, ("total", self.total_bytes, "")]
        if self.budget_bytes is not None:
            rows.append(("may be used", self.budget_bytes, "fits" if self.fits else "too little"))
        return "\n".join(
            f"{name:<26}{gigabytes(count):>10}  {remark}".rstrip() for name, count, remark in rows
        )

    def with_context(self, tokens: int) -> "MemoryPlan":
        """The same plan for a context of so many tokens."""
        one = _key_value_bytes(self.config, tokens, self.key_values)
        return replace(self, context_tokens=tokens, key_value_bytes=self.slots * one)

    def largest_context(self) -> int:
        """Longest context with which it fits, in steps of 256 tokens; 0: not even one step."""
        most = longest_context(self.config)
        if self.budget_bytes is None:
            return most
        if self.with_context(most).fits:
            return most
        low, high = 0, math.ceil(most / _CONTEXT_STEP_TOKENS)
        while high - low > 1:
            middle = (low + high) // 2
            if self.with_context(middle * _CONTEXT_STEP_TOKENS).fits:
                low = middle
            else:
                high = middle
        return low * _CONTEXT_STEP_TOKENS


def plan_memory(
    config: ModelConfig,
    weights: WeightBytes,
    *,
    on_gpu: bool,
    context_tokens: int | None = None,
    key_values: KeyValues | None = None,
    slots: int | None = None,
    budget_bytes: int | None = None,
) -> MemoryPlan:
    """Where the bytes of a model go that is not loaded yet.

    Args:
        config: shapes.
        weights: bytes of the weights.
        on_gpu: whether the device is a GPU; a CPU computes in float32.
        context_tokens: prefix to plan for; None: 32,768 or what the model reads at most.
        key_values: how they are held; None: bf16 on a GPU, float32 on a CPU.
        slots: encoded prefixes held at once; None: 8 on a CPU, on a GPU 4, or 1 where a budget of
            24 GB or less is short of room for them.
        budget_bytes: what may be used; None: not known.

    Raises:
        CheckpointMismatch: the context is longer than the model reads.
        ValueError: no slot.
    """
    most = longest_context(config)
    context = min(DEFAULT_CONTEXT_TOKENS, most) if context_tokens is None else context_tokens
    if not 0 <= context <= most:
        raise CheckpointMismatch(
            f"a context of {context:,} tokens is wanted, the model reads {most:,} at most",
            remedy=f"Ask for a context of 1 to {most} tokens.",
        )
    held: KeyValues = key_values or ("bf16" if on_gpu else "float32")
    one = _key_value_bytes(config, context, held)
    if slots is None and not on_gpu:
        slots = MOST_PREFIXES
    if slots is None:
        slots = _MOST_SLOTS
        if budget_bytes is not None and budget_bytes <= SMALL_BUDGET_BYTES:
            left = budget_bytes - weights.total - weights.filling
            slots = _MOST_SLOTS if _MOST_SLOTS * one <= _SLOTS_SHARE * left else 1
    if slots < 1:
        raise ValueError(f"{slots=}: expected 1 or more")
    return MemoryPlan(
        config=config,
        on_gpu=on_gpu,
        context_tokens=context,
        key_values=held,
        slots=slots,
        weights=weights,
        key_value_bytes=slots * one,
        workspace_bytes=_workspace_bytes(config, on_gpu=on_gpu),
        driver_bytes=_DRIVER_BYTES if on_gpu else 0,
        budget_bytes=budget_bytes,
    )


def refuse_too_large(plan: MemoryPlan) -> None:
    """Raise NotEnoughMemory, naming what would fit instead, unless the plan fits."""
    if plan.fits:
        return
    assert plan.budget_bytes is not None
    offers = alternatives(plan)
    raise NotEnoughMemory(
        f"a context of {plan.context_tokens:,} tokens needs {gigabytes(plan.total_bytes)}, "
        f"{gigabytes(plan.budget_bytes)} may be used",
        remedy=_advice(plan, offers),
    )


def alternatives(plan: MemoryPlan) -> tuple[MemoryPlan, ...]:
    """Plans that fit the budget of one that does not, the least change first.

    Less context; on a GPU also keys and values in fp8; and weights in int4, where they are larger.
    """
    dtype = torch.bfloat16 if plan.on_gpu else torch.float32
    int4 = WeightBytes.estimate(plan.config, dtype, Quantization(kind="int4"))
    smaller = (int4,) if int4.total < plan.weights.total else ()
    offers: list[MemoryPlan] = []
    for weights in (plan.weights, *smaller):
        for held in dict.fromkeys((plan.key_values, *(("fp8",) if plan.on_gpu else ()))):
            tried = plan_memory(
                plan.config,
                weights,
                on_gpu=plan.on_gpu,
                context_tokens=plan.context_tokens,
                key_values=held,
                slots=plan.slots,
                budget_bytes=plan.budget_bytes,
            )
            context = tried.context_tokens if tried.fits else tried.largest_context()
            # What holds no more than an offer that changes less is none.
            if context > max((offer.context_tokens for offer in offers), default=0):
                offers.append(tried.with_context(context))
    return tuple(offers)


def longest_context(config: ModelConfig) -> int:
    """Longest prefix that leaves room for a canvas."""
    return max(0, config.max_positions - config.canvas_tokens)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a device that nobody uses; None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        told = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", told, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def budget_of(device: torch.device, limit_bytes: int | None = None) -> int | None:
    """What may be used of a device: a limit that somebody set, or a share of what is free."""
    if limit_bytes is not None:
        return limit_bytes
    free = free_bytes(device)
    return None if free is None else int(free * SHARE_OF_FREE)


def tiles_filling(name: str, shape: tuple[int, ...]) -> float:
    """What tiles add to a weight in few bits, as a share of it."""
    *leading, rows, columns = shape
    group = group_for(columns, 32)
    weight = QuantizedWeight(
        kind="int4",
        codes=torch.empty(*leading, rows, columns // 2, dtype=torch.uint8, device="meta"),
        scales=torch.empty(*leading, rows, columns // group, device="meta"),
        group=group,
    )
    try:
        layout = tile_layout(weight, capability=80, gated=name.endswith("gate_up_proj"))
    except ValueError:
        # No tiles can be made of it; loading says so.
        return 0.0
    tiled = layout.n_tiles(rows) * layout.block_n * layout.k_tiles(columns) * 2 * layout.half
    return tiled / (rows * columns) - 1


def gigabytes(count: int) -> str:
    """Bytes for people, in GB of 10^9, or in MB below 0.1 GB."""
    return f"{count / 1e9:.2f} GB" if count >= 100_000_000 else f"{count / 1e6:.1f} MB"


def _fillings(config: ModelConfig) -> dict[Part, float]:
    """The same for the parts of a model, on the average of their weights."""
    numbers: dict[Part, float] = {}
    filled: dict[Part, float] = {}
    for name, shape in expected_shapes(config).items():
        if is_quantized(name, shape):
            part, count = part_of(name), math.prod(shape)
            numbers[part] = numbers.get(part, 0) + count
            filled[part] = filled.get(part, 0) + count * tiles_filling(name, shape)
    return {part: filled[part] / count for part, count in numbers.items()}


def _key_value_bytes(config: ModelConfig, context_tokens: int, held: KeyValues) -> int:
    kept = config.sliding_window - 1 + _MARGIN_TOKENS + _PIECE_TOKENS
    tokens = {"full": context_tokens, "sliding": min(context_tokens, kept)}
    numbers = sum(
        2 * config.key_heads[kind] * config.head_sizes[kind] * tokens[kind]
        for kind in config.layer_kinds
    )
    return numbers * _KEY_VALUE_BYTES[held]


def _workspace_bytes(config: ModelConfig, *, on_gpu: bool) -> int:
    """What the widest layer of a pass over the most positions holds at once."""
    tokens = _GPU_PASS_TOKENS if on_gpu else _CPU_PASS_TOKENS
    number_bytes = 2 if on_gpu else 4
    projected = max(
        (config.heads + 2 * config.key_heads[kind]) * config.head_sizes[kind]
        for kind in config.kinds
    )
    attended = config.heads * max(config.head_sizes[kind] for kind in config.kinds)
    chosen = config.experts_per_token
    hidden = _HIDDEN_TENSORS * config.width
    # Projections as they come and as they are turned; the gate, the input and their product.
    attention, dense = 2 * projected + attended, 3 * config.dense_width
    routed = chosen * (config.width + config.expert_width)
    numbers = tokens * (hidden + max(attention, dense + routed))
    # Raw logits are kept in half precision on a GPU, in float32 on a CPU.
    logits = _LOGITS_TOKENS * config.vocab_tokens
    splits = _SPLITS * _SPLIT_TOKENS * attended * 4 if on_gpu else 0
    return (numbers + logits) * number_bytes + splits


def _advice(plan: MemoryPlan, offers: tuple[MemoryPlan, ...]) -> str:
    if not offers:
        least = plan.with_context(0).total_bytes
        return f"Choose a smaller model; this one needs {gigabytes(least)} before any context."
    said = []
    for offer in offers:
        changes = []
        if offer.weights is not plan.weights:
            changes.append(f"{offer.weights.storage} weights (infilld models quantize)")
        if offer.key_values != plan.key_values:
            changes.append(f"keys and values in {offer.key_values}")
        how = f" with {' and '.join(changes)}" if changes else ""
        said.append(f"a context of {offer.context_tokens:,} tokens{how}")
    return f"What fits: {'; '.join(said)}."
