"""Keys and values of a few prefixes in memory that never moves, so that a graph can be replayed."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.config import LayerKind, ModelConfig
from infilld.engine.errors import NotEnoughMemory
from infilld.engine.model import ENCODE_CHUNK_TOKENS


class SlabCache(PrefixCache):
    """A prefix cache in one slot of a slab.

    Attributes:
        slot: its number; it goes back to the free ones when the cache is closed or forgotten.
    """

    def __init__(
        self,
        config: ModelConfig,
        slot: int,
        storage: Sequence[tuple[Tensor, Tensor]],
        margin_tokens: int,
        free: list[int],
    ) -> None:
        keys = storage[0][0]
        super().__init__(
            config, keys.device, keys.dtype, margin_tokens=margin_tokens, storage=storage
        )
        self.slot = slot
        self._release = weakref.finalize(self, free.append, slot)

    def close(self) -> None:
        """Free the slot at once, though somebody may still refer to it: an exception, say."""
        self._release()


class CacheSlab:
    """Room for `slots` prefixes of up to `context_tokens` each.

    A full layer has room for the whole context; a sliding one for its window, what a trim may go
    back, and one piece of a prompt.

    Args:
        config: shapes. device, dtype: of the keys and values.
        slots: S. context_tokens: of the longest prefix. margin_tokens: as of `PrefixCache`.

    Attributes:
        keys, values: [S, K, C, A] for each layer. slots: as given.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        slots: int,
        context_tokens: int,
        margin_tokens: int,
    ) -> None:
        self._config, self._margin = config, margin_tokens
        kept = config.sliding_window - 1 + margin_tokens
        room: dict[LayerKind, int] = {
            "full": context_tokens,
            "sliding": min(context_tokens, kept + ENCODE_CHUNK_TOKENS),
        }
        shapes = [
            (slots, config.key_heads[kind], room[kind], config.head_sizes[kind])
            for kind in config.layer_kinds
        ]
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for shape in shapes]
        self.slots = slots
        self._free = list(range(slots))

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(each.nbytes for each in (*self.keys, *self.values))

    def lease(self) -> SlabCache:
        """An empty cache; its slot is free again when nobody refers to it any more.

        Raises:
            NotEnoughMemory: all slots are in use.
        """
        if not self._free:
            raise NotEnoughMemory(f"all {len(self.keys[0])} prefix caches are in use")
        slot = self._free.pop()
        storage = [
            (keys[slot : slot + 1], values[slot : slot + 1])
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        return SlabCache(self._config, slot, storage, self._margin, self._free)
