"""Measure the engine on a GPU, within a time that is given, and leave a report.

    python tests/gpu/report.py --out FOLDER [--minutes 8] [--small] [--forms int4 nvfp4]

Every section runs in a process of its own with a share of the time; what one leaves goes to the
next. `report.json` and `report.md` are written anew after each, so that a run that is ended leaves
what it has. Without a GPU, `--small` measures a tiny model with the operations' references.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from aims import judged
from notes import SPOILED, Notes, gathered, read_lines, told
from tables import as_markdown, as_summary

SCHEMA = "infilld-gpu-report/1"
ROOT = Path(__file__).resolve().parents[2]
# Sections in the order of their worth, with their shares of the time.
SHARES = {
    "facts": 20,
    "tests": 100,
    "model": 175,
    "benches": 100,
    "starter": 30,
    "transformers": 45,
}
# Of weights beside int4, if they are asked for.
EXTRA_FORMS = ("int4-affine", "nvfp4", "plain")
EXTRA_SHARE = 45
# Kept of the time to end what is late and to write the report.
_SPARE_S = 8.0
_GRACE_S = 3.0
_TRIES = 4


@dataclass
class Section:
    """One part of a run and what came of it."""

    name: str
    share: float
    status: str = "not run"
    seconds: float = 0.0
    limit_s: float = 0.0
    error: str | None = None


class Run:
    """All sections of one report.

    Args:
        out: folder that the report is left in. minutes: for all of it.
        arguments: handed on to every section's process.
    """

    def __init__(
        self, out: Path, minutes: float, names: Sequence[str], arguments: list[str]
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._out, self._arguments = out, arguments
        self._until = time.time() + 60 * minutes - _SPARE_S
        self._notes, self._log = out / "notes.jsonl", out / "log.txt"
        for path in (self._notes, self._log):
            path.unlink(missing_ok=True)
        self.sections = [Section(name, SHARES.get(name, EXTRA_SHARE)) for name in names]
        self._made_at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")

    def all(self) -> dict[str, Any]:
        """Run every section; the finished report."""
        self.write(is_finished=False)
        for number, section in enumerate(self.sections):
            later = sum(each.share for each in self.sections[number:])
            left_s = max(0.0, self._until - time.time())
            section.limit_s = round(left_s * section.share / later, 1)
            started = time.time()
            section.status = "begun"
            self._section(section, started + section.limit_s)
            section.seconds = round(time.time() - started, 1)
            self.write(is_finished=False)
            sys.stdout.write(f"{section.name}: {section.status}, {section.seconds} s\n")
            sys.stdout.flush()
        return self.write(is_finished=True)

    def write(self, *, is_finished: bool) -> dict[str, Any]:
        """Write the report as it is now."""
        lines = read_lines(self._notes)
        sections = {}
        for section in self.sections:
            found = gathered(lines, section.name)
            sections[section.name] = {
                "status": section.status,
                "seconds": section.seconds,
                "limit_s": section.limit_s,
                "error": section.error,
                **found,
            }
        facts = sections.get("facts", {}).get("tables", {}).get("facts", [{}])
        report: dict[str, Any] = {
            "schema": SCHEMA,
            "model": "small" if "--small" in self._arguments else "26b",
            "made_at": self._made_at,
            "is_finished": is_finished,
            "facts": facts[0],
            "sections": sections,
        }
        report["aims"] = judged(report)
        _replace(self._out / "report.json", json.dumps(report, indent=1) + "\n")
        _replace(self._out / "report.md", as_markdown(report))
        return report

    def _section(self, section: Section, until: float) -> None:
        """Run a section; again, behind the step it died in, where that helps."""
        for _ in range(_TRIES):
            before = len(read_lines(self._notes))
            status = self._try(section, until)
            said = [line for line in read_lines(self._notes)[before:] if "crash" in line]
            if said:
                section.error = said[-1]["crash"]
            steps = gathered(read_lines(self._notes), section.name)["steps"]
            went_on = any("state" in line for line in read_lines(self._notes)[before:])
            if status is None:
                section.status = "out of time"
                return
            if status == 0:
                is_whole = all(found["state"] == "done" for found in steps.values())
                section.status = "done" if is_whole else "partly"
                return
            section.status = "failed"
            if section.error is None or status not in (1, SPOILED):
                section.error = f"its process ended with status {status}"
            # A second try of the same would end the same.
            if status == 1 or not went_on or until - time.time() < 10:
                return
            section.error = None

    def _try(self, section: Section, until: float) -> int | None:
        """Exit status of a section's process; None: its time was over, and it was ended."""
        command = [sys.executable, str(Path(__file__).resolve()), "--section", section.name]
        command += ["--out", str(self._out), "--until", f"{until:.3f}", *self._arguments]
        with self._log.open("a") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return process.wait(max(0.1, until - time.time()))
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End what a section started, politely first."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)


def _replace(path: Path, text: str) -> None:
    """Write a file so that nobody finds half of it."""
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def run_section(name: str, notes: Notes, *, small: bool) -> None:
    """What a section's process does."""
    import torch
    from plan import FORM_OF_THE_REPORT, Machine, full_plan, small_plan
    from random_model import FORMS

    machine = Machine.found()
    plan = small_plan() if small else full_plan()
    torch.manual_seed(0)
    if name == "facts":
        import section_facts

        section_facts.measure(notes, machine)
    elif name == "tests":
        import section_tests

        section_tests.measure(notes, plan)
    elif name == "benches":
        import section_benches

        section_benches.measure(notes, plan, machine)
    elif name == "starter":
        import section_starter

        section_starter.measure(notes, plan, machine)
    elif name == "transformers":
        import section_transformers

        section_transformers.measure(notes, plan, machine)
    else:
        import section_model

        own = name.removeprefix("model").strip()
        form = next((each for each in FORMS if each == own), FORM_OF_THE_REPORT)
        section_model.measure(notes, plan, machine, form, brief=bool(own))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the report, or one section of it; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--forms", nargs="*", default=[], choices=EXTRA_FORMS, help="beside int4")
    parser.add_argument("--only", nargs="*", help="sections; all, when none is named")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.section:
        notes = Notes(chosen.out / "notes.jsonl", chosen.section, chosen.until)
        try:
            run_section(chosen.section, notes, small=chosen.small)
        except Exception as error:
            traceback.print_exc()
            notes.crash(told(error))
            return 1
        return 0
    if not chosen.small and not _has_gpu():
        sys.stderr.write("no CUDA device here; --small measures a tiny model on the CPU\n")
        return 2
    names = [*SHARES, *(f"model {form}" for form in chosen.forms)]
    if chosen.only:
        names = [name for name in names if name in chosen.only]
    run = Run(chosen.out, chosen.minutes, names, ["--small"] if chosen.small else [])
    signal.signal(signal.SIGTERM, _leave)
    try:
        report = run.all()
    except (KeyboardInterrupt, SystemExit):
        run.write(is_finished=False)
        raise
    sys.stdout.write(as_summary(report))
    return 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    raise SystemExit(main())
