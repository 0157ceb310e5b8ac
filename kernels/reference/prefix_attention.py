"""Causal attention of a prefix's new tokens: the definition."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infilld.kernels.reference._norm import work_type

LARGEST_E4M3 = 448.0


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    slot: Tensor,
    count: Tensor,
    *,
    window: int | None,
    writes: bool,
) -> Tensor:
    """[R, T, H * A] in the type of q; see `infilld.kernels.prefix_attention`.

    Raises:
        ValueError: the positions lie outside the slots.

    Source: transformers 5.23.0, models/diffusion_gemma.
    """
    rows = [
        _row(q_, k_, v_, past_keys, past_values, at, held, window=window, writes=writes)
        for q_, k_, v_, at, held in zip(q, k, v, slot.tolist(), count.tolist(), strict=True)
    ]
    return torch.stack(rows) if rows else q.flatten(2)


def _row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    at: int,
    held: int,
    *,
    window: int | None,
    writes: bool,
) -> Tensor:
    """One row's [T, H * A]."""
    work, tokens = work_type(q), len(q)
    slabs, _, capacity, _ = past_keys.shape
    end = held + tokens if writes else held
    if not (0 <= at < slabs and held >= 0 and end <= capacity):
        raise ValueError(
            f"positions [0, {end}) of slot {at}, there are {slabs} slots of {capacity} positions"
        )
    if tokens == 0:
        return q.flatten(1)
    start = 0 if window is None else max(0, held - window + 1)
    keys, values = (
        torch.cat((past[at, :, start:held].to(work), new.to(work).transpose(0, 1)), dim=1)
        for past, new in ((past_keys, k), (past_values, v))
    )
    attended = F.scaled_dot_product_attention(
        q.to(work).transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=_mask(tokens, held - start, window, q.device),
        scale=1.0,
        enable_gqa=True,
    )
    if writes:
        for past, new in ((past_keys, k), (past_values, v)):
            past[at, :, held:end] = _stored(new.transpose(0, 1), past.dtype)
    return attended[0].transpose(0, 1).flatten(1).to(q.dtype)


def _mask(tokens: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """May new token t see key j, of which `before` are older? [T, before + T] bool."""
    query = torch.arange(before, before + tokens, device=device)[:, None]
    key = torch.arange(before + tokens, device=device)[None]
    mask = key <= query
    return mask if window is None else mask & (query - key < window)


def _stored(new: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float8_e4m3fn:
        new = new.float().clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return new.to(dtype)
