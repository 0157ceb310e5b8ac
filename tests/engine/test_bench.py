"""The bench: every figure is there, its table names them, and nothing it started stays behind."""

import importlib.util
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_infill import tiny_config, tiny_infiller, tiny_model
from tiny_model import Spec, checkpoint, ours

from infilld.engine import bench
from infilld.engine.bench import format_bench, run_bench
from infilld.engine.device_runner import DeviceRunner
from infilld.engine.errors import Unsupported
from infilld.engine.evaluation import comparison, transformers_baseline
from infilld.engine.evaluation.comparison import compare, format_comparison
from infilld.engine.evaluation.transformers_baseline import Baseline, Variant, best_baseline
from infilld.engine.infill import Infiller
from infilld.engine.model import DiffusionGemma
from infilld.engine.runner import Runner
from infilld.engine.timing import centiles, in_turn

SPEC = Spec()
CPU = torch.device("cpu")


class Untokenized:
    """As much of an engine as a comparison needs."""

    prompt_tokens = 24

    def __init__(self) -> None:
        self.model: Runner = Runner.of(ours(SPEC), impl="cpu")


def test_runs_take_turns() -> None:
    log: list[str] = []
    times = in_turn({name: partial(log.append, name) for name in "ab"}, 3, CPU)
    assert log == list("ababab")
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3}


def test_centiles() -> None:
    assert centiles([4.0]) == {"p10": 4.0, "p50": 4.0, "p99": 4.0}
    assert centiles([float(n) for n in range(101)]) == {"p10": 10.0, "p50": 50.0, "p99": 99.0}


def one_slot(model: DiffusionGemma) -> DeviceRunner:
    """What runs on a GPU with little memory: there is room for one prefix."""
    return DeviceRunner(
        model.config,
        dict(model.state_dict()),
        device=CPU,
        dtype=model.dtype,
        impl="reference",
        slots=1,
        context_tokens=300,
    )


@pytest.mark.parametrize("has_one_slot", [False, True])
def test_every_figure_is_there(monkeypatch: pytest.MonkeyPatch, has_one_slot: bool) -> None:
    engine = tiny_infiller()
    if has_one_slot:
        model = one_slot(tiny_model(tiny_config(engine.tokenizer.vocab_tokens)))
        engine = Infiller(model, engine.tokenizer, engine.sampler, engine.method)
    monkeypatch.setattr(bench, "load_infiller", lambda folder, device: engine)
    monkeypatch.setattr(bench, "_PROMPT_TOKENS", (4, 8))
    monkeypatch.setattr(bench, "_CANVAS_TOKENS", (2, 4))
    monkeypatch.setattr(bench, "_TURNS", 2)
    report = run_bench(Path("tiny"), repeats=2, is_busy=True)
    assert [row["tokens"] for row in report["pass"]] == [2, 4]
    assert [row["tokens"] for row in report["busy"]] == [2, 4]
    assert report["compared"] is report["load"] is None
    assert "plain" in report["machine"]["products"]
    # Nothing measured holds a prefix any more.
    assert engine.model.new_cache().tokens == 0
    table = format_bench(report).splitlines()
    assert sum("pass over" in line for line in table) == 2 + 2 * 2


def test_the_busy_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    popen = subprocess.Popen

    def noting(*args: Any, **options: Any) -> Any:
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noting)

    def interrupted() -> None:
        with bench._busy_process():
            assert started[0].poll() is None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert started[0].wait(5) == -9


@pytest.mark.slow
def test_both_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "CANVAS_TOKENS", (4, 16, 1000))
    monkeypatch.setattr(comparison, "STEPS", 2)
    engine = Untokenized()
    engine.model = one_slot(ours(SPEC))
    report = compare(engine, checkpoint(SPEC), 1)  # type: ignore[arg-type]
    assert [row["tokens"] for row in report["pass"]] == [4, 16]
    assert report["prefix_tokens"] == 24
    rows = [*report["pass"], report["generate"]]
    assert all(row["ours_ratio"] > 0 for row in rows)
    assert report["dtype"] in ("float32", "bfloat16")
    table = format_comparison(report)
    assert "its fastest here" in table
    assert len(table.splitlines()) == 2 + 2 * 3 + 5


def test_the_same_is_compared() -> None:
    prefix = torch.arange(8, 32)
    theirs = Baseline(checkpoint(SPEC), Variant(), CPU, prefix)
    canvas = torch.arange(40, 44)[None]
    cache = ours(SPEC).new_cache()
    ours(SPEC).encode(prefix, cache)
    mine = ours(SPEC).denoise(canvas, cache, None)
    torch.testing.assert_close(theirs.run(canvas, None), mine, atol=1e-4, rtol=1e-4)
    # The prefix is only read, however often.
    torch.testing.assert_close(theirs.run(canvas, None), mine, atol=1e-4, rtol=1e-4)
    length = ours(SPEC).config.canvas_tokens
    assert theirs.generate(length, 2).shape == (1, len(prefix) + length)


def test_the_fastest_variant_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"float32": 2.0, "bfloat16": 1.0, "eager": 0.5}
    tried: list[Variant] = []

    def pass_s(baseline: Baseline, canvas: torch.Tensor) -> float:
        tried.append(baseline.variant)
        return seconds[baseline.variant.dtype] * (
            1.5 if baseline.variant.attention == "eager" else 1.0
        )

    monkeypatch.setattr(transformers_baseline, "_pass_s", pass_s)
    best = best_baseline(checkpoint(SPEC), CPU, torch.arange(8, 16), torch.arange(4)[None])
    assert best.variant == Variant(dtype="bfloat16")
    assert len(tried) == 4
    assert best.facts()["dtype"] == "bfloat16"


def test_without_transformers_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="transformers is not installed") as found:
        best_baseline(Path(os.devnull), CPU, torch.arange(2), torch.arange(2)[None])
    assert found.value.remedy is not None
    assert "pip install" in found.value.remedy
