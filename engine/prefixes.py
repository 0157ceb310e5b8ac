"""The encoded prefixes of the last few documents; a request takes the one that fits best."""

from collections.abc import Callable, Sequence

import torch

from infilld.engine.cache import PrefixCache
from infilld.engine.model import DiffusionGemma

_CACHES = 4
# How far typing back may go in sliding layers before the prompt is encoded anew.
_TRIM_MARGIN_TOKENS = 512
# A smaller share in common (marks, an import line) is no reason to lose another document.
_SAME_DOCUMENT = 0.25


class PrefixPool:
    """Up to four prefix caches, the least recently used first.

    Args:
        model: encodes.
    """

    def __init__(self, model: DiffusionGemma) -> None:
        self._model = model
        self._caches: list[PrefixCache] = []

    def clear(self) -> None:
        """Drop every prefix."""
        self._caches.clear()

    def encode(
        self, ids: Sequence[int], check: Callable[[], None] | None = None
    ) -> tuple[PrefixCache, int]:
        """A cache that holds exactly `ids`, and how many of them it held already.

        Args:
            ids: of the prompt, at least one.
            check: see `DiffusionGemma.encode`; what was encoded until it raises is kept.
        """
        cache = self._chosen(ids)
        self._caches = [other for other in self._caches if other is not cache] + [cache]
        cached = cache.reuse(ids)
        unread = torch.tensor(ids[cached:], dtype=torch.int64, device=self._model.device)
        try:
            self._model.encode(unread, cache, check)
        except RuntimeError:
            # Out of memory, say: nothing is known of what the cache holds now.
            self._caches.remove(cache)
            raise
        return cache, cached

    def _chosen(self, ids: Sequence[int]) -> PrefixCache:
        shared = {id(cache): cache.match(ids) for cache in self._caches}
        best = max(self._caches, key=lambda cache: shared[id(cache)], default=None)
        if best is not None and shared[id(best)] >= _SAME_DOCUMENT * len(ids):
            return best
        if len(self._caches) < _CACHES:
            return self._model.new_cache(_TRIM_MARGIN_TOKENS)
        return self._caches[0]
