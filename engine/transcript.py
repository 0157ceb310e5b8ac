"""What a model has written, token by token, as an answer and the thoughts before it."""

import copy
from collections.abc import Sequence

from infilld.engine.conversation import Finish
from infilld.engine.tokenizer import Tokenizer
from infilld.engine.turns import TurnPrompt


class Transcript:
    """An answer while it is written; tokens are only ever added, so texts only grow.

    Args:
        tokenizer: vocabulary. prompt: what is answered. stop: texts before which it ends.
        max_tokens: most of the answer, thoughts apart; None: no bound.

    Attributes:
        finish: why it ended; None: it goes on. tokens: of the answer so far, thoughts apart.
        thought_tokens: of the thoughts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: TurnPrompt,
        stop: Sequence[str] = (),
        max_tokens: int | None = None,
    ) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._stop, self._max_tokens = tuple(stop), max_tokens
        self._answer, self._thoughts = b"", b""
        self._cut: int | None = None
        self._longest_stop, self._searched_chars = max(map(len, self._stop), default=0), 0
        self._has_name = prompt.is_named
        self.is_thinking = prompt.is_thinking
        self.finish: Finish | None = None
        self.tokens = self.thought_tokens = 0

    def copy(self) -> "Transcript":
        """Another that can go on in another way."""
        return copy.copy(self)

    @property
    def whole(self) -> str:
        """The answer, and what may yet turn out to be the start of a stop text.

        Bytes that form no character are left out; those at the end may become one.
        """
        text = self._answer.decode(errors="ignore")
        return text if self._cut is None else text[: self._cut]

    @property
    def text(self) -> str:
        """The answer as far as it is final."""
        whole = self.whole
        if self.finish is not None:
            return whole
        return whole[: len(whole) - max((_begun(whole, stop) for stop in self._stop), default=0)]

    @property
    def thoughts(self) -> str:
        """What was thought, without the names it was thought under."""
        return self._thoughts.decode(errors="ignore")

    def add(self, tokens: Sequence[int]) -> int:
        """Add tokens up to the one that ends the answer; how many were added."""
        before = len(self._answer)
        added = 0
        for token in tokens:
            if self.finish is not None:
                break
            self._add(token)
            added += self.finish != "stop"
        self._find_stop(before)
        return added

    def end(self, finish: Finish) -> None:
        """Nothing more will come."""
        self.finish = self.finish or finish

    def end_thoughts(self) -> None:
        """Thoughts are over; the answer begins."""
        self.is_thinking = False

    def _add(self, token: int) -> None:
        marks = self._prompt.marks
        if token in self._prompt.ends:
            self.finish = "stop"
        elif marks is not None and token == marks.start:
            self.is_thinking, self._has_name = True, False
        elif marks is not None and token == marks.end:
            self.is_thinking = False
        elif self.is_thinking:
            self.thought_tokens += 1
            spelled = self._tokenizer.decode([token])
            if not self._has_name:
                _name, line_end, spelled = spelled.partition(b"\n")
                self._has_name = bool(line_end)
            self._thoughts += spelled
        else:
            self.tokens += 1
            self._answer += self._tokenizer.decode([token])
            if self.tokens == self._max_tokens:
                self.finish = "length"

    def _find_stop(self, before: int) -> None:
        """Cut the answer before the first stop text, where one is new in it."""
        if not self._stop or len(self._answer) == before:
            return
        text = self._answer.decode(errors="ignore")
        # A stop text that ends in what is new begins no further before it.
        first = max(0, self._searched_chars - self._longest_stop + 1)
        self._searched_chars = len(text)
        found = [at for at in (text.find(stop, first) for stop in self._stop) if at >= 0]
        if found:
            self._cut, self.finish = min(found), "stop"


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of a text with which a stop text begins."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
