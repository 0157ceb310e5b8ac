"""Tiles of a weight, by indexing whole experts on the device where it is."""

import torch
from torch import Tensor

from infilld.kernels._tiles import (
    BIAS_FACTOR,
    HIGH_NIBBLE_SCALE_FACTOR,
    ROW_SCALE_FACTOR,
    SCALE_FACTOR,
    TiledWeight,
    TileLayout,
    e5m3,
)
from infilld.kernels._weights import CODES_PER_BYTE, QuantizedWeight


def quant_pack(weight: QuantizedWeight, layout: TileLayout) -> TiledWeight:
    """The weight in tiles; see `infilld.kernels.quant_pack`. Runs on any device."""
    packer = _Packer(weight, layout)
    matrices = {
        name: part.reshape(-1, *part.shape[-2:])
        for name, part in weight.parts.items()
        if name != "factor"
    }
    # One expert at a time: unpacked nibbles take twice their bytes, and indices more.
    tiled = {
        name: torch.stack([getattr(packer, name)(matrix) for matrix in part])
        for name, part in matrices.items()
    }
    experts = len(matrices["codes"])
    return TiledWeight(
        kind=weight.kind,
        shape=weight.shape,
        group=weight.group,
        layout=layout,
        scale_dtype=weight.scales.dtype,
        factor=packer.factor(weight.factor, experts),
        **tiled,
    )


class _Packer:
    """Tiles of the parts of one [N, K] matrix."""

    def __init__(self, weight: QuantizedWeight, layout: TileLayout) -> None:
        rows, columns = weight.shape[-2:]
        device = weight.device
        self.kind, self.layout = weight.kind, layout
        self.k_tiles = layout.k_tiles(columns)
        # What fills up the last tiles repeats the first row and the last column.
        self.rows = layout.rows(rows).clamp(min=0).to(device)
        starts = torch.arange(2 * self.k_tiles)[:, None] * layout.half
        self.columns = (starts + layout.columns()).flatten().clamp(max=columns - 1).to(device)
        groups = max(1, layout.groups)
        firsts = starts + torch.arange(groups) * (layout.half // groups)
        last = columns // weight.group - 1
        self.groups = (firsts // weight.group).flatten().clamp(max=last).to(device)

    def factor(self, factor: Tensor | None, experts: int) -> Tensor:
        """Factors [E], or of the tiles' rows [E, n_tiles, block_n], of those of the weight."""
        if factor is None:
            return torch.ones(experts, device=self.rows.device)
        if factor.numel() == experts:
            return factor.reshape(experts).clone()
        of_rows = factor.reshape(experts, -1).index_select(1, self.rows)
        return of_rows.view(experts, -1, self.layout.block_n)

    def codes(self, codes: Tensor) -> Tensor:
        """int32 [n_tiles, k_tiles, words] of codes [N, K / codes in a byte]."""
        chosen = codes.view(torch.uint8).index_select(0, self.rows)
        if CODES_PER_BYTE[self.kind] == 2:
            chosen = torch.stack((chosen & 15, chosen >> 4), dim=-1).flatten(1)
        if self.kind == "int8":
            chosen = chosen ^ 128
        planes = self._tiles(chosen.index_select(1, self.columns), self.layout.half)
        if CODES_PER_BYTE[self.kind] == 2:
            planes = planes[:, :, 0] | planes[:, :, 1] << 4
        return planes.flatten(2).view(torch.int32)

    def scales(self, scales: Tensor) -> Tensor:
        """Words of scales [N, K / G]; with one scale a row float32 [n_tiles, block_n]."""
        if self.layout.groups == 0:
            unit = ROW_SCALE_FACTOR if self.kind in ("int4", "int8") else 1.0
            chosen = scales[:, 0].float().index_select(0, self.rows)
            return chosen.view(-1, self.layout.block_n) * unit
        high = HIGH_NIBBLE_SCALE_FACTOR if self.kind == "int4" else SCALE_FACTOR
        return self._words(scales, SCALE_FACTOR, high)

    def biases(self, biases: Tensor) -> Tensor:
        """Words of biases [N, K / G]."""
        return self._words(biases, BIAS_FACTOR, BIAS_FACTOR)

    def _words(self, numbers: Tensor, first: float, second: float) -> Tensor:
        bits = e5m3(numbers) if self.kind == "nvfp4" else numbers
        chosen = bits.index_select(0, self.rows).index_select(1, self.groups)
        halves = self._tiles(chosen, self.layout.groups)  # [n, k, 2, block_n, groups]
        if self.kind == "nvfp4":
            missing = 4 - self.layout.groups
            padded = torch.nn.functional.pad(halves.transpose(2, 3), (0, missing))
            return padded.contiguous().view(torch.int32).squeeze(-1)
        if numbers.dtype == torch.bfloat16:
            factors = torch.tensor((first, second), device=halves.device)
            halves = (halves.float() * factors[:, None, None]).to(torch.bfloat16)
        word = torch.int64 if numbers.dtype == torch.float32 else torch.int32
        return halves.movedim(2, -1).contiguous().view(word).squeeze(-1)

    def _tiles(self, chosen: Tensor, width: int) -> Tensor:
        """[n_tiles, k_tiles, 2, block_n, width] of [rows, columns]."""
        parts = chosen.view(-1, self.layout.block_n, self.k_tiles, 2, width)
        return parts.permute(0, 2, 3, 1, 4).contiguous()
