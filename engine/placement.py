"""What a checkpoint becomes on a GPU: as it is, or in fewer bits, and with how much context."""

from dataclasses import dataclass
from typing import Literal

import torch

from infilld.engine.checkpoints.quantizing import Quantization
from infilld.engine.checkpoints.weights import PLAIN, CheckpointSummary
from infilld.engine.memory import KeyValues, MemoryPlan, WeightBytes, plan_memory

Storage = Literal["plain", "int4", "int8"]

GPU_DTYPE = torch.bfloat16
# A plain checkpoint this large is read in int4: each pass reads nearly all of its weights, and a
# quarter of the bytes is a quarter of the time. A smaller one is bound by launches.
_LARGE_BYTES = 4_000_000_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be used of a GPU; None: what fits.

    Attributes:
        context_tokens: longest prompt that room is kept for.
        memory_bytes: of the device.
        key_values: how prompts are held.
        weights: what a plain checkpoint's weights become; None: int4 from 4 GB on, else plain.
    """

    context_tokens: int | None = None
    memory_bytes: int | None = None
    key_values: KeyValues | None = None
    weights: Storage | None = None


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Placement:
    """How a checkpoint is loaded onto a GPU.

    Attributes:
        quantization: of a plain checkpoint; None: it is loaded as it is.
        plan: where the bytes go; it need not fit.
    """

    quantization: Quantization | None
    plan: MemoryPlan


def place_on_gpu(summary: CheckpointSummary, limits: Limits, budget_bytes: int | None) -> Placement:
    """How a checkpoint is best loaded within limits.

    Where nobody says how much context is wanted, it is what fits, up to the usual one.

    Args:
        summary: of the checkpoint. limits: wishes.
        budget_bytes: what may be used; None: not known.

    Raises:
        CheckpointMismatch: the context is longer than the model reads.
    """
    quantization = _quantization(summary, limits.weights)
    if quantization is None:
        weights = WeightBytes.of(summary, GPU_DTYPE)
    else:
        weights = WeightBytes.estimate(summary.config, GPU_DTYPE, quantization)
    plan = plan_memory(
        summary.config,
        weights,
        on_gpu=True,
        context_tokens=limits.context_tokens,
        key_values=limits.key_values,
        budget_bytes=budget_bytes,
    )
    if limits.context_tokens is None and not plan.fits:
        plan = plan.with_context(plan.largest_context() or plan.context_tokens)
    return Placement(quantization, plan)


def _quantization(summary: CheckpointSummary, wish: Storage | None) -> Quantization | None:
    """What is done to a checkpoint; one that is in few bits already stays as it is."""
    if summary.format != PLAIN or wish == "plain":
        return None
    if wish is None and summary.parameters * GPU_DTYPE.itemsize < _LARGE_BYTES:
        return None
    return Quantization(kind=wish or "int4")
