"""The numbers of the daemon in Prometheus' text format 0.0.4.

Names, units, HELP and TYPE lines after Prometheus' own rules for naming and exposition; a few
`llamacpp:` names beside ours, because clients of llama.cpp's server read them.
"""

import bisect
import itertools
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infilld.server.jobs import Event
from infilld.server.keeping.outcomes import SUPERSEDED, Outcome

CONTENT_TYPE = "text/plain; version=0.0.4"
BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Labels = Mapping[str, str]
Sample = tuple[str, Labels, float]
"""Ending of the name, labels, value."""


@dataclass(frozen=True)
class Family:
    """A metric and its samples."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Sequence[Sample]


class Metrics:
    """Counts answers since the start, as they come."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, str]] = Counter()
        self._feedback: Counter[str] = Counter()
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._buckets: defaultdict[str, list[int]] = defaultdict(lambda: [0] * (len(BOUNDS_S) + 1))
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def answered(self, outcome: Outcome) -> None:
        """Count it. The histogram has results that were not superseded."""
        self._answers[outcome.kind, outcome.reason] += 1
        used, spent = outcome.usage, outcome.timings
        self._sums["prompt_tokens"] += used.prompt_tokens
        self._sums["cached_tokens"] += used.cached_tokens
        self._sums["text_tokens"] += used.text_tokens
        self._sums["passes"] += used.passes
        self._sums["encode_s"] += spent.encode_ms / 1e3
        self._sums["denoise_s"] += spent.denoise_ms / 1e3
        if outcome.is_failure or outcome.reason == SUPERSEDED:
            return
        seconds = spent.total_ms / 1e3
        self._buckets[outcome.kind][bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self._seconds[outcome.kind] += seconds

    def told(self, job_id: str, event: Event, choice: int, chars: int | None) -> None:
        """Count it."""
        self._feedback[event] += 1

    def families(self, live: Mapping[str, object]) -> Iterator[Family]:
        """Everything, with the numbers of `live`, which are those of `/stats`."""
        yield from self._counted()
        yield from _of_the_moment(live)
        yield from self._for_llama(live)

    def _counted(self) -> Iterator[Family]:
        answers = [
            ("", {"kind": kind, "reason": reason}, count)
            for (kind, reason), count in sorted(self._answers.items())
        ]
        yield _counter("answers", "Jobs that ended, by kind and reason or error code.", answers)
        told = [("", {"event": event}, n) for event, n in sorted(self._feedback.items())]
        yield _counter("feedback", "What clients said of answers, by event.", told)
        yield Family(
            "infilld_answer_duration_seconds",
            "histogram",
            "Time from arrival to the answer, by kind.",
            list(itertools.chain.from_iterable(map(self._histogram, sorted(self._buckets)))),
        )
        for name, text in _SUMS.items():
            yield _counter(name, text, [("", {}, self._sums[name])])

    def _histogram(self, kind: str) -> Iterator[Sample]:
        edges = [*map(str, BOUNDS_S), "+Inf"]
        counts = list(itertools.accumulate(self._buckets[kind]))
        for edge, count in zip(edges, counts, strict=True):
            yield "_bucket", {"kind": kind, "le": edge}, count
        yield "_sum", {"kind": kind}, self._seconds[kind]
        yield "_count", {"kind": kind}, counts[-1]

    def _for_llama(self, live: Mapping[str, object]) -> Iterator[Family]:
        sums = self._sums
        encoded = sums["prompt_tokens"] - sums["cached_tokens"]
        for name, value, text in (
            ("prompt_tokens_total", encoded, "Prompt tokens that were encoded."),
            ("prompt_seconds_total", sums["encode_s"], "Time spent on prompts."),
            ("tokens_predicted_total", sums["text_tokens"], "Tokens of answers."),
            ("tokens_predicted_seconds_total", sums["denoise_s"], "Time spent on canvases."),
            ("requests_processing", live.get("running"), "Jobs that run."),
            ("requests_deferred", live.get("queued"), "Jobs that wait."),
        ):
            if isinstance(value, (int, float)):
                kind = _kind(name)
                yield Family(f"llamacpp:{name}", kind, text, [("", {}, value)])


_SUMS = {
    "prompt_tokens": "Tokens of prompts, those found in the cache too.",
    "cached_tokens": "Tokens of prompts that were found in the cache.",
    "text_tokens": "Tokens of the best answers.",
    "passes": "Forward passes over canvases that answers asked for.",
}
# Of the worker's numbers: name here and help. A worker need not have all.
_LIVE = {
    "uptime_s": ("uptime_seconds", "Time since the daemon started."),
    "live_jobs": ("live_jobs", "Jobs whose clients wait."),
    "queued": ("queued_jobs", "Jobs that have not begun."),
    "running": ("running_jobs", "Jobs that share the device."),
    "memory_bytes": ("model_memory_bytes", "Bytes of the loaded model; 0 when unloaded."),
    "loads": ("model_loads_total", "How often a model was loaded."),
    "last_load_s": ("model_load_seconds", "How long the last load took."),
    "rounds": ("rounds_total", "Passes that were run, for one job or several."),
    "prefetches": ("prefetches_total", "Jobs begun ahead of a request."),
    "dropped": ("statistics_dropped_total", "Records that could not be written."),
}


def _of_the_moment(live: Mapping[str, object]) -> Iterator[Family]:
    about = {key: str(live[key]) for key in ("version", "model", "device") if live.get(key)}
    yield Family("infilld_info", "gauge", "What runs, in labels.", [("", about, 1)])
    is_loaded = live.get("state") == "ready"
    yield Family("infilld_model_loaded", "gauge", "1: it is loaded.", [("", {}, is_loaded)])
    for key, (name, text) in _LIVE.items():
        value = live.get(key)
        if isinstance(value, (int, float)):
            yield Family(f"infilld_{name}", _kind(name), text, [("", {}, value)])
    resident = resident_bytes()
    if resident is not None:
        text = "Resident memory of the process."
        yield Family("process_resident_memory_bytes", "gauge", text, [("", {}, resident)])


def exposition(families: Iterable[Family]) -> str:
    """The text of the format: HELP and TYPE before each family's samples, LF after every line."""
    lines: list[str] = []
    for family in families:
        text = family.help.replace("\\", "\\\\").replace("\n", "\\n")
        lines += [f"# HELP {family.name} {text}", f"# TYPE {family.name} {family.type}"]
        for ending, labels, value in family.samples:
            pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
            shown = value if isinstance(value, float) else int(value)
            lines.append(f"{family.name}{ending}{f'{{{pairs}}}' if pairs else ''} {shown}")
    return "\n".join(lines) + "\n"


def resident_bytes(pid: int | str = "self") -> int | None:
    """Memory that a process holds; None where it cannot be known. Source: proc(5), statm."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _kind(name: str) -> Literal["counter", "gauge"]:
    return "counter" if name.endswith("_total") else "gauge"


def _counter(name: str, text: str, samples: Sequence[Sample]) -> Family:
    return Family(f"infilld_{name}_total", "counter", text, samples)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
