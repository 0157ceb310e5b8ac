"""Keys and values of an encoded prefix: match, extend, trim.

A full layer keeps every position. A sliding layer needs the last W - 1; it keeps `margin_tokens`
more, so that the prefix can be cut back by that much. Past the margin there is no local repair
(the missing keys depend on layers below at still earlier positions): the caller encodes again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infilld.engine.config import LayerKind, ModelConfig
from infilld.engine.errors import ContextTooLong

# Room for canvases behind a prefix that had to move anyway.
SPARE_TOKENS = 128


@dataclass
class _Held:
    """Keys and values [1, K, capacity, A] of one layer.

    `[0, count)` are valid; `pending` more follow them, which only a commit makes valid.
    """

    keys: Tensor
    values: Tensor
    count: int = 0
    pending: int = 0


class PrefixCache:
    """The encoded prefix of one document.

    `append` is called once per layer and piece, then `commit` once; until `commit` the prefix
    is not longer, so a piece that fails half-way leaves no trace. Tensors returned by `append`
    and `join` are valid until the next call that changes the cache.

    Args:
        config: shapes. device, dtype: of the stored tensors.
        margin_tokens: how far a trim can go back in sliding layers; None keeps everything.
        storage: keys and values [1, K, C, A] of each layer, memory that never moves; None: memory
            that grows.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        margin_tokens: int | None = None,
        storage: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        if margin_tokens is not None and margin_tokens < 0:
            raise ValueError(f"{margin_tokens=}: expected 0 or more")
        self._config, self._margin = config, margin_tokens
        self._is_fixed = storage is not None
        if storage is None:
            shapes = [
                (1, config.key_heads[kind], 0, config.head_sizes[kind])
                for kind in config.layer_kinds
            ]
            storage = [
                (
                    torch.empty(shape, device=device, dtype=dtype),
                    torch.empty(shape, device=device, dtype=dtype),
                )
                for shape in shapes
            ]
        self._held = [_Held(keys, values) for keys, values in storage]
        self._ids: list[int] = []

    @property
    def tokens(self) -> int:
        """Length of the encoded prefix; canvas positions continue here."""
        return len(self._ids)

    @property
    def ids(self) -> Sequence[int]:
        """Token ids of the encoded prefix."""
        return tuple(self._ids)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(held.keys.nbytes + held.values.nbytes for held in self._held)

    def match(self, tokens: Sequence[int]) -> int:
        """Length of the longest common prefix of `tokens` and what is encoded. Changes nothing."""
        for index, (ours, theirs) in enumerate(zip(self._ids, tokens, strict=False)):
            if ours != theirs:
                return index
        return min(len(self._ids), len(tokens))

    def can_trim(self, tokens: int) -> bool:
        """Whether the prefix can be cut to its first `tokens` positions."""
        if not 0 <= tokens <= self.tokens:
            raise ValueError(f"cannot trim {self.tokens} tokens to {tokens}")
        needed = max(0, tokens - self._sliding_needs())
        return all(
            self.tokens - held.count <= needed
            for held, kind in zip(self._held, self._config.layer_kinds, strict=True)
            if kind == "sliding"
        )

    def trim(self, tokens: int) -> int:
        """Cut the prefix to `tokens` positions, or to none where sliding layers dropped too much.

        Returns:
            How many positions remain: `tokens` or 0. The caller encodes from there.
        """
        remaining = tokens if self.can_trim(tokens) else 0
        dropped = self.tokens - remaining
        for held in self._held:
            held.count = max(0, held.count - dropped)
        del self._ids[remaining:]
        return remaining

    def reuse(self, tokens: Sequence[int]) -> int:
        """Cut back to what is shared with `tokens`; returns how many need no encoding."""
        return self.trim(self.match(tokens))

    def make_room(self, tokens: int) -> None:
        """Make every layer able to take so many positions more, before they are there.

        Raises:
            ContextTooLong: memory that does not move is full; nothing has changed.
        """
        for layer, held in enumerate(self._held):
            self._refuse_too_long(held, layer, tokens)
        for layer, held in enumerate(self._held):
            self._make_room(held, layer, tokens)

    def stored(self, kind: LayerKind) -> int:
        """Positions that layers of a kind hold; new ones follow them."""
        return next(
            held.count
            for held, own in zip(self._held, self._config.layer_kinds, strict=True)
            if own == kind
        )

    def visible(self, kind: LayerKind) -> tuple[int, int]:
        """Where the positions that a canvas sees begin among those held, and how many they are."""
        count = self.stored(kind)
        first = max(0, count - self._sliding_needs()) if kind == "sliding" else 0
        return first, count - first

    def extend(self, tokens: Tensor) -> None:
        """Count tokens [N] as part of the prefix whose keys stand behind the held ones already."""
        for held in self._held:
            held.pending = len(tokens)
        self.commit(tokens)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [1, K, N, A] of new positions.

        Returns:
            All held keys and values [1, K, held, A]; the last N are the new ones. In a sliding
            layer at least the W - 1 positions before the first new one are among them.
        """
        held, new = self._held[layer], key.shape[2]
        self._make_room(held, layer, new)
        end = held.count + new
        held.keys[:, :, held.count : end] = key
        held.values[:, :, held.count : end] = value
        held.pending = new
        return held.keys[:, :, :end], held.values[:, :, :end]

    def commit(self, tokens: Tensor) -> None:
        """Count tokens [N], whose keys every layer has appended, as part of the prefix."""
        assert all(held.pending == len(tokens) for held in self._held)
        for held in self._held:
            held.count, held.pending = held.count + held.pending, 0
        self._ids += tokens.tolist()

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`[prefix | new]` keys and values [R, K, P + N, A] without counting the new ones.

        P is everything in a full layer, the last W - 1 positions at most in a sliding one. One
        row's new positions stand behind the prefix's until something else is put there; those of
        several rows are copied together with it.
        """
        held, (rows, _, new, _) = self._held[layer], key.shape
        first = 0
        if self._config.layer_kinds[layer] == "sliding":
            first = max(0, held.count - self._sliding_needs())
        end = held.count + new
        if rows == 1 and end <= held.keys.shape[2] and not self._is_fixed:
            held.keys[:, :, held.count : end] = key
            held.values[:, :, held.count : end] = value
            return held.keys[:, :, first:end], held.values[:, :, first:end]
        past_keys = held.keys[:, :, first : held.count].expand(rows, -1, -1, -1)
        past_values = held.values[:, :, first : held.count].expand(rows, -1, -1, -1)
        return torch.cat((past_keys, key), dim=2), torch.cat((past_values, value), dim=2)

    def close(self) -> None:
        """Give its memory back; it is not used any more. Memory that grows goes with it."""

    def check(self) -> None:
        """Assert the bookkeeping's invariants; for tests."""
        needs = self._sliding_needs()
        for held, kind in zip(self._held, self._config.layer_kinds, strict=True):
            assert held.count <= held.keys.shape[2]
            if kind == "full":
                assert held.count == self.tokens
            else:
                assert min(self.tokens, needs) <= held.count <= self.tokens

    def _sliding_needs(self) -> int:
        return self._config.sliding_window - 1

    def _kept(self, held: _Held, layer: int) -> int:
        """The last positions of a layer that a trim may ask for."""
        if self._config.layer_kinds[layer] == "sliding" and self._margin is not None:
            return min(held.count, self._sliding_needs() + self._margin)
        return held.count

    def _refuse_too_long(self, held: _Held, layer: int, new: int) -> None:
        capacity = held.keys.shape[2]
        if self._is_fixed and self._kept(held, layer) + new > capacity:
            raise ContextTooLong(
                f"{self.tokens} tokens and {new} more do not fit the {capacity} that were planned",
                remedy="Load the model with a longer context, or send less text.",
            )

    def _make_room(self, held: _Held, layer: int, new: int) -> None:
        keep, capacity = self._kept(held, layer), held.keys.shape[2]
        if held.count + new <= capacity:
            return
        if self._is_fixed:
            self._refuse_too_long(held, layer, new)
            self._shift(held, keep)
            return
        # Drop what no trim may ask for before asking for more memory.
        size = capacity
        if keep + new > capacity:
            size = max(2 * capacity, keep + new + SPARE_TOKENS)
        # Both before either is replaced: running out of memory must leave the cache as it was.
        # Outside of inference mode, in which a tensor can be written to in that mode only.
        with torch.inference_mode(False):
            grown = [
                old.new_empty(*old.shape[:2], size, old.shape[3])
                for old in (held.keys, held.values)
            ]
        for old, fresh in zip((held.keys, held.values), grown, strict=True):
            fresh[:, :, :keep] = old[:, :, held.count - keep : held.count]
        held.keys, held.values = grown
        held.count = keep

    def _shift(self, held: _Held, keep: int) -> None:
        """Move the last `keep` positions to the front of memory that cannot grow."""
        for stored in (held.keys, held.values):
            # The two ranges may overlap.
            stored[:, :, :keep] = stored[:, :, held.count - keep : held.count].clone()
        held.count = keep
