"""Tiles of a weight, number by number: the definition."""

from itertools import product

import torch
from torch import Tensor

from infilld.kernels._tiles import (
    BIAS_FACTOR,
    BYTE_ORDER,
    GATED_BLOCK,
    HIGH_NIBBLE_SCALE_FACTOR,
    ROW_SCALE_FACTOR,
    SCALE_FACTOR,
    TiledWeight,
    TileLayout,
    e5m3,
)
from infilld.kernels._weights import QuantizedWeight


def quant_pack(weight: QuantizedWeight, layout: TileLayout) -> TiledWeight:
    """The weight in tiles; see `infilld.kernels.quant_pack`. Loops: for small weights."""
    parts = {
        name: part.reshape(-1, *part.shape[-2:])
        for name, part in weight.parts.items()
        if name != "factor"
    }
    pack = {"codes": _codes, "scales": _scales, "biases": _biases}
    tiled = {
        name: torch.stack([pack[name](weight, layout, matrix) for matrix in part])
        for name, part in parts.items()
    }
    return TiledWeight(
        kind=weight.kind,
        shape=weight.shape,
        group=weight.group,
        layout=layout,
        scale_dtype=weight.scales.dtype,
        factor=_factor(weight, layout, len(parts["codes"])),
        **tiled,
    )


def _factor(weight: QuantizedWeight, layout: TileLayout, experts: int) -> Tensor:
    if weight.factor is None:
        return torch.ones(experts)
    if weight.row_factor is None:
        return weight.factor.reshape(-1).clone()
    rows = weight.shape[-2]
    places = product(range(layout.n_tiles(rows)), range(layout.block_n))
    order = [_row(layout, rows, i_n, lane) for i_n, lane in places]
    return weight.factor.reshape(experts, rows)[:, order].view(experts, -1, layout.block_n)


def _codes(weight: QuantizedWeight, layout: TileLayout, codes: Tensor) -> Tensor:
    columns = weight.shape[-1]
    raw = codes.view(torch.uint8).tolist()

    def code(row: int, column: int) -> int:
        """The code as it is stored."""
        if weight.kind in ("int4", "nvfp4"):
            return int(raw[row][column // 2]) >> 4 * (column % 2) & 15
        return int(raw[row][column]) ^ (128 if weight.kind == "int8" else 0)

    tiles = []
    for i_n, i_k in product(range(layout.n_tiles(len(raw))), range(layout.k_tiles(columns))):
        planes = [
            [
                code(
                    _row(layout, len(raw), i_n, lane),
                    min((2 * i_k + side) * layout.half + _column(layout, byte), columns - 1),
                )
                for lane in range(layout.block_n)
                for byte in range(layout.half)
            ]
            for side in (0, 1)
        ]
        if weight.kind in ("int4", "nvfp4"):
            tiles.append([low | high << 4 for low, high in zip(*planes, strict=True)])
        else:
            tiles.append(planes[0] + planes[1])
    shape = (layout.n_tiles(len(raw)), layout.k_tiles(columns), -1)
    return torch.tensor(tiles, dtype=torch.uint8).view(torch.int32).reshape(shape)


def _scales(weight: QuantizedWeight, layout: TileLayout, scales: Tensor) -> Tensor:
    if layout.groups == 0:
        unit = ROW_SCALE_FACTOR if weight.kind in ("int4", "int8") else 1.0
        places = product(range(layout.n_tiles(len(scales))), range(layout.block_n))
        rows = [_row(layout, len(scales), i_n, lane) for i_n, lane in places]
        return scales.float()[rows, 0].reshape(-1, layout.block_n) * unit
    high = HIGH_NIBBLE_SCALE_FACTOR if weight.kind == "int4" else SCALE_FACTOR
    return _words(weight, layout, scales, (SCALE_FACTOR, high))


def _biases(weight: QuantizedWeight, layout: TileLayout, biases: Tensor) -> Tensor:
    return _words(weight, layout, biases, (BIAS_FACTOR, BIAS_FACTOR))


def _words(
    weight: QuantizedWeight, layout: TileLayout, numbers: Tensor, factors: tuple[float, float]
) -> Tensor:
    rows, columns = weight.shape[-2:]
    n_tiles, k_tiles = layout.n_tiles(rows), layout.k_tiles(columns)
    lanes, groups = layout.block_n, layout.groups
    is_e4m3 = weight.kind == "nvfp4"
    # A word holds one group of both halves, or one half's groups, as bytes.
    shape = (n_tiles, k_tiles, lanes, 2, 4) if is_e4m3 else (n_tiles, k_tiles, lanes, groups, 2)
    words = torch.zeros(shape, dtype=torch.uint8 if is_e4m3 else numbers.dtype)
    source = e5m3(numbers) if is_e4m3 else numbers
    places = product(range(n_tiles), range(k_tiles), range(lanes), range(groups), (0, 1))
    for i_n, i_k, lane, i_group, side in places:
        column = (2 * i_k + side) * layout.half + i_group * (layout.half // groups)
        number = source[_row(layout, rows, i_n, lane), min(column, columns - 1) // weight.group]
        if is_e4m3:
            words[i_n, i_k, lane, side, i_group] = number
        else:
            factor = factors[side] if numbers.dtype == torch.bfloat16 else 1.0
            words[i_n, i_k, lane, i_group, side] = number.float() * factor
    return words.view(torch.int64 if numbers.dtype == torch.float32 else torch.int32)[..., 0]


def _row(layout: TileLayout, rows: int, i_n: int, lane: int) -> int:
    """Row of the weight that a tile's row holds; where there is none, the first."""
    if not layout.gated:
        row = i_n * layout.block_n + lane
        return row if row < rows else 0
    block, place = divmod(lane, 2 * GATED_BLOCK)
    row = i_n * layout.block_n // 2 + block * GATED_BLOCK + place % GATED_BLOCK
    if row >= rows // 2:
        return 0
    return row if place < GATED_BLOCK else rows // 2 + row


def _column(layout: TileLayout, byte: int) -> int:
    """Column within a half that a byte of a row holds."""
    word, code = byte // 4, BYTE_ORDER[byte % 4]
    if not layout.permuted:
        return 4 * word + code
    lane, step = divmod(word, layout.half // 16)
    return 16 * step + 8 * (code // 2) + 2 * lane + code % 2
