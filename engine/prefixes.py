"""The encoded prefixes of the last few documents; a request takes the one that fits best."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infilld.engine.cache import PrefixCache
from infilld.engine.model import ENCODE_CHUNK_TOKENS
from infilld.engine.passes import CanvasModel, Work

# How far typing back may go in sliding layers before the prompt is encoded anew.
_TRIM_MARGIN_TOKENS = 512
# A smaller share in common (marks, an import line) is no reason to lose another document.
_SAME_DOCUMENT = 0.25
# On a CPU so many take about as long as a pass over a canvas; others get their turn in between.
_CPU_PIECE_TOKENS = 128


@dataclass(eq=False)
class Prefix:
    """An encoded prompt.

    Attributes:
        cache: its keys and values. last_hidden: hidden state [D] of its last token.
    """

    cache: PrefixCache
    last_hidden: Tensor


class PrefixPool:
    """Prefix caches of the last documents, the least recently used first.

    Args:
        model: encodes.
    """

    def __init__(self, model: CanvasModel) -> None:
        self._model = model
        self._caches: list[PrefixCache] = []
        self._used: list[PrefixCache] = []
        self._queue: list[object] = []
        is_cpu = model.device.type == "cpu"
        self._piece_tokens = _CPU_PIECE_TOKENS if is_cpu else ENCODE_CHUNK_TOKENS

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for a cache that others use."""
        return bool(self._queue)

    def clear(self) -> None:
        """Drop every prefix that is not in use."""
        self._caches.clear()

    def encoding(
        self, ids: Sequence[int], check: Callable[[], None] = lambda: None
    ) -> Work[tuple[Prefix, int]]:
        """A prefix of exactly `ids`, and how many of them were encoded already.

        It belongs to the caller until `give_back`, or until this work is ended early.

        Args:
            ids: of the prompt, at least one.
            check: called before every piece of a long prompt; what it raises ends the encoding,
                and what was encoded until then is kept.
        """
        cache = yield from self._taken(ids, check)
        self._caches = [other for other in self._caches if other is not cache]
        self._used.append(cache)
        try:
            cached = cache.match(ids)
            # The last token's hidden state predicts what follows: it is always read anew.
            kept = cache.trim(min(cached, len(ids) - 1))
            # Stays on the host, which keeps the ids: asking a GPU for them would be waiting.
            unread = torch.tensor(ids[kept:], dtype=torch.int64)
            for piece in torch.split(unread, self._piece_tokens):
                check()
                hidden = self._model.encode(piece, cache)
                yield []
        except RuntimeError:
            # Out of memory, say: nothing is known of what the cache holds now.
            self._used.remove(cache)
            cache.close()
            raise
        except BaseException:
            self._give_back(cache)
            raise
        return Prefix(cache, hidden[-1]), cached if kept else 0

    def give_back(self, prefix: Prefix) -> None:
        """Let others have it."""
        self._give_back(prefix.cache)

    def _give_back(self, cache: PrefixCache) -> None:
        if cache in self._used:
            self._used.remove(cache)
            self._caches.append(cache)

    def _taken(self, ids: Sequence[int], check: Callable[[], None]) -> Work[PrefixCache]:
        """A cache, in the order of asking; whoever holds one waits for no second one."""
        place, cache = object(), None
        self._queue.append(place)
        try:
            while cache is None:
                if self._queue[0] is place:
                    cache = self._chosen(ids)
                if cache is None:
                    check()
                    yield []
        finally:
            self._queue.remove(place)
        return cache

    def _chosen(self, ids: Sequence[int]) -> PrefixCache | None:
        """The cache that fits best, or has room; None: all that there may be are in use."""
        shared = {id(cache): cache.match(ids) for cache in self._caches}
        best = max(self._caches, key=lambda cache: shared[id(cache)], default=None)
        if best is not None and shared[id(best)] >= _SAME_DOCUMENT * len(ids):
            return best
        if len(self._caches) + len(self._used) < self._model.most_prefixes:
            return self._model.new_cache(_TRIM_MARGIN_TOKENS)
        return self._caches[0] if self._caches else None
