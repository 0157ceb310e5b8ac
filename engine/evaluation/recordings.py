"""Typing as it happens: one document, a request at every pause, on an engine that stays warm.

A recording is a line of a held-out file typed behind its indent, with the rest of the file around
it: single characters, now and then a wrong one that is taken back, pauses after every few. Nobody
waits for a pause to end: what counts is which requests come, and in which order.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from infilld.engine.errors import RequestError
from infilld.engine.evaluation.contenders import switched
from infilld.engine.evaluation.items import Item, cut_items
from infilld.engine.evaluation.measures import p90
from infilld.engine.evaluation.names import SWITCHES
from infilld.engine.infill import Infiller
from infilld.engine.request import InfillRequest, Span
from infilld.engine.training.corpus import SourceFile

KIND = "typing"
# Shorter lines are over before anything can be suggested, longer ones are met seldom.
_FEWEST_CHARS, _MOST_CHARS = 12, 60
# Keys between two pauses, at most, and how often one is wrong.
_MOST_BURST = 3
_TYPO_SHARE = 0.05
_WRONG_KEYS = "abcdefghijklmnopqrstuvwxyz"
# Lines looked at for one recording.
_TRIES = 50


@dataclass(frozen=True)
class Keystroke:
    """The line after a key was pressed, and whether a pause follows."""

    typed: str
    is_pause: bool


@dataclass(frozen=True)
class Recording:
    """A line being typed: the document around it, the line at last, and every key."""

    before: str
    line: str
    after: str
    keys: tuple[Keystroke, ...]

    @property
    def pauses(self) -> list[str]:
        """What stands on the line at every pause, the first one before any key."""
        return ["", *(key.typed for key in self.keys if key.is_pause)]


@dataclass(frozen=True)
class Asked:
    """One request of a recording, and its answer.

    Attributes:
        typed: what stood on the line. shown: text; empty: none. passes: of the model.
        cached: tokens of the prompt that were encoded before. ms: up to the answer.
    """

    typed: str
    shown: str
    passes: int
    cached: int
    ms: float


def record(item: Item, seed: int) -> Recording:
    """The typing of an item's text; the item and the seed alone decide.

    Args:
        item: a line behind its indent. seed: of bursts and typos.
    """
    rng = random.Random(f"{KIND} {seed} {item.source} {len(item.before)}")
    keys: list[Keystroke] = []
    typed = ""
    burst = rng.randint(1, _MOST_BURST)

    def press(text: str, *, is_noticed: bool = False) -> None:
        nonlocal burst
        burst -= 1
        # Who sees a wrong letter stops at it.
        is_pause = burst <= 0 or is_noticed or text == item.missing
        keys.append(Keystroke(text, is_pause))
        if is_pause:
            burst = rng.randint(1, _MOST_BURST)

    for character in item.missing:
        if character.isalpha() and rng.random() < _TYPO_SHARE:
            wrong = rng.choice([key for key in _WRONG_KEYS if key != character.lower()])
            press(typed + wrong, is_noticed=True)
            press(typed)
        typed += character
        press(typed)
    return Recording(item.before, item.missing, item.after, tuple(keys))


def recordings(files: Sequence[SourceFile], count: int, seed: int) -> list[Recording]:
    """Typings of random lines.

    Args:
        files: held out. count: recordings wanted. seed: chooses lines, and how they are typed.

    Raises:
        RequestError: the files hold too few lines of a usual length.
    """
    found: list[Recording] = []
    for tries in range(1, _TRIES + 1):
        # The draws of a longer list begin with those of a shorter one.
        items = cut_items(files, "line", tries * count, seed)
        usual = [item for item in items if _FEWEST_CHARS <= len(item.missing) <= _MOST_CHARS]
        if len(usual) >= count:
            return [record(item, seed) for item in usual[:count]]
        found = [record(item, seed) for item in usual]
    raise RequestError(
        f"{len(found)} lines of {_FEWEST_CHARS} to {_MOST_CHARS} characters in {len(files)} files, "
        f"{count} are wanted",
        remedy="Give folders with more Python source.",
    )


def replay(engine: Infiller, recording: Recording, document: str, seed: int) -> list[Asked]:
    """Ask at every pause, one request after another; only the first one starts cold.

    Args:
        engine: forgets what it knew, then nothing. recording: of a line.
        document: key of all its requests. seed: of all its requests.
    """
    engine.forget()
    asked: list[Asked] = []
    for typed in recording.pauses:
        at = len(recording.before) + len(typed)
        request = InfillRequest(
            text=recording.before + typed + recording.after,
            spans=(Span(at, at),),
            document=document,
            seed=seed,
        )
        started = time.perf_counter()
        result = engine.infill(request)
        ms = 1e3 * (time.perf_counter() - started)
        is_shown = result.reason == "ok" and bool(result.alternatives)
        shown = result.alternatives[0].spans[0].text if is_shown else ""
        usage = result.usage
        asked.append(Asked(typed, shown, usage.passes, usage.cached_tokens, ms))
    return asked


def measure_typing(
    recordings: Sequence[Recording], answers: Sequence[Sequence[Asked]]
) -> dict[str, Any]:
    """Figures of recordings.

    Where the line has a typo in it, there is no right text: what is shown there is noise.

    Args:
        recordings: at least one. answers: for each the requests that were asked, at least one.

    Returns:
        `requests`; `cold_passes`, `median_passes`, `p90_passes` — a request, first ones apart;
        `cold_ms`, `warm_ms` — medians; `speed_up` — the one by the other;
        `shown` — share of requests that show something; of these `whole` — the rest of the line —
        and `starts` — the rest begins with it; `noise` — share of the requests at a typo;
        `saved` — share of the characters that shown texts would have written rightly.
    """
    cold = [asked[0] for asked in answers]
    warm = [each for asked in answers for each in asked[1:]]
    judged: list[str] = []
    at_typos: list[bool] = []
    saved = chars = 0
    for recording, asked in zip(recordings, answers, strict=True):
        covered: set[int] = set()
        for each in asked:
            if not recording.line.startswith(each.typed):
                at_typos.append(bool(each.shown.strip()))
                continue
            verdict = verdict_on(each.shown, recording.line[len(each.typed) :])
            judged.append(verdict)
            if verdict in ("whole", "starts"):
                start = len(each.typed)
                covered |= set(range(start, start + len(each.shown.rstrip())))
        saved += len(covered)
        chars += len(recording.line)
    shown = len(judged) - judged.count("")
    passes = [each.passes for each in warm or cold]
    cold_ms = statistics.median(each.ms for each in cold)
    warm_ms = statistics.median(each.ms for each in warm or cold)
    return {
        "recordings": len(recordings),
        "requests": len(cold) + len(warm),
        "cold_passes": statistics.median(each.passes for each in cold),
        "median_passes": statistics.median(passes),
        "p90_passes": round(p90(passes), 2),
        "mean_passes": round(statistics.fmean(passes), 2),
        "cold_ms": round(cold_ms, 2),
        "warm_ms": round(warm_ms, 2),
        "p90_ms": round(p90([each.ms for each in warm or cold]), 2),
        "speed_up": round(cold_ms / max(1e-9, warm_ms), 2),
        "shown": round(shown / max(1, len(judged)), 4),
        "whole": round(judged.count("whole") / shown, 4) if shown else None,
        "starts": round((shown - judged.count("wrong")) / shown, 4) if shown else None,
        "noise": round(sum(at_typos) / len(at_typos), 4) if at_typos else None,
        "saved": round(saved / chars, 4),
    }


def verdict_on(shown: str, rest: str) -> str:
    """Of a shown text: "whole", the rest of the line; "starts", a part of it; "wrong"; "", none."""
    text = shown.rstrip()
    if not text:
        return ""
    if text == rest.rstrip():
        return "whole"
    return "starts" if rest.startswith(text) else "wrong"


def run_typing(
    engine: Infiller,
    made: Sequence[Recording],
    seed: int,
    names: Sequence[str] = ("canvas",),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Figures of contenders on the same recordings.

    Args:
        engine: a model that can infill. made: recordings, at least one. seed: of every request.
        names: of contenders; those that are not the engine, or know what nobody knows while a line
            is typed, are left out. say: gets a line for each contender.
    """
    figures: dict[str, dict[str, Any]] = {}
    for name in names:
        if name not in SWITCHES or SWITCHES[name].knows_length:
            continue
        started = time.monotonic()
        own = switched(engine, name)
        answers = [replay(own, each, f"{KIND}-{n}", seed) for n, each in enumerate(made)]
        found = measure_typing(made, answers)
        figures[name] = found
        say(
            f"{KIND}: {name} saves {100 * found['saved']:.1f} % of the characters of {len(made)} "
            f"lines, {found['median_passes']:g} passes a request, "
            f"{time.monotonic() - started:.0f} s"
        )
    return figures
