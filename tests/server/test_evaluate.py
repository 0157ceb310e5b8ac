"""`infilld eval`, the flags in this process and the whole verb in one of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infilld.engine.evaluation import run as evaluation
from infilld.engine.evaluation.names import CONTENDERS, KINDS
from infilld.engine.evaluation.run import EvaluationOptions
from infilld.server import cli
from infilld.server.settings import STARTER
from infilld.server.verbs import models

REPORT: dict[str, Any] = {
    "model": "starter",
    "parameters": 1,
    "machine": {"dtype": "float32", "device": "cpu", "name": "x86_64"},
    "seed": 0,
    "kinds": {},
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str, EvaluationOptions]]:
    """What the verb asks for; nothing is evaluated."""
    seen: list[tuple[Path, str, EvaluationOptions]] = []

    def pretend(
        folder: Path, device: str, options: EvaluationOptions, say: evaluation.Say
    ) -> dict[str, Any]:
        seen.append((folder, device, options))
        say("half done")
        return REPORT

    monkeypatch.setattr(evaluation, "run_evaluation", pretend)
    return seen


def test_nothing_given_leaves_every_default(
    asked: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "--json"]) == 0
    assert asked == [(models.folder_of(STARTER), "auto", EvaluationOptions())]
    out, err = capfd.readouterr()
    assert (json.loads(out), err) == (REPORT, "half done\n")


def test_every_flag_arrives(asked: list[Any], tmp_path: Path) -> None:
    words = "eval a b --benchmark c --items 7 --kinds line,span --contenders canvas --seed 3"
    tests = ["--repository", "r", "--tests", "tests -k a", "--tests", "more"]
    assert cli.main([*words.split(), *tests, "--model", "/m", "--device", "cpu"]) == 0
    options = EvaluationOptions(
        folders=(Path("a"), Path("b")),
        benchmark=Path("c"),
        repository=Path("r"),
        tests=("tests -k a", "more"),
        items=7,
        seed=3,
        kinds=("line", "span"),
        contenders=("canvas",),
    )
    assert asked == [(Path("/m"), "cpu", options)]


@pytest.mark.parametrize(
    ("flag", "known"), [("--kinds", KINDS), ("--contenders", CONTENDERS)], ids=lambda v: str(v)[:9]
)
def test_unknown_names_are_bad_usage(
    asked: list[Any], flag: str, known: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    for text in ("nothing", "", f"{next(iter(known))},nothing"):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["eval", f"{flag}={text}"])
        assert leaving.value.code == 2
        err = capfd.readouterr().err
        assert flag in err
        assert all(name in err for name in known)
    assert not asked


def test_the_report_is_written(
    asked: list[Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    assert cli.main(["eval", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == REPORT
    assert capfd.readouterr().out.startswith("starter: 0.0 M parameters")


@pytest.mark.parametrize("name", ["", "absent/report.json"])
def test_a_report_that_cannot_be_written_stops_before_the_work(
    asked: list[Any], tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "--out", str(tmp_path / name)]) == 1
    assert not asked
    err = capfd.readouterr().err
    assert str(tmp_path / name) in err
    assert "--out" in err


def test_no_benchmark_to_evaluate_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--kinds", "benchmark"]) == 1
    assert "--benchmark" in capfd.readouterr().err


def test_a_repository_without_tests_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--repository", "."]) == 1
    assert "--tests" in capfd.readouterr().err


def test_what_is_not_there_is_said_before_the_model_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in (["absent"], ["--benchmark", "absent", "--kinds", "benchmark"]):
        assert cli.main(["eval", "--model", "/nowhere", *words]) == 1
        err = capfd.readouterr().err
        assert "absent" in err
        assert "/nowhere" not in err


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.skipif(
    not (models.folder_of(STARTER) / "config.json").is_file(),
    reason="this checkout has no starter model yet",
)
def test_the_verb_in_a_process_of_its_own(tmp_path: Path) -> None:
    source = "".join(f"def area_{n}(a, b):\n    return a * b + {n}\n\n\n" for n in range(12))
    code = tmp_path / "code"
    code.mkdir()
    (code / "area.py").write_text(source)
    row = {
        "task_id": "T/1",
        "entry_point": "f",
        "prompt": "def g(x):\n    return x + 1\n\n\ndef f(x):\n    return ",
        "suffix": "\n",
        "canonical_solution": "x + 1",
        "test": "def check(f):\n    assert f(1) == 2\n",
    }
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row) + "\n")
    words = ["eval", str(code), "--benchmark", str(tmp_path), "--items", "2", "--device", "cpu"]
    # Nobody may have to wait for all of them.
    chosen = ["canvas", "causal_greedy", "retrieval", "n_gram"]
    words += ["--kinds", "line,silent,typing,benchmark", "--contenders", ",".join(chosen)]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "infilld.server", *words, "--out", str(tmp_path / "r.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["schema"] == 1
    assert report["model"] == "starter"
    assert report["held_out"]["files"] == 1
    assert report["benchmark"]["own_solutions_pass"] == 1
    assert list(report["kinds"]) == ["line", "silent", "typing", "benchmark"]
    for kind, found in report["kinds"].items():
        assert list(found["contenders"]) == (["canvas"] if kind == "typing" else chosen)
        assert found["items"] == (1 if kind in ("benchmark", "typing") else 2)
        assert f"\n{kind}: {KINDS[kind]}" in done.stdout
    # The same function stands above: what is found there is the answer, and its tests pass.
    retrieval = report["kinds"]["benchmark"]["contenders"]["retrieval"]
    assert (retrieval["exact_match"], retrieval["pass_at_1"]) == (1.0, 1.0)
    assert retrieval["tests"] == {"passed": 1}
    assert "benchmark: n_gram has" in done.stderr
