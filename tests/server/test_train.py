import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import get_args

import pytest

from infilld.engine.errors import RequestError
from infilld.engine.training import run as training
from infilld.engine.training.recipe import SizeName, TrainOptions
from infilld.engine.training.report import compared
from infilld.engine.training.trainer import Progress
from infilld.engine.worker import starter_folder
from infilld.server import cli
from infilld.server.verbs import train


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


def test_a_comparison_is_printed_as_a_table(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    report = compared({"nats": 3.0, "rate": math.nan}, {"nats": 2.5, "rate": 0.5})
    monkeypatch.setattr(training, "train", lambda *_: report)
    assert cli.main(["train", "src", "--from", "starter"]) == 0
    assert capfd.readouterr().out.split() == [
        *("before", "after", "change"),
        *("nats", "3.0000", "2.5000", "-0.5000"),
        *("rate", "-", "0.5000"),
    ]
    assert cli.main(["train", "src", "--from", "starter", "--json"]) == 0
    told = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
    assert told["change"] == {"nats": -0.5}


@pytest.mark.parametrize("given", ["starter", "m"])
def test_a_model_to_go_on_from_is_a_folder_or_the_starter(
    asked: list[TrainOptions], given: str
) -> None:
    assert cli.main(["train", "src", "--from", given]) == 0
    assert asked[0].base == (starter_folder() if given == "starter" else Path.cwd() / "m")


def test_going_on_without_folders_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--from", "starter"]) == 1
    assert "infilld train --from starter FOLDER" in capfd.readouterr().err


def test_a_terminal_gets_a_bar_between_the_lines(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def pretend(options: TrainOptions, say: training.Say, show: training.Show) -> dict[str, object]:
        say("corpus")
        for seconds in (60, 120):
            show(Progress(steps=seconds, elapsed_s=seconds, encoder_tokens=9000, encoder_nats=4.25))
        say("wrote it")
        return {}

    monkeypatch.setattr(training, "train", pretend)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["train", "--minutes", "4"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "corpus"
    # Before it stands the order that shows the cursor again.
    assert lines[-1].endswith("wrote it")
    shown = "\n".join(lines[1:-1])
    for part in ("50%", "2:00 done, 2:00 left", "step 120", "encoder 4.250", "75 tokens/s"):
        assert part in shown, part


@pytest.mark.parametrize("size", get_args(SizeName))
def test_every_flag_arrives(asked: list[TrainOptions], size: SizeName) -> None:
    words = "train a b --out o --state s --minutes 1.5 --fresh --seed 3 --device cpu --max-steps 2"
    more = "--from m --pause-minutes 0.5 --items 7"
    assert cli.main([*words.split(), *more.split(), "--size", size]) == 0
    assert asked == [
        TrainOptions(
            sources=(Path("a"), Path("b")),
            base=Path.cwd() / "m",
            out=Path("o"),
            state=Path("s"),
            minutes=1.5,
            pause_minutes=0.5,
            items=7,
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
