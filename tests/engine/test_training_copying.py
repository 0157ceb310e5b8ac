"""Copying tasks are solvable from what was read, and the first weights can already copy."""

import ast
import dataclasses
import itertools
import random

import torch
import torch.nn.functional as F

from infilld.engine.model import DiffusionGemma
from infilld.engine.training.copying import IGNORED, Renamer, repeated_phrases
from infilld.engine.training.recipe import RECIPES
from infilld.engine.training.wiring import initialise

SOURCE = """class Basket:
    def total(self, prices):
        return sum(prices) + self.postage
"""


def test_labels_are_next_tokens_that_were_read_before() -> None:
    ids, labels = repeated_phrases(200, 8, 4096, random.Random(1))
    assert len(ids) == len(labels) == 200
    assert all(8 <= token < 4096 for token in ids)
    scored = [place for place, label in enumerate(labels) if label != IGNORED]
    assert len(scored) > 40
    for place in scored[:-1]:
        assert labels[place] == ids[place + 1]
        pair = (ids[place], ids[place + 1])
        assert pair in itertools.pairwise(ids), place


def test_exchanged_names_stay_consistent_and_keywords_stay() -> None:
    renamer = Renamer(["alpha = beta(gamma)\n"], random.Random(0))
    found = [renamer.rename(SOURCE, random.Random(seed)) for seed in range(20)]
    assert any(text != SOURCE for text in found)
    for text in found:
        ast.parse(text)
        assert text.count("self") == SOURCE.count("self")
        assert "return sum(" in text
        # Both uses of the argument were exchanged for the same name, or neither was.
        argument = text.partition("self, ")[2].partition(")")[0]
        assert f"sum({argument})" in text


def _copying_nats(model: DiffusionGemma) -> float:
    ids, labels = (torch.tensor(part) for part in repeated_phrases(300, 8, 4096, random.Random(2)))
    with torch.no_grad():
        logits = model.logits(model.encode(ids, model.new_cache()))
    return float(F.cross_entropy(logits, labels, ignore_index=IGNORED))


def test_first_weights_already_copy_a_little() -> None:
    model = DiffusionGemma(RECIPES["cpu"].model_config()).eval()
    initialise(model, 0)
    wired = _copying_nats(model)
    # The same without the second layer's part: the comparison is what the wiring is for.
    torch.nn.init.normal_(model.get_parameter("layers.1.self_attn.k_proj.weight"), std=0.07)
    assert wired < _copying_nats(model) - 0.5


def test_models_too_small_for_the_wiring_are_random() -> None:
    recipe = dataclasses.replace(RECIPES["cpu"], width=64, heads=2, key_heads=1, dense_width=32)
    model = DiffusionGemma(recipe.model_config())
    initialise(model, 0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.get_parameter("embed_tokens.weight")[:, -1].abs().sum() > 0
