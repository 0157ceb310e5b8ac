"""The benches of all operations: each case against the floor of its device."""

import importlib.util
import time
import traceback
from functools import partial
from pathlib import Path
from types import ModuleType

import peaks
from notes import Notes, is_device_lost, told
from plan import Machine, Plan

FOLDER = Path(__file__).resolve().parents[1] / "bench"
# Where a pass spends its time; what only loading does comes last.
_WEIGHTS = {
    "expert_gate_up": 3.0,
    "expert_down": 3.0,
    "linear": 3.0,
    "head": 2.0,
    "canvas_attention": 2.0,
    "prefix_attention": 2.0,
    "dequantize": 0.5,
    "quant_pack": 0.5,
}
_COLUMNS = ("case", "us", "p20_us", "p80_us", "floor_us", "of_roofline", "gb_per_s")


def measure(notes: Notes, plan: Plan, machine: Machine) -> None:
    """Every bench in turn, the weightiest first, each with its share of the time that is left."""
    paths = sorted(FOLDER.glob("bench_*.py"))
    if plan.benches:
        paths = [path for path in paths if path.stem.removeprefix("bench_") in plan.benches]
    paths.sort(key=lambda path: -_weight(path))
    for number, path in enumerate(paths):
        share_s = notes.left_s * _weight(path) / sum(map(_weight, paths[number:]))
        until = time.monotonic() + share_s
        name = path.stem.removeprefix("bench_")
        notes.run(name, partial(_bench, notes, machine, path, name, until))


def _weight(path: Path) -> float:
    return _WEIGHTS.get(path.stem.removeprefix("bench_"), 1.0)


def _bench(notes: Notes, machine: Machine, path: Path, name: str, until: float) -> None:
    module = _loaded(path)
    for case in module.cases(machine.device.type, machine.impl):
        if time.monotonic() > until:
            notes.row("left out", operation=name, behind=case.name)
            break
        try:
            line = peaks.timed(name, machine.impl, machine.device.type, case)
        except Exception as error:
            traceback.print_exc()
            if is_device_lost():
                raise
            notes.row("failures", operation=name, case=case.name, error=told(error))
            continue
        notes.row("cases", operation=name, **{column: line[column] for column in _COLUMNS})


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
