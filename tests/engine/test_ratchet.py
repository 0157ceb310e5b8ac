"""How good the starter is may rise, and not slide: figures on fixed gaps against kept bounds.

The gaps are cut out of texts that lie beside this file and never change; no model of ours is
trained on them. Half the texts are tests, and kept are gaps whose text stands elsewhere in the
document too: the starter can copy, and where it cannot know nothing slides. A change that makes a
figure better for good moves its bound:

    .venv/bin/python -P tests/engine/test_ratchet.py           # the figures beside their bounds
    .venv/bin/python -P tests/engine/test_ratchet.py --write   # new bounds, a little below them
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infilld.engine.evaluation.items import Item, cut_items
from infilld.engine.evaluation.recordings import recordings, run_typing
from infilld.engine.evaluation.run import compare
from infilld.engine.training.corpus import SourceFile
from infilld.engine.worker import load_infiller, starter_folder

HERE = Path(__file__).parent / "ratchet"
BOUNDS = HERE / "bounds.json"
SEED = 0
ITEMS = {"rest_of_line": 26, "silent": 16}
RECORDINGS = 2
# Drawn to find those that are kept.
DRAWN = 300
FEWEST_CHARS = 4

# A share may miss its bound by two items before it counts: another processor rounds differently.
# Where the bound is a ceiling, the figure may not rise above it.
FIGURES = {
    ("rest_of_line", "exact_match"): ("floor", 0.08),
    ("rest_of_line", "precision"): ("floor", 0.08),
    ("rest_of_line", "mean_passes"): ("ceiling", 0.25),
    ("silent", "silent"): ("floor", 0.13),
    ("typing", "median_passes"): ("ceiling", 0.5),
    ("typing", "mean_passes"): ("ceiling", 0.5),
    ("typing", "saved"): ("floor", 0.1),
}
ABOUT = {
    "exact_match": "share of line ends that are exactly right",
    "precision": "share of what is shown that is exactly right",
    "mean_passes": "passes of the model for a request",
    "median_passes": "passes of the model for a request, once the document is warm",
    "silent": "share of complete places where nothing is shown",
    "saved": "share of typed characters that suggestions would have written",
}


def measure_starter() -> dict[str, dict[str, Any]]:
    """Figures of the starter, as it is shipped, on the kept texts."""
    files = [
        SourceFile("kept", path.name, path.read_text(encoding="utf-8"))
        for path in sorted(HERE.glob("*.txt"))
    ]
    engine = load_infiller(starter_folder(), "cpu")
    found = {}
    for kind, count in ITEMS.items():
        drawn = [item for item in cut_items(files, kind, DRAWN, SEED) if can_be_copied(item)]
        found[kind] = compare(engine, drawn[:count], ["canvas"], SEED)["canvas"]
    lines = [
        each
        for each in recordings(files, 2 * DRAWN // 5, SEED)
        if each.line in each.before or each.line in each.after
    ]
    found["typing"] = run_typing(engine, lines[:RECORDINGS], SEED)["canvas"]
    return found


def can_be_copied(item: Item) -> bool:
    """Whether the gap's text stands elsewhere in the document too, or there is none."""
    text = item.missing.rstrip()
    is_long = len(text) >= FEWEST_CHARS
    return not text or (is_long and (text in item.before or text in item.after))


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, Any]]:
    if not (starter_folder() / "config.json").is_file():
        pytest.skip("this checkout has no starter model yet")
    return measure_starter()


def complaint(kind: str, name: str, value: float | None, bound: float, side: str) -> str:
    """What slid, from what to what, and what to do; empty where nothing did."""
    if value is not None and (value >= bound if side == "floor" else value <= bound):
        return ""
    now = "nothing to count" if value is None else f"{value:g}"
    return (
        f"{kind} {name} ({ABOUT[name]}) slid: its {side} is {bound:g}, now it is {now}. Find the "
        "change that did it. If it is worth its price, say in the commit what is gained, and "
        f"move the bounds: .venv/bin/python -P tests/engine/{Path(__file__).name} --write"
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), FIGURES, ids=lambda v: v)
def test_no_figure_slides(figures: dict[str, dict[str, Any]], kind: str, name: str) -> None:
    bounds = json.loads(BOUNDS.read_text(encoding="utf-8"))
    side, _ = FIGURES[kind, name]
    why = complaint(kind, name, figures[kind][name], bounds[kind][name], side)
    assert not why, why


def test_a_slide_is_told() -> None:
    assert not complaint("silent", "silent", 0.8, 0.8, "floor")
    assert not complaint("typing", "median_passes", 3.0, 4.0, "ceiling")
    for value, said in ((0.7, "floor is 0.8, now it is 0.7"), (None, "nothing to count")):
        assert said in complaint("silent", "silent", value, 0.8, "floor")
    assert "ceiling is 4, now it is 5" in complaint("typing", "median_passes", 5.0, 4.0, "ceiling")


def test_every_figure_has_a_bound_and_no_other_is_kept() -> None:
    bounds = json.loads(BOUNDS.read_text(encoding="utf-8"))
    kept = {(kind, name) for kind, found in bounds.items() for name in found}
    assert kept == set(FIGURES)
    assert {name for _, name in FIGURES} == set(ABOUT)


def main() -> None:
    """Tell the figures; with --write keep new bounds."""
    started = time.monotonic()
    found = measure_starter()
    old = json.loads(BOUNDS.read_text(encoding="utf-8")) if BOUNDS.exists() else {}
    new: dict[str, dict[str, float]] = {}
    for (kind, name), (side, margin) in FIGURES.items():
        value = found[kind][name] or 0.0
        bound = max(0.0, value - margin) if side == "floor" else value + margin
        new.setdefault(kind, {})[name] = round(bound, 3)
        was = old.get(kind, {}).get(name, "none")
        sys.stdout.write(f"{kind} {name}: {value:g}, {side} was {was}, would be {bound:.3f}\n")
    sys.stdout.write(f"{time.monotonic() - started:.0f} s\n")
    if "--write" in sys.argv:
        BOUNDS.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
