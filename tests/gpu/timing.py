"""Times of what runs on a device, or on a CPU where there is none."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Milliseconds of repeated runs."""

    ms: float
    p20_ms: float
    p80_ms: float
    runs: int

    @classmethod
    def of(cls, times_ms: list[float]) -> "Times":
        """Median and quantiles of at least one time."""
        times_ms = times_ms * 2 if len(times_ms) == 1 else times_ms
        cuts = statistics.quantiles(times_ms, n=10, method="inclusive")
        return cls(
            round(statistics.median(times_ms), 4),
            round(cuts[1], 4),
            round(cuts[7], 4),
            len(times_ms),
        )


def is_cuda(device: torch.device) -> bool:
    """Whether the device computes behind the host's back."""
    return device.type == "cuda"


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def steady(
    run: Callable[[], object],
    device: torch.device,
    *,
    repeats: int = 30,
    warm_up: int = 3,
    budget_s: float = 1.5,
) -> Times:
    """Times of runs one after the other, without waiting between them.

    Args:
        run: does the thing once. device: where it does.
        repeats: at most; fewer, but no fewer than 5, where they would take longer than `budget_s`.
        warm_up: runs that do not count.
    """
    for _ in range(warm_up):
        run()
    finish(device)
    started = time.perf_counter()
    run()
    finish(device)
    one_s = time.perf_counter() - started
    repeats = max(min(5, repeats), min(repeats, int(budget_s / max(one_s, 1e-6))))
    if not is_cuda(device):
        return walls(run, device, repeats=repeats, warm_up=0)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    finish(device)
    return Times.of([a.elapsed_time(b) for a, b in itertools.pairwise(marks)])


def walls(
    run: Callable[[], object],
    device: torch.device,
    *,
    repeats: int,
    warm_up: int = 2,
    waits: bool = True,
) -> Times:
    """Times by the clock on the wall, the device idle before each run.

    Args:
        waits: whether a run ends when the device is done, or when its call returns.
    """
    times = []
    for index in range(warm_up + repeats):
        finish(device)
        started = time.perf_counter()
        run()
        if waits:
            finish(device)
        if index >= warm_up:
            times.append(1e3 * (time.perf_counter() - started))
    finish(device)
    return Times.of(times)
