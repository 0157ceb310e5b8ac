"""The figures of a model card: losses, and two contenders on rest-of-line gaps."""

import math
from collections.abc import Sequence
from typing import Any

from infilld.engine.evaluation.items import cut_items
from infilld.engine.evaluation.losses import held_out_nats
from infilld.engine.evaluation.run import compare
from infilld.engine.infill import Infiller
from infilld.engine.training.corpus import SourceFile

_FIGURES = ("exact_match", "edit_similarity", "parse_rate", "median_ms")


def evaluate(
    engine: Infiller, texts: Sequence[str], *, items: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Measure a model on held-out texts.

    Args:
        engine: the model. texts: of packages that were held out.
        items: rest-of-line gaps to fill. seed: chooses them.

    Returns:
        Figures for evaluation.json and the model card: cross-entropies in nats for each token,
        shares in [0, 1], times in milliseconds.

    Raises:
        RequestError: the texts hold too few gaps.
    """
    report: dict[str, Any] = {"items": items, "seed": seed, "held_out_files": len(texts)}
    report |= held_out_nats(engine, texts, seed)
    files = [SourceFile("", "", text) for text in texts]
    found = compare(
        engine,
        cut_items(files, "rest_of_line", items, seed),
        ("canvas", "causal_greedy"),
        seed,
    )
    report["rest_of_line"] = {
        "canvas": _figures(found["canvas"]),
        "causal_greedy_prefix_only": _figures(found["causal_greedy"]),
    }
    return report


def _figures(found: dict[str, Any]) -> dict[str, float]:
    return {name: math.nan if found[name] is None else found[name] for name in _FIGURES}
