"""Text written from left to right, token by token, and where it ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from infilld.engine.evaluation.items import Item
from infilld.engine.tokenizer import Tokenizer

# A line of code has 10 tokens; one that does not end is not worth waiting for.
_MOST_TOKENS_A_LINE = 64


@dataclass(frozen=True)
class Limit:
    """Where text ends: behind so many lines (None: lines do not count) or so many tokens."""

    lines: int | None
    tokens: int


def limit_of(item: Item, tokenizer: Tokenizer) -> Limit:
    """The limit for an item's text.

    Lines end by themselves, so what is missing up to a line end is given as many lines as are
    missing. Nothing ends a span but its length: there the true number of tokens is given. Both
    are more than the canvas is told, except for one line.
    """
    if item.kind in ("rest_of_line", "line", "lines", "silent", "repository"):
        lines = item.missing.count("\n") + 1
        return Limit(lines, lines * _MOST_TOKENS_A_LINE)
    return Limit(None, max(1, len(tokenizer.encode(item.missing))))


def write(next_token: Callable[[Sequence[int]], int], limit: Limit, tokenizer: Tokenizer) -> str:
    """Text up to its limit; a line end that ended it is left out.

    Args:
        next_token: the token behind those written so far.
        limit: where to stop. tokenizer: of the tokens.
    """
    tokens: list[int] = []
    line_ends = 0
    while len(tokens) < limit.tokens and (limit.lines is None or line_ends < limit.lines):
        tokens.append(next_token(tokens))
        line_ends += tokenizer.decode(tokens[-1:]).count(b"\n")
    text = tokenizer.text(tokens)
    return "\n".join(text.split("\n")[: limit.lines])
