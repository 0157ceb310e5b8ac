"""Blocks of a GGUF tensor to the internal form of weights in few bits.

| block | internal form | exact |
|---|---|---|
| Q4_0 | int4, groups of 32 | yes: one float16 scale a block |
| Q8_0, Q5_0, IQ4_NL | int8, groups of 32 | yes: one float16 scale a block |
| Q4_1, Q5_1 | int4, int8 with biases, groups of 32 | yes: float16 scale and bias a block |
| Q4_K, Q5_K | int4, int8 with biases, groups of 32 | codes; scales as below |
| Q6_K | int8, groups of 16 | codes; scales as below |
| IQ4_XS | int8, groups of 32 | codes; scales as below |

A block of 256 has a float16 factor and a whole number of 6 or 8 bits for each group. Their product
has up to 19 significant bits: float32 holds it exactly, float16 within 2^-11 of itself, or within
2^-25 where it is below 2^-14. Codes are never changed.

Source: ggml/src/ggml-common.h (layouts) and ggml-quants.c (what they stand for).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Codes [n, block numbers] uint8 or int8, scales and biases [n, groups] float32.
_Decoded = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Form:
    """How blocks of a type are held.

    Attributes:
        kind: of `QuantizedWeight`.
        group: G.
        has_biases: whether there are any.
        is_exact: whether float16 holds the scales exactly.
        decode: blocks [n, bytes] uint8 to one code a number, and scales and biases in float32.
    """

    kind: Literal["int4", "int8"]
    group: int
    has_biases: bool
    is_exact: bool
    decode: Callable[[Tensor], _Decoded]


def packed(codes: Tensor) -> Tensor:
    """Nibbles [..., K] as bytes [..., K / 2], the low one is the even k."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def values(form: Form, blocks: Tensor) -> Tensor:
    """The numbers [n, block numbers] float32 that blocks stand for."""
    codes, scales, biases = form.decode(blocks)
    wide = codes.float()
    if form.kind == "int4" and biases is None:
        wide -= 8
    grouped = wide.view(len(blocks), -1, form.group) * scales[..., None]
    if biases is not None:
        grouped += biases[..., None]
    return grouped.flatten(1)


def _halves(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte offset of each block, [n, 1] float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(data: Tensor, run: int) -> Tensor:
    """Nibbles [n, 2 * bytes]: of every `run` bytes first the low ones, then the high ones."""
    runs = data.reshape(len(data), -1, 1, run)
    return torch.cat((runs & 15, runs >> 4), dim=2).flatten(1)


def _bits(data: Tensor) -> Tensor:
    """Bits [n, 8 * bytes] of bytes [n, bytes], the lowest first."""
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[..., None] >> places) & 1).flatten(1)


def _q4_0(blocks: Tensor) -> _Decoded:
    return _nibbles(blocks[:, 2:], 16), _halves(blocks, 0), None


def _q4_1(blocks: Tensor) -> _Decoded:
    return _nibbles(blocks[:, 4:], 16), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Tensor) -> _Decoded:
    codes = _nibbles(blocks[:, 6:], 16) | (_bits(blocks[:, 2:6]) << 4)
    return codes.view(torch.int8) - 16, _halves(blocks, 0), None


def _q5_1(blocks: Tensor) -> _Decoded:
    codes = _nibbles(blocks[:, 8:], 16) | (_bits(blocks[:, 4:8]) << 4)
    return codes.view(torch.int8), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: Tensor) -> _Decoded:
    return blocks[:, 2:].contiguous().view(torch.int8), _halves(blocks, 0), None


def _iq4_values(data: Tensor) -> Tensor:
    """The table's numbers [n, 2 * bytes] int8 of nibbles in runs of 16 bytes."""
    table = torch.tensor(_IQ4_VALUES, dtype=torch.int8, device=data.device)
    nibbles = _nibbles(data, 16)
    return torch.index_select(table, 0, nibbles.flatten().int()).view(nibbles.shape)


def _iq4_nl(blocks: Tensor) -> _Decoded:
    return _iq4_values(blocks[:, 2:]), _halves(blocks, 0), None


def _iq4_xs(blocks: Tensor) -> _Decoded:
    # Scales of six bits: two of each in a word, four of each in nibbles.
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, 2:4, None] >> places) & 3).flatten(1)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=2).flatten(1)
    scales = (low | (high << 4)).view(torch.int8) - 32
    return _iq4_values(blocks[:, 8:]), _halves(blocks, 0) * scales, None


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and biases [n, 8] of Q4_K and Q5_K: two factors, then 8 + 8 numbers of 6 bits."""
    low, middle, high = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    scale = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=1)
    bias = torch.cat((middle & 63, (high >> 4) | ((middle >> 6) << 4)), dim=1)
    return _halves(blocks, 0) * scale, -_halves(blocks, 2) * bias


def _q4_k(blocks: Tensor) -> _Decoded:
    return _nibbles(blocks[:, 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: Tensor) -> _Decoded:
    # Byte l of the fifth bits has those of the numbers l, l + 32, l + 64, ...
    places = torch.arange(8, dtype=torch.uint8, device=blocks.device)[:, None]
    fifth = (blocks[:, None, 16:48] >> places) & 1
    codes = _nibbles(blocks[:, 48:], 32) | (fifth.flatten(1) << 4)
    return codes.view(torch.int8), *_k_scales(blocks)


def _q6_k(blocks: Tensor) -> _Decoded:
    # In each half 64 bytes of low nibbles, for numbers l and l + 64, and 32 of two bits each for
    # l, l + 32, l + 64, l + 96.
    low = _nibbles(blocks[:, :128], 64)
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> places) & 3
    codes = (low | (high.flatten(1) << 4)).view(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return codes, _halves(blocks, 208) * scales, None


FORMS: dict[str, Form] = {
    "Q4_0": Form("int4", 32, False, True, _q4_0),
    "Q4_1": Form("int4", 32, True, True, _q4_1),
    "Q5_0": Form("int8", 32, False, True, _q5_0),
    "Q5_1": Form("int8", 32, True, True, _q5_1),
    "Q8_0": Form("int8", 32, False, True, _q8_0),
    "IQ4_NL": Form("int8", 32, False, True, _iq4_nl),
    "IQ4_XS": Form("int8", 32, False, False, _iq4_xs),
    "Q4_K": Form("int4", 32, True, False, _q4_k),
    "Q5_K": Form("int8", 32, True, False, _q5_k),
    "Q6_K": Form("int8", 16, False, False, _q6_k),
}
