import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from infilld.engine.errors import RequestError
from infilld.engine.training import run as training
from infilld.engine.training.recipe import SizeName, TrainOptions
from infilld.server import cli, train


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TrainOptions]:
    """What the verb asks of the training, which does not happen."""
    seen: list[TrainOptions] = []

    def pretend(options: TrainOptions, say: training.Say) -> dict[str, object]:
        seen.append(options)
        say("step 1")
        return {"exact": 0.5}

    monkeypatch.setattr(training, "train", pretend)
    return seen


def test_every_option_has_a_flag() -> None:
    assert {*train.OPTIONS, "device"} == {field.name for field in dataclasses.fields(TrainOptions)}


def test_nothing_given_leaves_every_default(
    asked: list[TrainOptions], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--json"]) == 0
    assert asked == [TrainOptions()]
    out, err = capfd.readouterr()
    assert json.loads(out) == {"exact": 0.5}
    assert err == "step 1\n"


@pytest.mark.parametrize("size", get_args(SizeName))
def test_every_flag_arrives(asked: list[TrainOptions], size: SizeName) -> None:
    words = "train a b --out o --state s --minutes 1.5 --fresh --seed 3 --device cpu --max-steps 2"
    assert cli.main([*words.split(), "--size", size]) == 0
    assert asked == [
        TrainOptions(
            sources=(Path("a"), Path("b")),
            out=Path("o"),
            state=Path("s"),
            minutes=1.5,
            size=size,
            fresh=True,
            seed=3,
            device="cpu",
            max_steps=2,
        )
    ]


def test_a_failure_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RequestError("no source in x", remedy="Name folders that hold .py files.")

    monkeypatch.setattr(training, "train", refuse)
    assert cli.main(["train", "x"]) == 1
    assert (
        capfd.readouterr().err == "infilld: no source in x\n  Name folders that hold .py files.\n"
    )
