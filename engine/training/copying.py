"""Copying, made easy to learn: repeated random tokens, and source whose names were exchanged.

A small model's best skill is to take names and phrases from what it reads. Ordinary source teaches
that late: after 7 million tokens a model of 1.9 M parameters met random tokens that came twice
with a loss of 10.7 nats, worse than chance. Repeated random tokens teach it within minutes, and
exchanged names keep it needed: what the packages call their things does not help to guess them.
"""

import builtins
import keyword
import random
import re
from collections.abc import Sequence

# Label of a position that is not scored.
IGNORED = -100

_PHRASE_TOKENS = (3, 40)
_REPEATED = 0.6
_IDENTIFIER = re.compile(r"\b[A-Za-z_][A-Za-z0-9_]{2,}\b")
_KEPT_NAMES = frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"self", "cls"}
# Share of the names of a text that are exchanged, at most.
_MOST_RENAMED = 0.7


def repeated_phrases(
    tokens: int, first_id: int, vocab_tokens: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """Random tokens in phrases, most of which came before, and their next-token labels.

    Args:
        tokens: length of both lists. first_id: ids are drawn from `[first_id, vocab_tokens)`.
        rng: of every choice.

    Returns:
        ids, and labels that are IGNORED where nothing read before tells the next token.
    """
    ids: list[int] = []
    known: list[bool] = []
    phrases: list[list[int]] = []
    while len(ids) < tokens + 1:
        if phrases and rng.random() < _REPEATED:
            phrase = rng.choice(phrases)
            start = rng.randrange(len(phrase) - 1)
            part = phrase[start : start + rng.randint(2, len(phrase))]
            known += [False] + [True] * (len(part) - 1)
        else:
            part = rng.choices(range(first_id, vocab_tokens), k=rng.randint(*_PHRASE_TOKENS))
            phrases.append(part)
            known += [False] * len(part)
        ids += part
    following = zip(ids[1 : tokens + 1], known[1 : tokens + 1], strict=True)
    return ids[:tokens], [token if is_known else IGNORED for token, is_known in following]


class Renamer:
    """Exchanges names of a text for names of other texts, each the same way throughout.

    Args:
        texts: where names are taken from. rng: chooses them.
    """

    def __init__(self, texts: Sequence[str], rng: random.Random, names: int = 20_000) -> None:
        found: set[str] = set()
        for text in rng.sample(texts, min(len(texts), 400)):
            found.update(_IDENTIFIER.findall(text))
            if len(found) > names:
                break
        self._names = sorted(found - _KEPT_NAMES) or ["value"]

    def rename(self, text: str, rng: random.Random) -> str:
        """The text with some of its names exchanged."""
        here = sorted(set(_IDENTIFIER.findall(text)) - _KEPT_NAMES)
        share = rng.uniform(0, _MOST_RENAMED)
        new = {name: rng.choice(self._names) for name in here if rng.random() < share}
        return _IDENTIFIER.sub(lambda match: new.get(match[0], match[0]), text)
