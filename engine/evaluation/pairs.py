"""Two gaps a few lines apart in one request: on one canvas, or each on its own."""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infilld.engine.errors import RequestError
from infilld.engine.evaluation.contenders import switched
from infilld.engine.evaluation.items import Item, cut_items
from infilld.engine.evaluation.names import SWITCHES
from infilld.engine.infill import Infiller
from infilld.engine.request import InfillRequest, Span
from infilld.engine.training.corpus import SourceFile

KIND = "pairs"
# Lines from the first gap to the second, at most.
_MOST_LINES = 6
_TRIES = 20


@dataclass(frozen=True)
class Pair:
    """Two line ends of one document that are missing; `between` stands between the gaps."""

    before: str
    first: str
    between: str
    second: str
    after: str


def pairs(files: Sequence[SourceFile], count: int, seed: int) -> list[Pair]:
    """Random pairs; the seed alone chooses them.

    Args:
        files: held out. count: pairs wanted.

    Raises:
        RequestError: the files hold too few.
    """
    rng = random.Random(f"{KIND} {seed}")
    found: list[Pair] = []
    for tries in range(1, _TRIES + 1):
        found = []
        for item in cut_items(files, "rest_of_line", tries * count, seed):
            pair = _second(item, rng)
            if pair is not None:
                found.append(pair)
        if len(found) >= count:
            return found[:count]
    raise RequestError(
        f"{len(found)} pairs of gaps in {len(files)} files, {count} are wanted",
        remedy="Give folders with more Python source.",
    )


def _second(item: Item, rng: random.Random) -> Pair | None:
    """A second gap in one of the next lines of an item."""
    lines = item.after.split("\n")[1 : _MOST_LINES + 1]
    code = [number for number, line in enumerate(lines, start=1) if len(line.strip()) > 3]
    if not code:
        return None
    number = rng.choice(code)
    start = sum(len(line) + 1 for line in item.after.split("\n")[:number])
    line = lines[number - 1]
    indent = len(line) - len(line.lstrip())
    at = start + rng.randint(indent + 1, len(line) - 2)
    end = start + len(line)
    if not item.after[at:end].strip():
        return None
    return Pair(item.before, item.missing, item.after[:at], item.after[at:end], item.after[end:])


def run_pairs(
    engine: Infiller,
    made: Sequence[Pair],
    seed: int,
    names: Sequence[str],
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Figures of contenders on the same pairs.

    Args:
        engine: a model that can infill. made: pairs, at least one. seed: of every request.
        names: of contenders; those that are not the engine are left out.
        say: gets a line for each contender.

    Returns:
        For each: `exact_match` of the gaps, `both_exact` of the pairs, `abstained` of the gaps;
        `mean_passes`, `mean_prompt_tokens` and `median_ms` of a request.
    """
    figures: dict[str, dict[str, Any]] = {}
    for name in names:
        if name not in SWITCHES or SWITCHES[name].knows_length:
            continue
        own = switched(engine, name)
        exact: list[tuple[bool, bool]] = []
        silent, passes, tokens, ms = 0, [], [], []
        for pair in made:
            text = pair.before + pair.between + pair.after
            places = (len(pair.before), len(pair.before) + len(pair.between))
            own.forget()
            started = time.perf_counter()
            result = own.infill(
                InfillRequest(text=text, spans=tuple(Span(at, at) for at in places), seed=seed)
            )
            ms.append(1e3 * (time.perf_counter() - started))
            passes.append(result.usage.passes)
            tokens.append(result.usage.prompt_tokens)
            shown = ["", ""]
            if result.alternatives:
                shown = [span.text for span in result.alternatives[0].spans]
            silent += shown.count("")
            right = [
                each.rstrip() == missing.rstrip()
                for each, missing in zip(shown, (pair.first, pair.second), strict=True)
            ]
            exact.append((right[0], right[1]))
        count = len(made)
        figures[name] = {
            "items": count,
            "exact_match": round(sum(map(sum, exact)) / (2 * count), 4),
            "both_exact": round(sum(map(all, exact)) / count, 4),
            "abstained": round(silent / (2 * count), 4),
            "mean_passes": round(statistics.fmean(passes), 2),
            "mean_prompt_tokens": round(statistics.fmean(tokens), 1),
            "median_ms": round(statistics.median(ms), 2),
        }
        say(f"{KIND}: {name} has {100 * figures[name]['exact_match']:.1f} % of the gaps exact")
    return figures
