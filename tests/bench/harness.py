"""Time an operation on the model's real shapes: one JSON line per case, or none when tests fail.

A bench file gives `cases()` and ends in `main(__file__, cases)`.

    python tests/bench/bench_<op>.py [--impl gpu|reference] [--base <git ref>] [--no-tests]

On a GPU a case is captured into a CUDA graph and replayed; the level-2 cache is flushed before
every replay. On a CPU the wall clock is read, and the numbers are only good for a comparison.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 5
REPEATS = 50
FLUSH_BYTES = 256 * 2**20
# Bytes that a device's memory moves, and dense bf16 multiplications and additions that its tensor
# cores do in a second, at best; source: vendors' data sheets.
PEAKS = {
    "H200": (4.8e12, 989e12),
    "H100": (3.35e12, 989e12),
    "A100": (2.0e12, 312e12),
    "RTX 5090": (1.79e12, 209e12),
    "RTX 4090": (1.01e12, 165e12),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to time.

    Attributes:
        name: shape and variant, readable.
        moved_bytes: what the operation must read and write at least.
        run: called with no argument; does the operation once.
        operations: multiplications and additions that it must do on tensor cores.
    """

    name: str
    moved_bytes: int
    run: Callable[[], Any]
    operations: int = 0


Cases = Callable[[str, str], Iterator[Case]]


def main(file: str, cases: Cases, arguments: Sequence[str] | None = None) -> int:
    """Test, time and print; returns the exit status."""
    operation = Path(file).stem.removeprefix("bench_")
    parser = argparse.ArgumentParser(description=f"time {operation}")
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--impl", choices=["gpu", "reference"])
    parser.add_argument("--base", metavar="REF", help="time this commit too, in a worktree")
    parser.add_argument("--no-tests", action="store_true", help="the tests have just been run")
    chosen = parser.parse_args(arguments)
    impl = chosen.impl or ("gpu" if on_gpu else "reference")
    if not chosen.no_tests and (status := _run_tests(operation)):
        sys.stderr.write(f"{operation}: its tests fail, no number is printed\n")
        return status
    device = "cuda" if on_gpu else "cpu"
    for case in cases(device, impl):
        sys.stdout.write(json.dumps(timed(operation, impl, device, case)) + "\n")
        sys.stdout.flush()
    return _run_base(file, chosen.base, impl) if chosen.base else 0


def peak_named(name: str) -> tuple[float, float] | None:
    """Bytes and operations a second of a device with this name; None where they are not known."""
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def timed(operation: str, impl: str, device: str, case: Case) -> dict[str, Any]:
    """Time a case: the line that is printed."""
    times_us = sorted(_time_gpu(case) if device == "cuda" else _time_cpu(case))
    cuts = statistics.quantiles(times_us, n=10)
    median = statistics.median(times_us)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    peak = peak_named(name)
    floor_us = None
    if peak is not None:
        floor_us = 1e6 * max(case.moved_bytes / peak[0], case.operations / peak[1])
    return {
        "op": operation,
        "impl": impl,
        "case": case.name,
        "us": round(median, 2),
        "p20_us": round(cuts[1], 2),
        "p80_us": round(cuts[7], 2),
        "gb_per_s": round(case.moved_bytes / median / 1e3, 3),
        "floor_us": round(floor_us, 2) if floor_us else None,
        "of_roofline": round(floor_us / median, 4) if floor_us else None,
        "device": name,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit_of(Path(sys.argv[0]).resolve().parent),
        "graph": device == "cuda",
        "l2_flushed": device == "cuda",
    }


def _time_cpu(case: Case) -> list[float]:
    for _ in range(WARM_UP):
        case.run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        case.run()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def _time_gpu(case: Case) -> list[float]:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            case.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def _run_tests(operation: str) -> int:
    test = ROOT / f"tests/kernels/test_{operation}.py"
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", str(test)]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode


def _run_base(file: str, ref: str, impl: str) -> int:
    """The same bench in a worktree of another commit, with that commit's kernels."""
    relative = Path(file).resolve().relative_to(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", tree, ref], cwd=ROOT, check=True
        )
        try:
            links = Path(folder) / "path"
            (links / "infilld").mkdir(parents=True)
            for layer in ("kernels", "engine"):
                (links / "infilld" / layer).symlink_to(tree / layer)
            # `infilld` has no __init__, so the path decides; the editable install comes after it.
            env = os.environ | {"PYTHONPATH": str(links)}
            command = [sys.executable, str(tree / relative), "--impl", impl, "--no-tests"]
            return subprocess.run(command, cwd=tree, env=env, check=False).returncode
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


@functools.cache
def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.cache
def commit_of(folder: Path) -> str:
    """What git calls the state of the tree that a folder is in; "unknown" without git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
