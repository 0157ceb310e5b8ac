"""The kernels' tests, a process for each file: one that spoils its device spoils no other."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from notes import Notes
from plan import Plan

TESTS = Path(__file__).resolve().parents[1]


def measure(notes: Notes, plan: Plan) -> None:
    """All files, a few at a time; every file is a step."""
    paths = sorted((TESTS / "kernels").glob("test_*.py"))
    if plan.test_files:
        paths = [path for path in paths if path.name in plan.test_files]
    side_by_side = max(1, min(8, (os.cpu_count() or 1) // 2))
    # The longest take the longest: they begin first.
    paths.sort(key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(side_by_side) as pool:
        for path in paths:
            # A line of the notes is one short write at the end of the file: none is torn.
            pool.submit(notes.run, path.name, partial(_run, notes, path, plan))


def _run(notes: Notes, path: Path, plan: Plan) -> None:
    # Not the project's options: they name plug-ins that are not everywhere.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-c", os.devnull, "--rootdir"]
    command += [str(TESTS.parent), "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-p", "noting", "--no-header", "--tb=short", str(path)]
    if plan.test_filter:
        command += ["-k", plan.test_filter]
    folders = [str(Path(__file__).parent), str(TESTS / "support"), os.environ.get("PYTHONPATH", "")]
    named = {"GPU_REPORT_NOTES": str(notes.path), "GPU_REPORT_TESTED": path.name}
    done = subprocess.run(
        command,
        check=False,
        timeout=max(1.0, notes.left_s - 1),
        env=os.environ | named | {"PYTHONPATH": os.pathsep.join(filter(None, folders))},
    )
    # 1: tests failed, and they are in the notes.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {done.returncode}")
