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
from infilld.engine.silence.python import parses

# Standard deviations that hold 95 % of a normal distribution.
_Z = 1.959964


def measure(
    items: Sequence[Item], answers: Sequence[Answer], are_sound: Sequence[bool]
) -> dict[str, Any]:
    """Figures for the answers of one contender.

    An abstention counts as an empty gap, and as wrong where something is missing; `precision` and
    `shown_parse_rate` leave it out. A file that does not parse with its true text says nothing
    about an answer, and counts in no parse rate.

    Args:
        items: at least one. answers: one for each item.
        are_sound: whether each item's file parses with its true text.

    Returns:
        Shares in [0, 1] or None where there is nothing to count, times in milliseconds.
    """
    pairs = list(zip(items, answers, strict=True))
    exact = [is_exact(item, answer) for item, answer in pairs]
    shown = [answer.text is not None for answer in answers]
    # Where nothing is missing, what is exact is not shown.
    right = sum(is_right and is_shown for is_right, is_shown in zip(exact, shown, strict=True))
    is_silent = all(not item.missing for item in items)
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
        "precision": round(right / sum(shown), 4) if any(shown) and not is_silent else None,
        "precision_95": wilson(right, sum(shown)) if any(shown) and not is_silent else None,
        "shown_parse_rate": _share([is_parsed for is_parsed, is_shown in parsed if is_shown]),
        "mean_passes": round(statistics.fmean(answer.passes for answer in answers), 2),
        "median_ms": round(statistics.median(ms), 2),
        "p90_ms": round(p90(ms), 2),
    }


def measure_silence(items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Any]:
    """How often nothing is shown where nothing is missing, and what the noise is elsewhere.

    Args:
        items: at least one, nothing is missing in any. answers: one for each item.

    Returns:
        `silent`, `silent_95` — share that is silent; `noise` — the others; `noise_at` — share of
        noise for each kind of place; `noise_shown` — how often what was shown.
    """
    noises = [
        (place_of(item), "" if is_exact(item, answer) else noise_of(item, answer.text or ""))
        for item, answer in zip(items, answers, strict=True)
    ]
    count = len(noises)
    silent = sum(not noise for _, noise in noises)
    at = {
        place: [bool(noise) for where, noise in noises if where == place]
        for place in dict.fromkeys(where for where, _ in noises)
    }
    return {
        "silent": round(silent / count, 4),
        "silent_95": wilson(silent, count),
        "noise": round(1 - silent / count, 4),
        "noise_at": {place: _share(found) for place, found in sorted(at.items())},
        "noise_shown": dict(Counter(noise for _, noise in noises if noise)),
    }


def place_of(item: Item) -> str:
    """Where a silent item's place is: line_end, blank_line or before_code."""
    if item.after.partition("\n")[0].strip():
        return "before_code"
    return "line_end" if item.before.rpartition("\n")[2].strip() else "blank_line"


def noise_of(item: Item, text: str) -> str:
    """What was shown where nothing is missing: repeats_suffix, lines, word or punctuation."""
    bare = text.strip()
    if item.after.lstrip().startswith(bare):
        return "repeats_suffix"
    if "\n" in bare:
        return "lines"
    return "word" if any(character.isalnum() for character in bare) else "punctuation"


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
    """Whether the answer is what was missing, but for blanks at its end.

    Where nothing was missing, no answer is as right as an empty one.
    """
    if answer.text is None:
        return not item.missing
    return is_exact_text(item, answer.text)


def is_exact_text(item: Item, text: str) -> bool:
    """Whether a text is what was missing, but for blanks at its end."""
    return text.rstrip() == item.missing.rstrip()


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


def p90(values: Sequence[float]) -> float:
    """What a tenth of the values exceed.

    Args:
        values: at least one.
    """
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=10, method="inclusive")[8]
