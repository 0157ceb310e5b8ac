"""Fits a model's confidence: how likely is a candidate right, by what is known of it?

The files it is fitted on are neither trained on nor reported on. `infilld train` does it by itself;
for a model folder that is there already:

    python -m infilld.engine.evaluation.calibrate MODEL_DIR [FOLDER ...] [--items N] [--dry-run]

fills gaps in the packages kept for calibration, or in the folders that are named, tells what would
be shown above which confidence, and writes calibration.json into the model folder.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from infilld.engine.errors import InfilldError
from infilld.engine.evaluation.held_out import calibration_files, files_below
from infilld.engine.evaluation.items import Item, cut_items
from infilld.engine.evaluation.measures import is_exact_text
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.judging import COMPLETE
from infilld.engine.plan import FillMethod
from infilld.engine.ranking import CALIBRATION, Calibration, Weighed
from infilld.engine.request import InfillRequest, Span
from infilld.engine.training.corpus import SourceFile
from infilld.engine.worker import load_infiller

ITEMS = 600
# On the starter's calibration files about 45 % of what is above was right.
SHOW_ABOVE = 0.12
# Kinds of gaps and their shares of the items: mostly what is met while typing. An editor asks at
# every pause, and often nothing is missing there.
_KINDS = {"rest_of_line": 0.45, "line": 0.15, "span": 0.15, "silent": 0.25}
# Keeps the weight of a rare feature small.
_DECAY = 0.005
_ITERATIONS = 200
# Score of what is not there.
_NEVER = -1e9
_SAY_EVERY_S = 10.0
_TOLD_THRESHOLDS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)

# Features of every candidate of an item, and whether each is the true text.
Judged = list[tuple[dict[str, float], bool]]
Report = Callable[[int, int], None]


def _say_nothing(done: int, count: int) -> None:
    """Report to nobody."""


def calibrate(
    engine: Infiller,
    files: Sequence[SourceFile],
    *,
    items: int = ITEMS,
    seed: int = 0,
    report: Report = _say_nothing,
) -> Calibration:
    """The calibration of a model.

    Args:
        engine: the model; its own calibration is not used.
        files: that it never saw. items: gaps to fill. seed: chooses them.
        report: called after every item with how many are done, and how many there are.

    Raises:
        RequestError: the files hold too few gaps.
    """
    return fit(judge(engine, calibration_items(files, items, seed), seed, report))


def calibration_items(files: Sequence[SourceFile], count: int, seed: int) -> list[Item]:
    """About so many gaps, of every kind its share.

    Raises:
        RequestError: the files hold too few gaps.
    """
    return [
        item
        for kind, share in _KINDS.items()
        for item in cut_items(files, kind, max(1, round(share * count)), seed)
    ]


def judge(
    engine: Infiller, items: Sequence[Item], seed: int, report: Report = _say_nothing
) -> list[Judged]:
    """What is known of every candidate of every item, and whether it is right.

    Where nothing is missing, every text is wrong, and none at all is right.

    Args:
        engine: the model; its own calibration is not used.
        items: gaps to fill. seed: of every request. report: as for `calibrate`.
    """
    plain = Infiller(engine.model, engine.tokenizer, engine.sampler, FillMethod(holds_back=False))
    judged: list[Judged] = []
    for item in items:
        seen: list[Weighed] = []
        at = len(item.before)
        request = InfillRequest(text=item.before + item.after, spans=(Span(at, at),), seed=seed)
        plain.infill(request, Hooks(on_weighed=seen.extend))
        judged.append([(each.features, is_exact_text(item, each.candidate.text)) for each in seen])
        report(len(judged), len(items))
    return judged


def fit(judged: Sequence[Judged]) -> Calibration:
    """The likeliest softmax over the candidates of each item, and none of them.

    Args:
        judged: candidates of each item, which may be none; at least one item has some.
    """
    items = [item for item in judged if item]
    names = sorted(items[0][0][0])
    most = max(map(len, items))
    table = torch.zeros(len(items), most, len(names))
    is_there = torch.zeros(len(items), most, dtype=torch.bool)
    right = torch.zeros(len(items), most, dtype=torch.bool)
    for row, item in enumerate(items):
        table[row, : len(item)] = torch.tensor([[each[name] for name in names] for each, _ in item])
        is_there[row, : len(item)] = True
        right[row, : len(item)] = torch.tensor([is_right for _, is_right in item])
    has_right = right.any(1)
    weights = torch.zeros(len(names), requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        scores = (table @ weights + bias).masked_fill(~is_there, _NEVER)
        none = torch.zeros(len(items), 1)
        whole = torch.cat((none, scores), dim=1).logsumexp(1)
        rights = scores.masked_fill(~right, _NEVER).logsumexp(1)
        nats = whole - torch.where(has_right, rights, 0.0)
        total = nats.mean() + _DECAY * weights.square().mean()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    found = dict(zip(names, weights.tolist(), strict=True))
    return Calibration(
        weights={name: round(weight, 4) for name, weight in found.items()},
        bias=round(bias.item(), 4),
        show_above=SHOW_ABOVE,
    )


def shown_above(
    judged: Sequence[Judged], are_silent: Sequence[bool], thresholds: Sequence[float]
) -> list[dict[str, float]]:
    """What would be shown above which confidence, each half judged by a fit on the other half.

    Args:
        judged: candidates of each item; some in either half. are_silent: where nothing is missing.
        thresholds: confidences.

    Returns:
        For each threshold `show_above`; of the gaps the shares `exact` and `shown`; of what is
        shown anywhere the share `precision`; of the silent places the share `silent`.
    """
    halves = [fit(judged[1::2]), fit(judged[0::2])]
    best: list[tuple[float, bool]] = []
    for place, item in enumerate(judged):
        confidences = halves[place % 2].confidences([features for features, _ in item])
        rated = sorted(zip(confidences, item, strict=True), key=lambda each: -each[0])
        texts = [each for each in rated if not each[1][0].get("is_empty")]
        is_complete = bool(rated) and rated[0] not in texts and rated[0][0] >= COMPLETE
        if is_complete or not texts:
            best.append((-1.0, False))
        else:
            confidence, (_, is_right) = texts[0]
            best.append((confidence, is_right))
    rows = []
    for threshold in thresholds:
        shown = [confidence >= threshold for confidence, _ in best]
        right = [was and is_right for was, (_, is_right) in zip(shown, best, strict=True)]
        quiet = [not was for was, silent in zip(shown, are_silent, strict=True) if silent]
        on_gaps = [was for was, silent in zip(shown, are_silent, strict=True) if not silent]
        gaps = max(1, len(on_gaps))
        rows.append(
            {
                "show_above": threshold,
                "exact": sum(right) / gaps,
                "shown": sum(on_gaps) / gaps,
                "precision": sum(right) / max(1, sum(shown)),
                "silent": sum(quiet) / max(1, len(quiet)),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Calibrate a model folder; returns 0 done, 1 failed."""
    options = _parser().parse_args(argv)
    try:
        _calibrate_folder(options)
    except InfilldError as error:
        _say(f"{error}\n  {error.remedy}" if error.remedy else str(error))
        return 1
    return 0


def _calibrate_folder(options: argparse.Namespace) -> None:
    files = files_below(options.folders) if options.folders else calibration_files()
    items = calibration_items(files, options.items, options.seed)
    _say(f"{len(items)} gaps in {len(files)} files of {_packages(files)}")
    engine = load_infiller(options.model, options.device)
    started = said = time.monotonic()

    def report(done: int, count: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now >= said + _SAY_EVERY_S or done == count:
            said = now
            left = (now - started) * (count - done) / done
            _say(f"filled {done} of {count}, {left:.0f} s to go")

    judged = judge(engine, items, options.seed, report)
    rows = shown_above(judged, [not item.missing for item in items], _TOLD_THRESHOLDS)
    _say("".join(f"{name:>12}" for name in rows[0]))
    for row in rows:
        _say("".join(f"{value:12.3f}" for value in row.values()))
    found = fit(judged)
    if options.show_above is not None:
        found = Calibration(weights=found.weights, bias=found.bias, show_above=options.show_above)
    sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
    if not options.dry_run:
        found.save(options.model)
        _say(f"wrote {options.model / CALIBRATION}")


def _packages(files: Sequence[SourceFile]) -> str:
    return ", ".join(sorted({file.package for file in files}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infilld.engine.evaluation.calibrate",
        description="Fit the confidence of a model folder, and write it there.",
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("model", metavar="MODEL_DIR", type=Path, help="a model that can infill")
    flag(
        "folders",
        metavar="FOLDER",
        nargs="*",
        type=Path,
        help="Python source that it never saw; none: the packages kept for calibration",
    )
    flag("--items", metavar="N", type=int, default=ITEMS, help="gaps to fill")
    flag("--seed", metavar="N", type=int, default=0, help="chooses them")
    flag("--device", metavar="NAME", default="auto", help='"cpu", "cuda", "cuda:N" or "auto"')
    flag("--show-above", metavar="P", type=float, help="confidence below which nothing is shown")
    flag("--dry-run", action="store_true", help="write nothing")
    return parser


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    raise SystemExit(main())
