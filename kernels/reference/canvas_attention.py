"""Attention of canvases over stored prefixes and over themselves: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.kernels.reference._norm import work_type


def canvas_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    slots: Tensor,
    first: Tensor,
    count: Tensor,
    lengths: Tensor,
) -> Tensor:
    """[R, L, H * A] in the type of q; see `infilld.kernels.canvas_attention`.

    Rows that read the same range and are equally long are one product.

    Raises:
        ValueError: a range lies outside the slots, or a length outside the canvas.

    Source: transformers 5.23.0, models/diffusion_gemma.
    """
    work = work_type(q)
    alike: dict[tuple[int, ...], list[int]] = {}
    ranges = torch.stack((slots, first, count, lengths), dim=1).tolist()
    for row, each in enumerate(ranges):
        alike.setdefault(tuple(each), []).append(row)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for (slot, start, held, length), rows in alike.items():
        _check(slot, start, held, length, past_keys, q.shape[1])
        if length == 0:
            continue
        # Rows that follow each other are a view, and so is the usual case of all rows.
        at: slice | list[int] = rows
        if rows[-1] - rows[0] == len(rows) - 1:
            at = slice(rows[0], rows[-1] + 1)
        queries, keys, values = (
            tensor[at, :length].to(work).transpose(1, 2) for tensor in (q, k, v)
        )
        if held:
            kept = [
                past[slot, :, start : start + held].to(work).expand(len(rows), -1, -1, -1)
                for past in (past_keys, past_values)
            ]
            keys, values = torch.cat((kept[0], keys), dim=2), torch.cat((kept[1], values), dim=2)
        attended = F.scaled_dot_product_attention(queries, keys, values, scale=1.0, enable_gqa=True)
        out[at, :length] = attended.transpose(1, 2).to(q.dtype)
    return out.flatten(2)


def _check(slot: int, start: int, held: int, length: int, past: Tensor, tokens: int) -> None:
    slabs, _, capacity, _ = past.shape
    if not 0 <= length <= tokens:
        raise ValueError(f"a canvas of {length} positions, expected 0 to {tokens}")
    if held and not (0 <= slot < slabs and start >= 0 and 0 < held <= capacity - start):
        raise ValueError(
            f"positions [{start}, {start + held}) of slot {slot}, "
            f"there are {slabs} slots of {capacity} positions"
        )
