"""Training from the engine alone: its flags, and what it does without."""

import subprocess
import sys
from pathlib import Path

import pytest

from infilld.engine.errors import RequestError
from infilld.engine.training import __main__ as program
from infilld.engine.training.recipe import TrainOptions
from infilld.engine.worker import starter_folder

ROOT = Path(__file__).resolve().parents[2]
# What the daemon, the bridge, the tests and the plot need.
OTHERS = (
    *("rich", "fastapi", "starlette", "uvicorn", "pydantic", "httpx", "pygls", "lsprotocol"),
    *(
        "jinja2",
        "tree_sitter",
        "matplotlib",
        "transformers",
        "triton",
        "infilld.server",
        "infilld.lsp",
    ),
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrainOptions]:
    """What is asked of the training, which does not happen."""
    seen: list[TrainOptions] = []

    def pretend(options: TrainOptions, say: object) -> dict[str, object]:
        seen.append(options)
        return {"exact": 0.5}

    monkeypatch.setattr(program, "train", pretend)
    return seen


def test_nothing_given_leaves_every_default(
    asked: list[TrainOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([]) == 0
    assert asked == [TrainOptions()]
    assert capsys.readouterr().out.split() == ["exact", "0.5000"]


def test_every_flag_arrives(asked: list[TrainOptions]) -> None:
    words = "a b --from m --out o --state s --size gpu --minutes 2 --pause-minutes 0.5"
    more = "--device cpu --items 7 --seed 3 --max-steps 9 --fresh"
    assert program.main([*words.split(), *more.split()]) == 0
    assert asked == [
        TrainOptions(
            sources=(Path("a"), Path("b")),
            base=Path("m"),
            out=Path("o"),
            state=Path("s"),
            size="gpu",
            minutes=2,
            pause_minutes=0.5,
            device="cpu",
            items=7,
            seed=3,
            max_steps=9,
            fresh=True,
        )
    ]


def test_starter_is_a_name(asked: list[TrainOptions]) -> None:
    assert program.main(["a", "--from", "starter"]) == 0
    assert asked[0].base == starter_folder()


def test_a_failure_is_exit_1_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RequestError("no source in x", remedy="Name folders that hold .py files.")

    monkeypatch.setattr(program, "train", refuse)
    assert program.main(["x"]) == 1
    assert capsys.readouterr().err == "no source in x\n  Name folders that hold .py files.\n"


@pytest.mark.parametrize("value", ["0", "nan"])
def test_a_number_that_means_nothing_is_exit_1(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--minutes", value]) == 1
    assert "minutes" in capsys.readouterr().err


@pytest.mark.slow
def test_it_needs_the_engine_s_packages_alone() -> None:
    code = f"""
import sys
for name in {OTHERS!r}:
    sys.modules[name] = None
from infilld.engine.training.__main__ import main
from infilld.engine.training.corpus import collect_installed
try:
    main(["--help"])
except SystemExit as left:
    assert not left.code
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "--pause-minutes" in done.stdout
