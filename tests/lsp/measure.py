"""Measures the bridge: `python tests/lsp/measure.py` prints one JSON line.

start_ms: from starting the process to the reply to `initialize`. ready_ms: until a running daemon
is found as well. round_trip_ms: inline completion through the bridge and the real server, with a
scripted worker that answers at once; change_ms: the same, behind a change of one character.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from fake_editor import FakeEditor
from fake_worker import FakeWorker, Script
from live_server import live_server

STARTS, REQUESTS = 10, 200
URI = "file:///measured.py"


def measure_starts(home: Path, state: Path) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {"start_ms": [], "ready_ms": []}
    for _ in range(STARTS):
        began = time.perf_counter()
        with FakeEditor(home, state_dir=state, options={"startDaemon": False}) as editor:
            editor.initialize()
            took["start_ms"].append((time.perf_counter() - began) * 1000)
            editor.wait_state("ready")
            took["ready_ms"].append((time.perf_counter() - began) * 1000)
    return took


def measure_requests(home: Path, state: Path, lines: int) -> dict[str, list[float]]:
    took: dict[str, list[float]] = {f"round_trip_ms_{lines}": [], f"change_ms_{lines}": []}
    options = {"startDaemon": False, "automaticDeadlineMs": 20_000}
    with FakeEditor(home, state_dir=state, options=options) as editor:
        editor.initialize()
        editor.wait_state("ready")
        editor.open(URI, "x = some_function(argument, 1)\n" * lines)
        for name, is_changed in zip(took, (False, True), strict=True):
            for number in range(REQUESTS):
                began = time.perf_counter()
                if is_changed:
                    editor.insert(URI, number + 2, lines // 2, 0, "y")
                assert editor.items(URI, lines // 2, 4)
                took[name].append((time.perf_counter() - began) * 1000)
    return took


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home, state = Path(folder), Path(folder) / "state"
        with live_server(state, FakeWorker(Script(drafts=()))):
            took = measure_starts(home, state)
            took |= measure_requests(home, state, 500) | measure_requests(home, state, 20_000)
    report = {
        name: {
            "p50": round(statistics.median(values), 1),
            "p95": round(statistics.quantiles(values, n=20)[-1], 1),
        }
        for name, values in took.items()
    }
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
