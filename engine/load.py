"""Several editors at once: how many answers a second, and how late after their deadlines.

Each client has a document of its own and asks again as soon as it is answered: at another place,
or with a few characters typed behind the place before.
"""

import random
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infilld.engine.request import InfillRequest, InfillResult, Span
from infilld.engine.worker import Worker

CLIENTS = (1, 4, 8)
DEADLINES_MS = (50, 500)
_ANSWER_S = 60.0
_LOAD_S = 600.0

# Made up; long enough to fill a prompt.
_FUNCTION = """
def {name}_{n}(items, rate):
    total = {n}
    for item in items:
        total += item.{name} * rate
    return total

"""
_NAMES = ("price", "weight", "height", "count", "speed", "distance", "volume", "age")


class _Answered:
    """When a future was resolved, as seen on the thread that did."""

    def __init__(self) -> None:
        self._at = 0.0
        self._is_noted = threading.Event()

    def note(self, _: "Future[InfillResult]") -> None:
        """Called back by the future."""
        self._at = time.monotonic()
        self._is_noted.set()

    def at(self) -> float:
        """`time.monotonic()` reading; waits for it."""
        self._is_noted.wait(_ANSWER_S)
        return self._at


@dataclass
class _Client:
    """One editor: its document, which no measurement had before, and what came of its requests."""

    number: int
    measurement: str
    with_deadlines: bool
    late_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Write the document."""
        name = _NAMES[self.number % len(_NAMES)]
        self._text = "".join(_FUNCTION.format(name=name, n=n) for n in range(12))
        self._draws = random.Random(f"{self.measurement} {self.number}")
        self._at: int | None = None

    def run(self, worker: Worker, until: float) -> None:
        """Ask once, and until then."""
        while not self.total_ms or time.monotonic() < until:
            request = self._next()
            answered = _Answered()
            job = worker.submit(request)
            job.future.add_done_callback(answered.note)
            result = job.future.result(_ANSWER_S)
            at = answered.at()
            self.reasons[result.reason] += 1
            self.total_ms.append(1e3 * (at - job.arrived_at))
            if job.deadline_at is not None:
                self.late_ms.append(1e3 * (at - job.deadline_at))

    def _next(self) -> InfillRequest:
        place = self._text.index("\n", self._draws.randrange(len(self._text) - 1))
        if self._at is None or self._draws.random() < 0.5:
            self._at = place
        else:
            typed = self._draws.choice(["x", "it", "total", " = ", "("])
            self._text = self._text[: self._at] + typed + self._text[self._at :]
            self._at += len(typed)
        return InfillRequest(
            text=self._text,
            spans=(Span(self._at, self._at),),
            document=f"{self.measurement} {self.number}",
            path="bench.py",
            deadline_ms=self._draws.uniform(*DEADLINES_MS) if self.with_deadlines else None,
            seed=0,
        )


def run_load(folder: Path | None, device: str = "auto", *, seconds: float = 5.0) -> dict[str, Any]:
    """Measure a worker under load.

    Args:
        folder: checkpoint; None: the starter. device: as for the daemon.
        seconds: of each measurement.

    Returns:
        `throughput`: answers a second, with jobs side by side and one by one. `deadlines`: how
        late answers were after deadlines drawn from `DEADLINES_MS`, ms, negative when before; and
        the share that was late by less than a pass.
    """
    throughput, deadlines = [], []
    for max_live in (4, 1):
        worker = Worker(folder, device=device, max_live=max_live)
        worker.start()
        try:
            worker.wait_ready(_LOAD_S)
            # What is slow only once does not count.
            _run(worker, 2, seconds / 2, with_deadlines=False)
            for clients in CLIENTS:
                throughput.append(_throughput(worker, clients, max_live, seconds))
                if max_live > 1:
                    deadlines.append(_lateness(worker, clients, seconds))
        finally:
            worker.close()
    return {"throughput": throughput, "deadlines": deadlines}


def format_load(report: dict[str, Any]) -> str:
    """The report of `run_load` as two tables for the terminal."""
    lines = ["clients at once   side by side   answers/s   p50 ms   passes shared by"]
    for row in report["throughput"]:
        shared = row["passes_per_round"] or 0.0
        lines.append(
            f"{row['clients']:>15}{row['side_by_side']:>15}{row['answers_per_s']:>12.2f}"
            f"{row['p50_ms']:>9.1f}{shared:>19.2f}"
        )
    lines += [
        "",
        "clients at once   answers   ms after the deadline: p50   p99   pass   within one",
    ]
    for row in report["deadlines"]:
        lines.append(
            f"{row['clients']:>15}{row['answers']:>10}{row['late_p50_ms']:>29.1f}"
            f"{row['late_p99_ms']:>6.1f}{row['pass_p50_ms']:>7.1f}{row['within_a_pass']:>13.1%}"
        )
    return "\n".join(lines)


def _run(worker: Worker, count: int, seconds: float, *, with_deadlines: bool) -> list[_Client]:
    measurement = f"{count} {with_deadlines} {seconds}"
    clients = [_Client(number, measurement, with_deadlines) for number in range(count)]
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=each.run, args=(worker, until)) for each in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients


def _throughput(worker: Worker, clients: int, max_live: int, seconds: float) -> dict[str, Any]:
    began, before = time.monotonic(), worker.stats()
    done = _run(worker, clients, seconds, with_deadlines=False)
    taken, after = time.monotonic() - began, worker.stats()
    times = [ms for each in done for ms in each.total_ms]
    passes = int(str(after["passes"])) - int(str(before["passes"]))
    rounds = int(str(after["rounds"])) - int(str(before["rounds"]))
    return {
        "clients": clients,
        "side_by_side": max_live,
        "answers_per_s": round(len(times) / taken, 2),
        "p50_ms": round(statistics.median(times), 1),
        "passes_per_round": round(passes / rounds, 2) if rounds else None,
    }


def _lateness(worker: Worker, clients: int, seconds: float) -> dict[str, Any]:
    done = _run(worker, clients, seconds, with_deadlines=True)
    late = sorted(ms for each in done for ms in each.late_ms)
    pass_ms = float(str(worker.stats()["pass_p50_ms"]))
    return {
        "clients": clients,
        "answers": len(late),
        "late_p50_ms": round(statistics.median(late), 1),
        "late_p99_ms": round(late[min(len(late) - 1, int(0.99 * len(late)))], 1),
        "late_max_ms": round(late[-1], 1),
        "pass_p50_ms": round(pass_ms, 1),
        "within_a_pass": round(sum(ms <= pass_ms for ms in late) / len(late), 4),
        "reasons": dict(sum((each.reasons for each in done), Counter[str]())),
    }
