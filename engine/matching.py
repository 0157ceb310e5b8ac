"""A text under a grammar, token by token: what may follow, what must, and how it ends soonest."""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from infilld.engine.errors import BadGrammar
from infilld.engine.grammar import Constraint, vocabulary_of
from infilld.engine.request import Grammar
from infilld.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_QUOTE, _ESCAPE = ord('"'), ord("\\")


class GrammarTokens:
    """A vocabulary as grammars see it; made once for a model.

    Args:
        tokenizer: vocabulary. vocab_tokens: V of the model.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_tokens: int) -> None:
        self._tokenizer, self.vocab_tokens = tokenizer, vocab_tokens

    @cached_property
    def spelled(self) -> list[bytes]:
        """Bytes of every token; none of those that stand for no text."""
        count = self._tokenizer.vocab_tokens
        return [self._tokenizer.decode([token]) for token in range(count)]

    def start(self, grammar: Grammar) -> "Matching":
        """A text that has not begun.

        Raises:
            BadGrammar: see `refuse_bad`.
        """
        return Matching(self, Constraint(grammar, self._wrapped).matcher())

    @cached_property
    def says_something(self) -> NDArray[np.bool_]:
        """Tokens [V] that stand for text."""
        found = np.zeros(self.vocab_tokens, dtype=np.bool_)
        found[: len(self.spelled)] = [bool(each) for each in self.spelled]
        return found

    @cached_property
    def closers(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens by which a text ends soonest: outside of a string, and within one."""
        # A comma leads to what is still required, where no bracket may follow.
        brackets = self._of(b"}])", b"}])") + self._of(b",", b" ")
        quotes = self._of(b'"', b'"}])')
        values = self._of(b"0", b"") + self._of(b"1", b"")
        return (
            np.array(brackets + values + quotes, dtype=np.int64),
            np.array(quotes, dtype=np.int64),
        )

    @cached_property
    def by_length(self) -> NDArray[np.int64]:
        """All tokens that stand for text, letters and digits first, then the shorter ones."""
        ids = np.flatnonzero(self.says_something).tolist()
        ids.sort(key=lambda token: (not self.spelled[token].isalnum(), len(self.spelled[token])))
        return np.array(ids, dtype=np.int64)

    def _of(self, first: bytes, rest: bytes) -> list[int]:
        """Tokens of one byte of `first` and any of `rest`, the longest first."""
        wanted = set(rest)
        found = [
            token
            for token, each in enumerate(self.spelled)
            if each[:1] and each[0] in first and set(each[1:]) <= wanted
        ]
        return sorted(found, key=lambda token: -len(self.spelled[token]))

    @cached_property
    def _wrapped(self) -> "LLTokenizer":
        return vocabulary_of(self._tokenizer, self.spelled)


class Matching:
    """A text as far as it is written.

    Args:
        tokens: it is written in. matcher: at its end.
    """

    def __init__(self, tokens: GrammarTokens, matcher: "LLMatcher", quoted: int = 0) -> None:
        self._tokens, self._matcher = tokens, matcher
        # 0: outside of a string, 1: within, 2: behind a backslash in it.
        self._quoted = quoted

    def copy(self) -> "Matching":
        """Another that can go on in another way."""
        return Matching(self._tokens, self._matcher.deep_copy(), self._quoted)

    @property
    def can_end(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    @property
    def must_end(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()

    def accept(self, token: int) -> bool:
        """Write a token, if it may stand here."""
        spelled = self._tokens.spelled
        if token >= len(spelled) or not spelled[token]:
            return False
        if self._matcher.try_consume_tokens([token]) != 1:
            self._refuse_broken()
            return False
        self._read(spelled[token])
        return True

    def forced(self) -> list[int]:
        """Tokens that must follow."""
        return [] if self.must_end else self._matcher.compute_ff_tokens()

    def allowed(self) -> NDArray[np.bool_]:
        """Tokens [V] that may follow.

        Raises:
            BadGrammar: to tell would take too long.
        """
        found = np.zeros(self._tokens.vocab_tokens, dtype=np.bool_)
        if self.must_end:
            return found
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._refuse_broken()
        count = len(self._tokens.spelled)
        found[:count] = np.unpackbits(bits, count=count, bitorder="little")
        return found & self._tokens.says_something

    def closing(self, most_tokens: int) -> list[int] | None:
        """Tokens that end the text soon, at most so many; None: none were found.

        Closing marks are tried first, then the shortest tokens, each time others, so that what may
        be repeated for ever ends some time.
        """
        text = self.copy()
        written: list[int] = []
        while not text.can_end:
            steps = text.forced() or text._nearest(len(written))
            if not steps or len(written) + len(steps) > most_tokens:
                return None
            if not all(map(text.accept, steps)):
                return None
            written += steps
        return written

    def ends_with(self, tokens: Sequence[int]) -> bool:
        """Whether the text is whole behind these tokens."""
        matcher = self._matcher.deep_copy()
        is_allowed = matcher.try_consume_tokens(list(tokens)) == len(tokens)
        return is_allowed and matcher.is_accepting()

    def _nearest(self, turn: int) -> list[int]:
        """The token that is likely to be nearest to the end."""
        allowed = self.allowed()
        closers = self._tokens.closers[bool(self._quoted)]
        ids = closers[allowed[closers]]
        if len(ids):
            return [int(ids[0])]
        ids = self._tokens.by_length[allowed[self._tokens.by_length]]
        return [int(ids[turn % len(ids)])] if len(ids) else []

    def _read(self, spelled: bytes) -> None:
        """Note whether the text ends within a string of JSON."""
        for byte in spelled:
            if self._quoted == 0:
                self._quoted = int(byte == _QUOTE)
            elif self._quoted == 2:
                self._quoted = 1
            elif byte in (_QUOTE, _ESCAPE):
                self._quoted = 0 if byte == _QUOTE else 2

    def _refuse_broken(self) -> None:
        if self._matcher.is_error():
            raise BadGrammar(f"the grammar is too complex: {self._matcher.get_error()[:200]}")


def best_allowed(
    text: Matching, tokens: Sequence[int], probabilities: Sequence[float], least: float
) -> int | None:
    """The most probable of some tokens that may follow; None: none that is at least so probable."""
    for token, probability in sorted(zip(tokens, probabilities, strict=True), key=lambda p: -p[1]):
        if probability < least:
            return None
        if text.copy().accept(token):
            return token
    return None
