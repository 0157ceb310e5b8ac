"""Plain weights into few bits: which of a model's tensors, and with what scales."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from infilld.engine.checkpoints.weights import Part, part_of
from infilld.kernels._weights import QuantizedWeight

# What the model can do with in few bits. Embedding and head, which are one, decide between tokens:
# in 8 bits their tail flattened and other engines stopped converging. The router decides between
# experts. The rest is small.
QUANTIZED_PARTS: tuple[Part, ...] = ("attention", "dense MLP", "experts")
DEFAULT_GROUP = 32
# A GPU's matmuls read groups of this many numbers, and of its multiples.
_SMALLEST_GROUP = 16
# Codes, lowest and highest.
_CODES = {"int4": (-8, 7), "int8": (-127, 127)}
_SCALE_BITS = {"int4": 16, "int8": 16}
# Where the largest number of a group may land in int4. It takes the side that has one code more,
# so -8 wastes nothing and clips nothing; -9 clips it for finer steps. Rounding error of normal
# numbers in groups of 32: 9.70 % of their size with steps of max / 7, 8.40 with -8 alone, 8.12
# with these five, 8.09 with 38 of them (torch 2.13, CPU).
_INT4_PLACES = (-7.0, -7.5, -8.0, -8.5, -9.0)
# Numbers taken at once: what a core's cache holds, or enough to fill a GPU.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 26


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How plain weights are quantized.

    Attributes:
        kind: int4 or int8, both symmetric, with bf16 scales.
        group: consecutive k that share a scale.
    """

    kind: Literal["int4", "int8"] = "int4"
    group: int = DEFAULT_GROUP

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        if self.kind not in _CODES:
            raise ValueError(f"{self.kind!r}: expected int4 or int8")
        if self.group < _SMALLEST_GROUP or self.group & (self.group - 1):
            raise ValueError(
                f"groups of {self.group}: expected a power of two, {_SMALLEST_GROUP} or more"
            )


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether an internal tensor stays in few bits where a checkpoint has it so."""
    return (
        part_of(name) in QUANTIZED_PARTS
        and len(shape) >= 2
        and shape[-1] % 8 == 0
        and math.prod(shape) > 0
    )


def is_quantizable(name: str, shape: Sequence[int]) -> bool:
    """Whether a plain internal tensor is put into few bits."""
    return is_quantized(name, shape) and shape[-1] % _SMALLEST_GROUP == 0


def group_for(columns: int, group: int) -> int:
    """The group for a weight of so many columns: the one asked for, halved until it divides."""
    while columns % group:
        group //= 2
    return group


def bits_per_weight(columns: int, quantization: Quantization) -> float:
    """Bits a number takes, its share of a scale included."""
    bits = 4 if quantization.kind == "int4" else 8
    return bits + _SCALE_BITS[quantization.kind] / group_for(columns, quantization.group)


@torch.no_grad()
def quantize_rows(weight: Tensor, quantization: Quantization) -> QuantizedWeight:
    """A weight [..., N, K] in few bits, symmetric, with bf16 scales.

    Of several ways to lay a group onto the codes the one with the least squared error is taken,
    with the scale that is best for its codes; then the codes are rounded again for the scale as
    bf16 holds it. A scale may be negative.

    Args:
        weight: floating point, finite, on any device; K a multiple of 16.
        quantization: kind and group; the group is halved until it divides K.

    Raises:
        ValueError: not a matrix, K is no multiple of 16, or a number is not finite.
    """
    if weight.ndim < 2 or weight.shape[-1] % _SMALLEST_GROUP:
        raise ValueError(f"a weight {list(weight.shape)}, expected [..., N, K], K a multiple of 16")
    columns = weight.shape[-1]
    group = group_for(columns, quantization.group)
    flat = weight.reshape(-1, group)
    scales = torch.empty(len(flat), device=weight.device, dtype=torch.bfloat16)
    is_int4 = quantization.kind == "int4"
    held = (group // 2, torch.uint8) if is_int4 else (group, torch.int8)
    codes = torch.empty(len(flat), held[0], device=weight.device, dtype=held[1])
    chunk = _GPU_CHUNK if weight.device.type == "cuda" else _CPU_CHUNK
    low, high = _CODES[quantization.kind]
    step = max(1, chunk // group)
    for start in range(0, len(flat), step):
        numbers = flat[start : start + step].float()
        scale = (_int4_scales(numbers) if is_int4 else _int8_scales(numbers)).to(torch.bfloat16)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError("a weight that is to be quantized holds a number that is not finite")
        code = (numbers * _inverse(scale.float())[:, None]).round_().clamp_(low, high)
        scales[start : start + step] = scale
        codes[start : start + step] = _packed(code) if is_int4 else code.to(torch.int8)
    shape = weight.shape[:-1]
    return QuantizedWeight(
        kind=quantization.kind,
        codes=codes.view(*shape, -1),
        scales=scales.view(*shape, columns // group),
        group=group,
    )


def _int4_scales(numbers: Tensor) -> Tensor:
    """The best scale [groups] float32 for each row of numbers [groups, G]."""
    low, high = _CODES["int4"]
    largest = numbers.gather(1, numbers.abs().argmax(1, keepdim=True))
    inverse = _inverse(largest)
    best_gain = numbers.new_full((len(numbers),), -1.0)
    best_scale = torch.zeros_like(best_gain)
    for place in _INT4_PLACES:
        code = (numbers * (place * inverse)).round_().clamp_(low, high)
        product = torch.linalg.vecdot(numbers, code)
        square = torch.linalg.vecdot(code, code).clamp_(min=1)
        # With the least-squares scale the error is |numbers|^2 - product^2 / square.
        scale = product / square
        gain = product * scale
        is_better = gain > best_gain
        best_gain = torch.where(is_better, gain, best_gain)
        best_scale = torch.where(is_better, scale, best_scale)
    return best_scale + 0 * largest[:, 0]  # NaN and inf stay what they are


def _int8_scales(numbers: Tensor) -> Tensor:
    return numbers.abs().amax(1) / _CODES["int8"][1]


def _inverse(numbers: Tensor) -> Tensor:
    """1 / numbers; 0 for 0, and for what is so small that its inverse is none."""
    return torch.where(numbers.abs() < torch.finfo(torch.float32).tiny, 0, 1 / numbers)


def _packed(code: Tensor) -> Tensor:
    """Codes -8..7 [groups, G] as nibbles + 8, the low one is the even k."""
    nibble = (code + 8).to(torch.uint8)
    return nibble[:, 0::2] | (nibble[:, 1::2] << 4)
