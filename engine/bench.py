"""How fast this machine is: encode, one pass, one infill. Every figure is measured when asked."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from infilld.engine.infill import Infiller
from infilld.engine.load import format_load, run_load
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Ask
from infilld.engine.request import InfillRequest, Span
from infilld.engine.worker import load_infiller

_PROMPT_TOKENS = (64, 256, 1024)
_CANVAS_TOKENS = (16, 32, 64, 128, 256)

# Made up for the bench; long enough to fill a prompt.
_FUNCTION = '''
def total_{n}(items, rate):
    """Sum of the prices of items, with tax."""
    subtotal = 0
    for item in items:
        subtotal += item.price * item.count
    return round(subtotal * (1 + rate), 2)

'''


def run_bench(
    folder: Path, device: str = "auto", *, repeats: int = 15, load_s: float = 0.0
) -> dict[str, Any]:
    """Measure a checkpoint on a device.

    Args:
        folder: checkpoint. device: as for the daemon.
        repeats: runs of each measurement, after two that do not count.
        load_s: seconds for which several clients ask at once, in each measurement of `load`; 0:
            that is not measured.

    Returns:
        A report for `format_bench`, or to be written as JSON: times in milliseconds as p10, p50
        and p99 of the repeats, with what they were measured on.
    """
    started = time.perf_counter()
    engine = load_infiller(folder, device)
    load_ms = 1e3 * (time.perf_counter() - started)
    return {
        "model": str(folder.name),
        "parameters": engine.model.parameter_count,
        "machine": machine_facts(engine),
        "load_ms": round(load_ms, 1),
        "encode": [_encode(engine, n, repeats) for n in _prompt_sizes(engine)],
        "pass": [_pass(engine, n, repeats) for n in _canvas_sizes(engine)],
        "infill": _infill(engine, repeats),
        "load": run_load(folder, device, seconds=load_s) if load_s else None,
        "load_average_after": os.getloadavg()[0],
    }


def format_bench(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    machine = report["machine"]
    lines = [
        f"{report['model']}: {report['parameters'] / 1e6:.1f} M parameters, {machine['dtype']} "
        f"on {machine['device']} ({machine['name']}), loaded in {report['load_ms']:.0f} ms",
        f"torch {machine['torch']}, {machine['threads']} threads, load average "
        f"{machine['load_average']:.2f} before and {report['load_average_after']:.2f} after",
        "",
        f"{'':<28}{'p10':>9}{'p50':>9}{'p99':>9}  ms",
    ]
    lines += [_line(f"encode {row['tokens']} tokens", row["ms"]) for row in report["encode"]]
    lines += [_line(f"pass over {row['tokens']} positions", row["ms"]) for row in report["pass"]]
    for name, row in report["infill"].items():
        lines.append(_line(f"infill, {name} prefix", row["ms"]))
        lines.append(f"{'  passes, mean':<28}{row['passes']:>18.1f}")
    if report["load"] is not None:
        lines += ["", format_load(report["load"])]
    return "\n".join(lines)


def _line(name: str, ms: dict[str, float]) -> str:
    return f"{name:<28}{ms['p10']:>9.2f}{ms['p50']:>9.2f}{ms['p99']:>9.2f}"


def machine_facts(engine: Infiller) -> dict[str, Any]:
    """What times depend on beside the model: device, type of the weights, versions, load."""
    device = engine.model.device
    cuda = device.type == "cuda"
    return {
        "device": str(device),
        "name": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "torch": version("torch"),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_average": os.getloadavg()[0],
    }


def _prompt_sizes(engine: Infiller) -> list[int]:
    return sorted({min(n, engine.prompt_tokens) for n in _PROMPT_TOKENS})


def _canvas_sizes(engine: Infiller) -> list[int]:
    longest = engine.model.config.canvas_tokens
    return sorted({min(n, longest) for n in _CANVAS_TOKENS})


def _timed(engine: Infiller, run: Callable[[], object], repeats: int) -> dict[str, float]:
    times = []
    for index in range(repeats + 2):
        started = time.perf_counter()
        run()
        if engine.model.device.type == "cuda":
            torch.cuda.synchronize(engine.model.device)
        if index >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    return centiles(times)


def centiles(times_ms: list[float]) -> dict[str, float]:
    """p10, p50 and p99 of at least one time, rounded to a hundredth."""
    if len(times_ms) == 1:
        times_ms = times_ms * 2
    cut = statistics.quantiles(times_ms, n=100, method="inclusive")
    return {"p10": round(cut[9], 2), "p50": round(cut[49], 2), "p99": round(cut[98], 2)}


def _encode(engine: Infiller, tokens: int, repeats: int) -> dict[str, Any]:
    ids = _ids(engine, tokens)
    run = lambda: engine.model.encode(ids, engine.model.new_cache())  # noqa: E731
    return {"tokens": tokens, "ms": _timed(engine, run, repeats)}


def _pass(engine: Infiller, tokens: int, repeats: int) -> dict[str, Any]:
    cache = engine.model.new_cache()
    engine.model.encode(_ids(engine, min(256, engine.prompt_tokens)), cache)
    canvas = _ids(engine, tokens)[None]
    # With a belief: every pass but the first carries one.
    ask = Ask(temperature=torch.tensor(0.8), top=engine.model.belief_tokens)
    (first,) = engine.model.run([CanvasPass(canvas, cache, None, ask)])
    told = CanvasPass(canvas, cache, first.belief, ask)
    run = lambda: engine.model.run([told])  # noqa: E731
    return {"tokens": tokens, "ms": _timed(engine, run, repeats)}


def _infill(engine: Infiller, repeats: int) -> dict[str, Any]:
    if engine.controls is None:
        return {}
    text = "".join(_FUNCTION.format(n=n) for n in range(8))
    at = text.index("item.price", len(text) // 2)
    cold: list[float] = []
    warm: list[float] = []
    passes: list[int] = []
    request = InfillRequest(text=text, spans=(Span(at, at + 10),), seed=0)
    for _ in range(repeats):
        engine.forget()
        for times in (cold, warm):
            began = time.perf_counter()
            result = engine.infill(request)
            times.append(1e3 * (time.perf_counter() - began))
            passes.append(result.usage.passes)
    mean = statistics.mean(passes)
    return {
        "cold": {"ms": centiles(cold), "passes": mean},
        "warm": {"ms": centiles(warm), "passes": mean},
    }


def _ids(engine: Infiller, tokens: int) -> torch.Tensor:
    return torch.arange(tokens, device=engine.model.device) % engine.model.config.vocab_tokens
