"""A token n-gram model of one document, with back-off: what can be had without any training."""

from collections import Counter, defaultdict
from collections.abc import Sequence


class NGram:
    """Predicts the next token of a document from the document itself.

    Args:
        parts: tokens of the document's parts, the farthest first; no n-gram spans two of them.
        order: longest n-gram, the predicted token included; 2 or more.
    """

    def __init__(self, parts: Sequence[Sequence[int]], order: int = 8) -> None:
        self._context_tokens = order - 1
        self._tokens: list[int | None] = []
        for part in parts:
            self._tokens += [None, *part]
        following = range(1, len(self._tokens))
        # Places of each token that another one follows.
        self._places: dict[int, list[int]] = defaultdict(list)
        for place in following:
            token = self._tokens[place - 1]
            if token is not None and self._tokens[place] is not None:
                self._places[token].append(place - 1)
        self._commonest = self._favourite([place - 1 for place in following])

    def next_token(self, context: Sequence[int]) -> int | None:
        """The most frequent token behind the longest end of the context that occurs.

        Of equally frequent ones it is the one that occurred last. None: the document is empty.
        """
        places = self._places.get(context[-1], []) if context else []
        for back in range(1, min(len(context), self._context_tokens)):
            wanted = context[-1 - back]
            longer = [p for p in places if p >= back and self._tokens[p - back] == wanted]
            if not longer:
                break
            places = longer
        return self._favourite(places) if places else self._commonest

    def _favourite(self, places: Sequence[int]) -> int | None:
        """The most frequent token behind some places; the first counted wins a tie."""
        following = (self._tokens[place + 1] for place in reversed(places))
        counts = Counter(token for token in following if token is not None)
        return max(counts, key=counts.__getitem__, default=None)
