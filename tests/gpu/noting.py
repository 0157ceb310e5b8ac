"""A pytest plugin that notes every outcome when it is there: a run that is ended loses nothing."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from notes import Notes

_MOST_FAILURES = 12
_counts: Counter[str] = Counter()
_said: list[str] = []


def pytest_runtest_logreport(report: Any) -> None:
    """Count an outcome; the first failures of a file are told in full."""
    if report.when != "call" and report.outcome == "passed":
        return
    outcome = "error" if report.when != "call" and report.failed else report.outcome
    _counts[outcome] += 1
    if not report.failed or len(_said) == _MOST_FAILURES:
        return
    _said.append(report.nodeid)
    crash = getattr(report.longrepr, "reprcrash", None)
    message = crash.message if crash is not None else str(report.longrepr)
    _notes().row(
        "failures",
        test=report.nodeid.rpartition("/")[2],
        said=" ".join(message.split())[:500],
    )


def pytest_sessionfinish(session: Any) -> None:
    """What came of a file."""
    _notes().row(
        "files",
        file=os.environ["GPU_REPORT_TESTED"],
        passed=_counts["passed"],
        failed=_counts["failed"] + _counts["error"],
        skipped=_counts["skipped"],
    )


def _notes() -> Notes:
    return Notes(Path(os.environ["GPU_REPORT_NOTES"]), "tests", 0.0)
