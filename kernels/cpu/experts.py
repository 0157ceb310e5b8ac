"""The routed experts of a layer, for a CPU: one batched product for all of them.

A product for each expert costs more in calls than in numbers while canvases are short, and each
wakes the other cores once. So the rows of every expert are padded to those of the busiest one.
Where that is too much, rows sorted by expert are multiplied group by group. The few experts of a
small model are all asked by every token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.kernels.cpu.gated import gated
from infilld.kernels.cpu.packed import PackedWeight, fastest, fits_half

# Up to this many multiplications in vain, asking all experts takes less time than sorting does.
MOST_IN_VAIN = 6_000_000
# A short canvas asks most experts anyway, for a row or two each. One product with all of them in
# half precision then reads half the bytes: a pass over 16 tokens and 16 experts is a fifth shorter.
MOST_PACKED_EXPERTS = 32
MOST_PACKED_ROWS = 512
# Padding is cheaper than groups up to twice the rows, and this many more for each expert.
SPARE_ROWS = 8


class ExpertWeights:
    """Gates, ups and downs of a layer's experts.

    Args:
        gate_up: [E, 2 F, D], gates first. down: [E, D, F].

    Attributes:
        count: E. nbytes: of the weights.
    """

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.count = len(gate_up)
        self._gate_up = gate_up.transpose(1, 2).contiguous()  # [E, D, 2 F]
        self._down = down.transpose(1, 2).contiguous()  # [E, F, D]
        self.nbytes = self._gate_up.nbytes + self._down.nbytes
        self._packed: tuple[PackedWeight, PackedWeight] | None = None
        if self.count <= MOST_PACKED_EXPERTS and _is_packed_in_half(gate_up, down):
            side_by_side = down.transpose(0, 1).flatten(1)  # [D, E * F]
            self._packed = (PackedWeight(gate_up.flatten(0, 1)), PackedWeight(side_by_side))
            self.nbytes += sum(each.nbytes for each in self._packed)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sums over each token's experts [T, D].

        Args:
            x: [T, D]. ids: [T, k] int64. weights: [T, k] float32.
        """
        (count, width, both), chosen = self._gate_up.shape, ids.shape[1]
        if (count - chosen) * len(x) * width * both * 3 // 2 <= MOST_IN_VAIN:
            return self._all(x, ids, weights)
        if self._packed is not None and count * len(x) <= MOST_PACKED_ROWS:
            return self._all_packed(x, ids, weights, *self._packed)
        counts = torch.bincount(ids.flatten(), minlength=self.count)
        most = int(counts.max())
        if self.count * most <= 2 * ids.numel() + SPARE_ROWS * self.count:
            return self._padded(x, ids, weights, counts, most)
        return self._grouped(x, ids, weights, counts)

    def _all(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        share = self._shares(x, ids, weights)
        hidden = gated(torch.matmul(x, self._gate_up)).mul_(share.T[:, :, None])
        return torch.matmul(hidden, self._down).sum(0)

    def _all_packed(
        self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: PackedWeight, down: PackedWeight
    ) -> Tensor:
        share = self._shares(x, ids, weights)
        hidden = gated(gate_up(x).view(len(x), self.count, -1)).mul_(share[:, :, None])
        return down(hidden.flatten(1))

    def _shares(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """What each token takes of each expert, [T, E]."""
        return x.new_zeros(len(x), self.count).scatter_(1, ids, weights.to(x.dtype))

    def _padded(self, x: Tensor, ids: Tensor, weights: Tensor, counts: Tensor, most: int) -> Tensor:
        order, token, expert = _sorted(ids)
        before = (counts.cumsum(0) - counts).index_select(0, expert)
        place = expert * most + _range(len(order)) - before
        # Padding repeats the first token's row; nobody reads what becomes of it.
        rows = torch.zeros(self.count * most, dtype=torch.int64).scatter_(0, place, token)
        padded = x.index_select(0, rows).view(self.count, most, -1)
        out = torch.bmm(gated(torch.bmm(padded, self._gate_up)), self._down)
        return _summed(
            out.flatten(0, 1), torch.empty_like(place).scatter_(0, order, place), weights
        )

    def _grouped(self, x: Tensor, ids: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        order, token, _ = _sorted(ids)
        ends = counts.cumsum(0).to(torch.int32)
        hidden = gated(_grouped_product(x.index_select(0, token), self._gate_up, offs=ends))
        out = _grouped_product(hidden, self._down, offs=ends)
        place = torch.empty_like(order).scatter_(0, order, _range(len(order)))
        return _summed(out, place, weights)


def _is_packed_in_half(*weights: Tensor) -> bool:
    ranked = fastest(weights[0].dtype)
    return ranked[0] == "half" and all(fits_half(weight) for weight in weights)


# torch 2.9 has it under its older name only.
_grouped_product = getattr(F, "grouped_mm", None) or torch._grouped_mm


def _sorted(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Routes by expert, and the token and the expert of each, [T * k] int64."""
    expert, order = ids.flatten().sort(stable=True)
    return order, order // ids.shape[1], expert


def _range(count: int) -> Tensor:
    return torch.arange(count)


def _summed(rows: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """[T, D]: for each token its rows, times the weights [T, k]; place [T * k] of each route."""
    return F.embedding_bag(
        place.view(weights.shape), rows, per_sample_weights=weights.to(rows.dtype), mode="sum"
    )
