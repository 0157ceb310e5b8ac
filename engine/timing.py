"""Times of what is run again and again."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each run, `repeats` of each, one after the other in turn.

    What else the machine does in the meantime meets all of them alike.

    Args:
        runs: what to run, by name. repeats: of each. device: that a run must be done on.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - started))
    return times


def centiles(times_ms: list[float]) -> dict[str, float]:
    """p10, p50 and p99 of at least one time, rounded to a hundredth."""
    if len(times_ms) == 1:
        times_ms = times_ms * 2
    cut = statistics.quantiles(times_ms, n=100, method="inclusive")
    return {"p10": round(cut[9], 2), "p50": round(cut[49], 2), "p99": round(cut[98], 2)}
