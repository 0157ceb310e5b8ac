"""How fast this machine is: encode, one pass, one infill. Every figure is measured when asked."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from infilld.engine.evaluation.comparison import compare, format_comparison
from infilld.engine.infill import Infiller
from infilld.engine.load import format_load, run_load
from infilld.engine.loading import free_memory
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Ask
from infilld.engine.request import InfillRequest, Span
from infilld.engine.timing import centiles, in_turn
from infilld.engine.worker import load_infiller
from infilld.kernels.cpu.packed import fastest

_PROMPT_TOKENS = (64, 256, 1024)
_CANVAS_TOKENS = (16, 32, 64, 128, 256)
# How often being alone and having a busy neighbour take turns.
_TURNS = 4

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
    folder: Path,
    device: str = "auto",
    *,
    repeats: int = 15,
    load_s: float = 0.0,
    compares: bool = False,
    is_busy: bool = False,
) -> dict[str, Any]:
    """Measure a checkpoint on a device.

    Args:
        folder: checkpoint. device: as for the daemon.
        repeats: runs of each measurement, after two that do not count.
        load_s: seconds for which several clients ask at once, in each measurement of `load`; 0:
            that is not measured.
        compares: also time `transformers` on the checkpoint, run by run in turn.
        is_busy: also time passes beside a process that keeps one core busy.

    Returns:
        A report for `format_bench`, or to be written as JSON: times in milliseconds as p10, p50
        and p99 of the repeats, with what they were measured on.
    """
    started = time.perf_counter()
    engine = load_infiller(folder, device)
    load_ms = 1e3 * (time.perf_counter() - started)
    report = {
        "model": str(folder.name),
        "parameters": engine.model.parameter_count,
        "machine": machine_facts(engine),
        "load_ms": round(load_ms, 1),
        "encode": [_encode(engine, n, repeats) for n in _prompt_sizes(engine)],
        "pass": [_pass(engine, n, repeats) for n in _canvas_sizes(engine)],
        "infill": _infill(engine, repeats),
        "compared": compare(engine, folder, repeats) if compares else None,
        "busy": _busy(engine, repeats) if is_busy else None,
    }
    # The load has a worker of its own; two models may not fit the device.
    del engine
    free_memory()
    return {
        **report,
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
    if report["busy"] is not None:
        lines += ["", "beside a process that keeps one core busy, in turn with being alone"]
        for row in report["busy"]:
            names = ("alone", "beside")
            lines += [_line(f"pass over {row['tokens']}, {name}", row[name]) for name in names]
    if report["compared"] is not None:
        lines += ["", format_comparison(report["compared"])]
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
        # Which layout of weights is multiplied fastest here, float32 or what loses nothing to it.
        "products": None if cuda else list(fastest(torch.float32)),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT", "default"),
        "load_average": os.getloadavg()[0],
    }


def _prompt_sizes(engine: Infiller) -> list[int]:
    return sorted({min(n, engine.prompt_tokens) for n in _PROMPT_TOKENS})


def _canvas_sizes(engine: Infiller) -> list[int]:
    longest = engine.model.config.canvas_tokens
    return sorted({min(n, longest) for n in _CANVAS_TOKENS})


def _timed(engine: Infiller, run: Callable[[], object], repeats: int) -> dict[str, float]:
    return centiles(in_turn({"": run}, repeats + 2, engine.model.device)[""][2:])


def _encode(engine: Infiller, tokens: int, repeats: int) -> dict[str, Any]:
    ids = _ids(engine, tokens)
    run = lambda: engine.model.encode(ids, engine.model.new_cache())  # noqa: E731
    return {"tokens": tokens, "ms": _timed(engine, run, repeats)}


def _pass(engine: Infiller, tokens: int, repeats: int) -> dict[str, Any]:
    return {"tokens": tokens, "ms": _timed(engine, _canvas_pass(engine, tokens), repeats)}


def _canvas_pass(engine: Infiller, tokens: int) -> Callable[[], object]:
    """A pass over a canvas behind a prefix, to be run any number of times."""
    cache = engine.model.new_cache()
    engine.model.encode(_ids(engine, min(256, engine.prompt_tokens)), cache)
    canvas = _ids(engine, tokens)[None]
    # With a belief: every pass but the first carries one.
    ask = Ask(temperature=torch.tensor(0.8), top=engine.model.belief_tokens)
    (first,) = engine.model.run([CanvasPass(canvas, cache, None, ask)])
    told = CanvasPass(canvas, cache, first.belief, ask)
    return lambda: engine.model.run([told])


def _busy(engine: Infiller, repeats: int) -> list[dict[str, Any]]:
    """Passes alone and beside a busy process, by turns: what else runs here meets both alike."""
    rows = []
    for tokens in _canvas_sizes(engine):
        run = {"": _canvas_pass(engine, tokens)}
        alone, beside = list[float](), list[float]()
        for _ in range(_TURNS):
            alone += in_turn(run, repeats, engine.model.device)[""]
            with _busy_process():
                beside += in_turn(run, repeats, engine.model.device)[""]
        rows.append({"tokens": tokens, "alone": centiles(alone), "beside": centiles(beside)})
        # It holds a prefix, and a GPU with little memory has room for one.
        del run
    return rows


@contextmanager
def _busy_process() -> Iterator[None]:
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it runs
        try:
            yield
        finally:
            process.kill()


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
    engine.forget()
    mean = statistics.mean(passes)
    return {
        "cold": {"ms": centiles(cold), "passes": mean},
        "warm": {"ms": centiles(warm), "passes": mean},
    }


def _ids(engine: Infiller, tokens: int) -> torch.Tensor:
    return torch.arange(tokens, device=engine.model.device) % engine.model.config.vocab_tokens
