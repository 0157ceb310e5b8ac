"""Fits a model's confidence: how likely is a candidate right, by what is known of it?

The files it is fitted on are neither trained on nor reported on.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from infilld.engine.evaluation.items import cut_items
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.plan import FillMethod
from infilld.engine.ranking import CALIBRATION, Calibration, Weighed
from infilld.engine.request import InfillRequest, Span
from infilld.engine.training.corpus import SourceFile

# On the starter's calibration files 44 % of what is above was right, and 6 % of what is below.
SHOW_ABOVE = 0.05
# Kinds of gaps and their shares of the items: mostly what is met while typing.
_KINDS = {"rest_of_line": 0.6, "line": 0.2, "span": 0.2}
# Keeps the weight of a rare feature small.
_DECAY = 0.02
_ITERATIONS = 100

# Features of every candidate of an item, and whether each is the true text.
Judged = list[tuple[dict[str, float], bool]]


def calibrate(
    engine: Infiller,
    files: Sequence[SourceFile],
    *,
    items: int = 300,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, count: None,
) -> Calibration:
    """The calibration of a model.

    Args:
        engine: the model; its own calibration is not used.
        files: that it never saw. items: gaps to fill. seed: chooses them.
        report: called after every item with how many are done, and how many there are.

    Raises:
        RequestError: the files hold too few gaps.
    """
    plain = Infiller(engine.model, engine.tokenizer, engine.sampler, FillMethod(holds_back=False))
    wanted = [
        item
        for kind, share in _KINDS.items()
        for item in cut_items(files, kind, max(1, round(share * items)), seed)
    ]
    judged: list[Judged] = []
    for item in wanted:
        seen: list[Weighed] = []
        at = len(item.before)
        request = InfillRequest(text=item.before + item.after, spans=(Span(at, at),), seed=seed)
        plain.infill(request, Hooks(on_weighed=seen.extend))
        missing = item.missing.rstrip()
        judged.append([(each.features, each.candidate.text.rstrip() == missing) for each in seen])
        report(len(judged), len(wanted))
    return fit(judged)


def fit(judged: Sequence[Judged]) -> Calibration:
    """A logistic model of the judged candidates; every item counts alike.

    Args:
        judged: candidates of each item; at least one item has some.
    """
    rows = [(features, right, 1 / len(item)) for item in judged for features, right in item]
    names = sorted(rows[0][0])
    table = torch.tensor([[features[name] for name in names] for features, _, _ in rows])
    right = torch.tensor([float(is_right) for _, is_right, _ in rows])
    share = torch.tensor([weight for _, _, weight in rows])
    weights = torch.zeros(len(names), requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = table @ weights + bias
        each = torch.nn.functional.binary_cross_entropy_with_logits(logits, right, reduction="none")
        total = (each * share).sum() / share.sum() + _DECAY * weights.square().mean()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = dict(zip(names, weights.tolist(), strict=True))
    return Calibration(
        weights={name: round(weight, 4) for name, weight in found.items()},
        bias=round(bias.item(), 4),
        show_above=SHOW_ABOVE,
    )


def save_calibration(calibration: Calibration, folder: Path) -> None:
    """Write a calibration into a model folder."""
    text = json.dumps(asdict(calibration), indent=2) + "\n"
    (folder / CALIBRATION).write_text(text, encoding="utf-8")
