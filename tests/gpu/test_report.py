"""The GPU's report runs without a GPU, in small, and a part of it that fails ends nothing else."""

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.dequantize import dequantize

FOLDER = Path(__file__).parent
REPORT = FOLDER / "report.py"


@pytest.fixture
def parts() -> Iterator[Any]:
    """Imports a module of the report; none of them is left to other tests."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(FOLDER))
        own = {path.stem for path in FOLDER.glob("*.py")} | {"harness"}
        for name in (set(sys.modules) - before) & own:
            del sys.modules[name]


def run(out: Path, *arguments: str, transformers: str) -> dict[str, Any]:
    """The report of a run whose `transformers` is this text."""
    fake = out / "path"
    fake.mkdir(parents=True)
    (fake / "transformers.py").write_text(transformers)
    command = [sys.executable, str(REPORT), "--small", "--out", str(out / "report"), *arguments]
    path = os.pathsep.join([str(fake), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    log = (out / "report/log.txt").read_text()
    assert done.returncode == 0, done.stderr + log
    found: dict[str, Any] = json.loads((out / "report/report.json").read_text())
    assert found["schema"] == "infilld-gpu-report/1"
    assert found["is_finished"]
    assert all(aim["aim"] in done.stdout for aim in found["aims"])
    return found


@pytest.mark.slow
def test_every_section_gives_figures_though_one_dies(tmp_path: Path) -> None:
    died = run(tmp_path, "--minutes", "20", transformers="import os; os._exit(7)")
    sections = died["sections"]
    assert sections["transformers"]["status"] == "failed"
    assert sections["transformers"]["error"] == "its process ended with status 7"
    for name in ("facts", "tests", "model", "benches", "starter"):
        assert sections[name]["status"] == "done", sections[name]
    tables = sections["model"]["tables"]
    assert {(row["canvas"], row["prefix"]) for row in tables["passes"]} == {
        (canvas, prefix) for canvas in (16, 32) for prefix in (16, 48, 96)
    }
    assert all(row["ms"] > 0 and row["device_ms"] > 0 for row in tables["passes"])
    assert all(1 <= row["fewest"] <= row["most"] <= 8 for row in tables["experts"])
    assert [(row["behind"], row["tokens"]) for row in tables["prefill"]] == [
        (0, 48),
        (48, 48),
        (0, 16),
        (0, 48),
    ]
    assert {row["passes"] for row in tables["forced passes"]} == {3}
    assert {row["weighed"] for row in tables["fills"]} == {False, True}
    assert [row["tokens"] for row in tables["pieces"]] == [8, 20]
    assert tables["memory measured"][0]["context_tokens"] == 96
    assert tables["kernels of a pass over 32"][-1]["kernel"] == "all"
    assert sections["tests"]["tables"]["files"] == [
        {"file": "test_accept.py", "passed": 26, "failed": 0, "skipped": 0}
    ]
    assert len(sections["benches"]["tables"]["cases"]) == 10
    assert [row["order"] for row in sections["starter"]["tables"]["fill"]] == ["first", "second"]
    text = (tmp_path / "report/report.md").read_text()
    assert "### passes" in text
    assert "its process ended with status 7" in text


def test_a_section_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    started = time.monotonic()
    late = run(
        tmp_path,
        *("--minutes", "0.2", "--only", "transformers"),
        transformers="import time; time.sleep(600)",
    )
    assert late["sections"]["transformers"]["status"] == "out of time"
    assert time.monotonic() - started < 60


# `generate` loads torch's compiler, which warns of itself.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_is_measured(tmp_path: Path, parts: Any) -> None:
    notes, plan = parts("notes"), parts("plan")
    section = parts("section_transformers")
    own = notes.Notes(tmp_path / "notes", "transformers", time.time() + 600)
    machine = plan.Machine(torch.device("cpu"), "reference", torch.float32)
    section.measure(own, plan.small_plan(), machine)
    found = notes.gathered(notes.read_lines(tmp_path / "notes"), "transformers")
    assert {step["state"] for step in found["steps"].values()} == {"done"}
    (forced,) = found["tables"]["forced passes"]
    assert forced["two_canvases_ms"] > 0
    assert [row["canvas"] for row in found["tables"]["passes"]] == [32, 16]


class TestNotes:
    """Steps of a section that dies and is started again."""

    def test_a_section_goes_on_behind_the_step_it_died_in(self, tmp_path: Path, parts: Any) -> None:
        notes, seen = parts("notes"), []

        def died() -> None:
            raise KeyboardInterrupt

        first = notes.Notes(tmp_path / "notes", "model", time.time() + 60)
        first.run("one", lambda: seen.append("one"))
        with pytest.raises(KeyboardInterrupt):
            first.run("two", died)
        again = notes.Notes(tmp_path / "notes", "model", time.time() + 60)
        for name in ("one", "two", "three"):
            again.run(name, lambda name=name: seen.append(name))
        assert seen == ["one", "three"]
        steps = notes.gathered(notes.read_lines(tmp_path / "notes"), "model")["steps"]
        assert [step["state"] for step in steps.values()] == ["done", "begun", "done"]

    def test_a_failing_step_is_told_and_ends_nothing(self, tmp_path: Path, parts: Any) -> None:
        notes = parts("notes")
        own = notes.Notes(tmp_path / "notes", "model", time.time() + 60)
        assert not own.run("one", lambda: [][0])
        assert own.run("two", lambda: own.row("table", ms=1.5))
        found = notes.gathered(notes.read_lines(tmp_path / "notes"), "model")
        assert found["steps"]["one"]["error"].startswith("IndexError: list index out of range")
        assert found["tables"] == {"table": [{"ms": 1.5}]}

    def test_a_step_without_time_is_not_begun(self, tmp_path: Path, parts: Any) -> None:
        notes = parts("notes")
        own = notes.Notes(tmp_path / "notes", "model", time.time() + 1)
        assert not own.run("one", lambda: own.row("table"), needs_s=30)
        found = notes.gathered(notes.read_lines(tmp_path / "notes"), "model")
        assert found == {"steps": {"one": {"state": "no time"}}, "tables": {}}

    def test_a_lost_device_ends_the_process(
        self, tmp_path: Path, parts: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        notes = parts("notes")
        monkeypatch.setattr(notes, "is_device_lost", lambda: True)
        own = notes.Notes(tmp_path / "notes", "model", time.time() + 60)
        with pytest.raises(SystemExit) as left:
            own.run("one", lambda: [][0])
        assert left.value.code == notes.SPOILED

    def test_a_line_that_was_cut_off_is_left_out(self, tmp_path: Path, parts: Any) -> None:
        notes = parts("notes")
        own = notes.Notes(tmp_path / "notes", "model", time.time() + 60)
        own.row("table", ms=1.5)
        with (tmp_path / "notes").open("a") as file:
            file.write('{"section": "mod')
        assert len(notes.read_lines(tmp_path / "notes")) == 1


class TestAims:
    """Figures against their limits."""

    def statuses(self, parts: Any, device: str, model: str = "26b", ms: float = 5.0) -> set[str]:
        passes = {"rows": 1, "canvas": 256, "prefix": 2048, "ms": ms}
        ours = {"canvas": 256, "tokens_per_s": 3000.0}
        theirs = {"canvas": 256, "tokens_per_s": 500.0}
        report = {
            "model": model,
            "facts": {"device": device},
            "sections": {
                "model": {"tables": {"passes": [passes], "forced passes": [ours]}},
                "transformers": {"tables": {"forced passes": [theirs]}},
            },
        }
        found = parts("aims").judged(report)
        return {f"{aim['aim']}: {aim['status']}" for aim in found}

    def test_are_met_and_missed(self, parts: Any) -> None:
        found = self.statuses(parts, "NVIDIA H200")
        assert "pass over 256 positions: met" in found
        assert "those, against transformers in bf16: met" in found
        assert "pass over 64 positions: not measured" in found
        slow = self.statuses(parts, "NVIDIA H200", ms=6.5)
        assert "pass over 256 positions: missed" in slow

    def test_are_for_one_device_and_the_real_shapes(self, parts: Any) -> None:
        for found in (
            self.statuses(parts, "NVIDIA GeForce RTX 4090"),
            self.statuses(parts, "NVIDIA H200", model="small"),
        ):
            assert {text.rpartition(": ")[2] for text in found} == {"not measured"}


class TestRandomModel:
    """Weights that are made when they are taken."""

    @pytest.fixture
    def made(self, parts: Any) -> ModuleType:
        found: ModuleType = parts("random_model")
        return found

    def test_the_26b_has_its_size(self, made: ModuleType) -> None:
        shapes = made.RandomWeights(made.config_26b(), "plain", "meta")
        parameters = sum(weight.numel() for weight in shapes.values())
        # The audit's sum is 25.25 billion.
        assert 25.2e9 < parameters < 25.3e9
        planned = made.weight_bytes(made.config_26b(), "int4")
        assert planned.embedding == 2 * 262_144 * 2816
        assert 15e9 < planned.total < 15.9e9

    @pytest.mark.parametrize("form", ["int4", "int4-affine", "nvfp4"])
    def test_numbers_have_a_sensible_size(self, made: ModuleType, form: str) -> None:
        weights = made.RandomWeights(made.config_small(), form, "cpu")
        name = "layers.0.experts.gate_up_proj"
        weight = weights.pop(name)
        assert name not in weights
        assert isinstance(weight, QuantizedWeight)
        values = dequantize(weight, impl="reference")
        assert abs(float(values.std()) * weight.shape[-1] ** 0.5 - 1) < 0.1
        assert abs(float(values.mean())) < 0.15 * float(values.std())

    def test_asking_for_a_name_makes_nothing(
        self, made: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weights = made.RandomWeights(made.config_small(), "int4", "cpu")
        monkeypatch.setattr(torch, "empty", None)
        assert "embed_tokens.weight" in weights
        assert "layers.1.self_attn.v_proj.weight" not in weights
