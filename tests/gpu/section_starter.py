"""The embedded model from its checkpoint to finished fills, as the daemon loads it."""

from typing import Any

from notes import Notes
from plan import Machine, Plan

from infilld.engine.bench import run_bench
from infilld.engine.loading import load_infiller, starter_folder
from infilld.engine.request import InfillRequest, Span

_TEXT = "def area(width, height):\n    return \n\nprint(area(2, 3))\n"


def measure(notes: Notes, plan: Plan, machine: Machine) -> None:
    """One fill with its text, then the bench that people run."""
    notes.run("fill", lambda: _fill(notes, machine))
    notes.run("bench", lambda: _bench(notes, plan, machine))


def _fill(notes: Notes, machine: Machine) -> None:
    engine = load_infiller(starter_folder(), machine.device.type)
    at = _TEXT.index("return ") + len("return ")
    request = InfillRequest(text=_TEXT, spans=(Span(at, at),), path="area.py", seed=0)
    for order in ("first", "second"):
        result = engine.infill(request)
        texts = [span.text for each in result.alternatives[:1] for span in each.spans]
        notes.row(
            "fill",
            order=order,
            text=texts[0] if texts else None,
            reason=result.reason,
            passes=result.usage.passes,
            total_ms=round(result.timings.total_ms, 2),
        )


def _bench(notes: Notes, plan: Plan, machine: Machine) -> None:
    found = run_bench(starter_folder(), machine.device.type, repeats=max(1, plan.repeats // 5))
    for kind in ("encode", "pass"):
        for row in found[kind]:
            notes.row("bench", what=kind, tokens=row["tokens"], **_ms(row))
    for name, row in found["infill"].items():
        notes.row("bench", what=f"infill, {name} prefix", **_ms(row), passes=row["passes"])


def _ms(row: dict[str, Any]) -> dict[str, float]:
    return {f"{name}_ms": value for name, value in row["ms"].items()}
