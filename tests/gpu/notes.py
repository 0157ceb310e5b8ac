"""What a section of the report notes down while it runs, line by line, so that nothing is lost.

A section runs in a process of its own, because an error on the device spoils the process it
happens in. What it measured stands in a file by then. Started again, it goes on behind the step
that it died in.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Exit status of a section whose device answers no more: it may be started again.
SPOILED = 3


class Notes:
    """One section's lines in the file that all sections share.

    Attributes:
        path: of the file. section: whose lines these are.

    Args:
        until: `time.time()` reading at which the section is ended.
    """

    def __init__(self, path: Path, section: str, until: float) -> None:
        self.path, self.section, self._until = path, section, until
        lines = read_lines(path)
        own = [line for line in lines if line["section"] == section]
        self._begun = {line["step"] for line in own if line.get("state") == "begun"}

    @property
    def left_s(self) -> float:
        """Seconds until the section is ended."""
        return self._until - time.time()

    def row(self, table: str, **values: Any) -> None:
        """Add a row to one of the section's tables."""
        self._write({"table": table, "row": values})

    def run(self, step: str, measure: Callable[[], object], *, needs_s: float = 2.0) -> bool:
        """Run a step unless it was begun before or the time left is too short.

        A step that fails is noted and ends nothing, except where the device is lost with it.

        Returns:
            Whether it ran to its end, now or before.
        """
        if step in self._begun:
            return True
        if self.left_s < needs_s:
            self._write({"step": step, "state": "no time"})
            return False
        self._begun.add(step)
        self._write({"step": step, "state": "begun"})
        started = time.perf_counter()
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            self._write({"step": step, "state": "failed", "error": told(error)})
            if is_device_lost():
                raise SystemExit(SPOILED) from None
            return False
        seconds = round(time.perf_counter() - started, 2)
        self._write({"step": step, "state": "done", "seconds": seconds})
        return True

    def crash(self, error: str) -> None:
        """The section ends here, with this error."""
        self._write({"crash": error})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"section": self.section, **line}) + "\n")


def told(error: BaseException) -> str:
    """Type, message and place of an error, in one short line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}{place}"


def is_device_lost() -> bool:
    """Whether CUDA refuses everything that follows in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception:
        return True
    return False


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines so far; one that was cut off is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def gathered(lines: list[dict[str, Any]], section: str) -> dict[str, Any]:
    """A section's steps with their states, and its tables."""
    steps: dict[str, dict[str, Any]] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["section"] != section:
            continue
        if "table" in line:
            tables.setdefault(line["table"], []).append(line["row"])
        elif "step" in line:
            named = ("state", "error", "seconds")
            steps[line["step"]] = {key: line[key] for key in named if key in line}
    return {"steps": steps, "tables": tables}
