"""How good answers are: counted, never judged."""

import difflib
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from infilld.engine.evaluation.contenders import Answer
from infilld.engine.evaluation.items import Item
from infilld.engine.evaluation.sandbox import Outcome
from infilld.engine.syntax import parses

# Standard deviations that hold 95 % of a normal distribution.
_Z = 1.959964


def measure(
    items: Sequence[Item], answers: Sequence[Answer], are_sound: Sequence[bool]
) -> dict[str, Any]:
    """Figures for the answers of one contender.

    An abstention counts as wrong and as an empty gap; `precision` and `shown_parse_rate` leave it
    out. A file that does not parse with its true text says nothing about an answer, and counts
    in no parse rate.

    Args:
        items: at least one. answers: one for each item.
        are_sound: whether each item's file parses with its true text.

    Returns:
        Shares in [0, 1] or None where there is nothing to count, times in milliseconds.
    """
    pairs = list(zip(items, answers, strict=True))
    exact = [is_exact(item, answer) for item, answer in pairs]
    shown = [answer.text is not None for answer in answers]
    similar = [similarity(answer.text or "", item.missing) for item, answer in pairs]
    parsed = [
        (parses(item.filled(answer.text or "")), answer.text is not None)
        for (item, answer), is_sound in zip(pairs, are_sound, strict=True)
        if is_sound
    ]
    ms = [answer.ms for answer in answers]
    hits, count = sum(exact), len(items)
    return {
        "items": count,
        "exact_match": round(hits / count, 4),
        "exact_match_95": wilson(hits, count),
        "edit_similarity": round(statistics.fmean(similar), 4),
        "parse_rate": _share([is_parsed for is_parsed, _ in parsed]),
        "parse_items": len(parsed),
        "abstained": round(1 - sum(shown) / count, 4),
        "abstained_for": dict(Counter(a.reason for a in answers if a.text is None)),
        # What is exact is shown.
        "precision": round(hits / sum(shown), 4) if any(shown) else None,
        "precision_95": wilson(hits, sum(shown)) if any(shown) else None,
        "shown_parse_rate": _share([is_parsed for is_parsed, is_shown in parsed if is_shown]),
        "mean_passes": round(statistics.fmean(answer.passes for answer in answers), 2),
        "median_ms": round(statistics.median(ms), 2),
        "p90_ms": round(_p90(ms), 2),
    }


def measure_tests(outcomes: Sequence[Outcome | None]) -> dict[str, Any]:
    """Share of programs that pass their tests; None, an abstention, did not.

    Args:
        outcomes: at least one.
    """
    verdicts = Counter("abstained" if o is None else o.verdict for o in outcomes)
    passed, count = verdicts["passed"], len(outcomes)
    return {
        "pass_at_1": round(passed / count, 4),
        "pass_at_1_95": wilson(passed, count),
        "tests": dict(verdicts),
    }


def is_exact(item: Item, answer: Answer) -> bool:
    """Whether the answer is what was missing, but for blanks at its end."""
    return answer.text is not None and answer.text.rstrip() == item.missing.rstrip()


def similarity(text: str, missing: str) -> float:
    """Share of characters that two texts have in common, in order: 0 to 1."""
    return difflib.SequenceMatcher(None, text, missing, autojunk=False).ratio()


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score: sound for few items and near 0 and 1.

    Args:
        hits: of `count` items, which are at least one.
    """
    share, z2 = hits / count, _Z * _Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def _share(flags: Sequence[bool]) -> float | None:
    return round(sum(flags) / len(flags), 4) if flags else None


def _p90(values: Sequence[float]) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=10, method="inclusive")[8]
