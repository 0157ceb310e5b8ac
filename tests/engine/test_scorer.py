"""The causal scorer gives the log-probabilities of `transformers`, candidate by candidate."""

import pytest
import torch
from parity import distance, encoded, reference_log_probabilities
from tiny_model import WIDE_HEADS, ours, random_tokens, reference

from infilld.engine.cache import PrefixCache
from infilld.engine.model import DiffusionGemma
from infilld.engine.prefixes import Prefix
from infilld.engine.scorer import continue_greedily, score

CEILING = 1e-4


def read(model: DiffusionGemma, prefix: torch.Tensor, margin: int | None = None) -> Prefix:
    cache: PrefixCache = encoded(model, prefix[:-1], margin)
    return Prefix(cache, model.encode(prefix[-1:], cache)[-1])


@pytest.mark.parametrize("margin", [None, 0, 4])
def test_candidates_of_any_length_agree(margin: int | None) -> None:
    model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 21, seed=1)
    found_prefix = read(model, prefix, margin)
    cache = found_prefix.cache
    candidates = [random_tokens(WIDE_HEADS, n, seed=n) for n in (7, 1, 0, 12)]
    found = score(model, found_prefix, [c.tolist() for c in candidates])
    for ours_, candidate in zip(found, candidates, strict=True):
        whole = torch.cat((prefix, candidate))
        theirs = reference_log_probabilities(reference(WIDE_HEADS), whole)[len(prefix) - 1 :]
        assert ours_.shape == candidate.shape
        if len(candidate):
            assert distance(ours_, theirs) < CEILING
    assert cache.ids == tuple(prefix.tolist())
    cache.check()


def test_neighbours_do_not_matter() -> None:
    model = ours(WIDE_HEADS)
    prefix = read(model, random_tokens(WIDE_HEADS, 9, seed=2))
    one, other = ([3, 1, 4, 1, 5], [9, 2, 6])
    alone = score(model, prefix, [one])[0]
    together = score(model, prefix, [other, one, one])
    assert distance(alone, together[1]) < CEILING
    assert torch.equal(together[1], together[2])


def test_a_continuation_is_the_likeliest_token_each_time() -> None:
    model, prefix = ours(WIDE_HEADS), random_tokens(WIDE_HEADS, 30, seed=4)
    here = read(model, prefix)
    banned = torch.zeros(2, model.config.vocab_tokens, dtype=torch.bool)
    found = continue_greedily(model, here, banned, frozenset(), 5)
    assert list(here.cache.ids) == prefix.tolist()
    ids = prefix.tolist()
    for token in found:
        hidden = model.encode(torch.tensor(ids), model.new_cache())[-1]
        assert int(model.logits(hidden).argmax()) == token
        ids.append(token)
    # It ends before an end, and never writes what is banned.
    assert continue_greedily(model, here, banned, frozenset({found[0]}), 5) == []
    assert continue_greedily(model, here, banned, frozenset(), 2) == found[:2]
    # The first token has bans of its own.
    banned[1, found[0]] = True
    assert continue_greedily(model, here, banned, frozenset(), 1) == found[:1]
    banned[0, found[0]] = True
    assert continue_greedily(model, here, banned, frozenset(), 5)[0] != found[0]
