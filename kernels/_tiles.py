"""Weights in few bits as a GPU's matmuls read them: tile by tile, in the order of its lanes.

A tile is `block_n` rows by `2 * half` columns, stored in one piece. All that its two halves share
is read at once: a byte holds a nibble of the first half and one of the second, a word the scales
of both.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from infilld.kernels._launch import triton_version
from infilld.kernels._weights import InParts, Kind, QuantizedWeight

# Which of a word's four codes each byte holds: a mask takes bytes 0 and 2 as one pair.
BYTE_ORDER = (0, 2, 1, 3)
# Rows that one lane of a tensor core's result holds stand so far apart.
GATED_BLOCK = 8
MOST_BLOCK_N = 128
MOST_HALF = 64
# A tensor core's smallest step along K.
LEAST_HALF = 16
# Tiles of codes whose scales are bfloat16 are computed with as integers times 2^-133, those of the
# second half of a nibble's tile times 2^-129; a scale brings back all of it but 2^-13.
SCALE_FACTOR = 2.0**120
HIGH_NIBBLE_SCALE_FACTOR = 2.0**116
BIAS_FACTOR = 2.0**-13
LARGEST_BF16_SCALE = 256.0
# E4M3 scales are stored with five bits of exponent, so that a sum makes a bfloat16 of them; 0 is
# stored as 0, whose sum is next to nothing.
E5M3_EXPONENT = 22
# Integers with one scale a row are decoded as code / 64.
ROW_SCALE_FACTOR = 64.0


@dataclass(frozen=True, kw_only=True)
class TileLayout:
    """Where the parts of a tile stand.

    Attributes:
        block_n: rows of a tile, a power of two.
        half: columns of half a tile, a power of two.
        groups: scales of a row in half a tile; 0: one scale a row, not stored with the tiles.
        permuted: words stand by (lane, step) and the codes in them by (half, pair), which is what a
            lane of a warp group multiplies, and others with some versions of Triton; else columns
            follow one another.
        gated: rows are gates, then as many ups; a tile takes eight of each in turn.
    """

    block_n: int
    half: int
    groups: int
    permuted: bool
    gated: bool

    def rows(self, count: int) -> Tensor:
        """Row of the weight at each row of all tiles, [n_tiles * block_n] int64; -1: none."""
        if not self.gated:
            rows = torch.arange(_rounded_up(count, self.block_n))
            return torch.where(rows < count, rows, -1)
        hidden = count // 2
        lane = torch.arange(2 * _rounded_up(hidden, self.block_n // 2))
        pair, place = lane // (2 * GATED_BLOCK), lane % (2 * GATED_BLOCK)
        row = pair * GATED_BLOCK + place % GATED_BLOCK
        return torch.where(row < hidden, row + hidden * (place // GATED_BLOCK), -1)

    def columns(self) -> Tensor:
        """Column within a half of the code in each byte (of each nibble's plane), [half] int64."""
        word = torch.arange(self.half // 4)[:, None]
        code = torch.tensor(BYTE_ORDER)[None, :]
        if not self.permuted:
            return (4 * word + code).flatten()
        steps = self.half // 16
        return (word % steps * 16 + code // 2 * 8 + word // steps * 2 + code % 2).flatten()

    def n_tiles(self, rows: int) -> int:
        """Tiles along N."""
        return -(-rows // self.block_n)

    def k_tiles(self, columns: int) -> int:
        """Tiles along K."""
        return -(-columns // (2 * self.half))


def tile_layout(weight: QuantizedWeight, *, capability: int, gated: bool) -> TileLayout:
    """The layout that a GPU of this compute capability (80, 90, ...) reads fastest.

    Raises:
        ValueError: the weight's groups or rows do not fit any.
    """
    rows, columns = weight.shape[-2:]
    if gated and rows % 2:
        raise ValueError(f"{rows} rows are not gates and as many ups")
    half = min(MOST_HALF, max(LEAST_HALF, _power_of_two(-(-columns // 2))))
    if weight.group == columns:
        groups = 1 if weight.biases is not None else 0
    elif weight.group < half and half % weight.group == 0 and weight.group >= LEAST_HALF:
        groups = half // weight.group
    else:
        half, groups = math.gcd(half, weight.group), 1
    if half < LEAST_HALF:
        raise ValueError(
            f"groups of {weight.group}: expected a multiple of {LEAST_HALF}, or {columns}"
        )
    return TileLayout(
        block_n=min(MOST_BLOCK_N, max(LEAST_HALF, _power_of_two(rows))),
        half=half,
        groups=groups,
        permuted=_is_permuted(weight.kind, capability),
        gated=gated,
    )


def _is_permuted(kind: Kind, capability: int) -> bool:
    """Whether a lane multiplies codes in the order of a warp group's instruction.

    That instruction takes its first operand from registers in one fixed order. Elsewhere Triton
    chooses the order: up to 3.7 four columns follow one another in a lane, from 3.8 on two, but
    for nvfp4. In the other order all weights would pass through shared memory.
    """
    if 90 <= capability < 100:
        return True
    return kind != "nvfp4" and triton_version() >= (3, 8)


@dataclass(frozen=True, eq=False, kw_only=True)
class TiledWeight(InParts):
    """A weight [..., N, K] in tiles. `quant_pack` makes it.

    Attributes:
        kind: as in `QuantizedWeight`.
        shape: of the weight that it stands for.
        group: G.
        layout: of the tiles.
        codes: int32 [E, n_tiles, k_tiles, words]; E is 1 where there are no experts.
        scales: words int32 [E, n_tiles, k_tiles, block_n, groups] of two 16-bit scales, or int64 of
            two float32, the first half's low; nvfp4: int32 [..., block_n, 2], bytes of one half
            each (`e5m3`); one scale a row: float32 [E, n_tiles, block_n].
        scale_dtype: what the words hold.
        biases: like the scales, or None.
        factor: float32 [E], or [E, n_tiles, block_n] where each row has its own.
    """

    kind: Kind
    shape: tuple[int, ...]
    group: int
    layout: TileLayout
    codes: Tensor
    scales: Tensor
    scale_dtype: torch.dtype
    factor: Tensor
    biases: Tensor | None = None


def e5m3(scales: Tensor) -> Tensor:
    """Bytes of E4M3 numbers that are not negative, as scales of nvfp4 are stored."""
    bits = scales.float().view(torch.int32) >> 20
    return torch.where(bits == 0, 0, bits - (127 - E5M3_EXPONENT) * 8).to(torch.uint8)


def _rounded_up(count: int, step: int) -> int:
    return -(-count // step) * step


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, count - 1).bit_length()
