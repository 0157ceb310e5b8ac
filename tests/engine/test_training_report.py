import json
import math
import sys
from pathlib import Path

import pytest

from infilld.engine.training import run
from infilld.engine.training.corpus import Corpus, SourceFile
from infilld.engine.training.plot import plot_losses
from infilld.engine.training.report import compared, is_comparison, table, to_json
from infilld.engine.training.trainer import Progress

BEFORE = {"items": 20, "nats": 3.25, "canvas": {"exact": 0.1, "parsed": math.nan}}
AFTER = {"items": 20, "nats": 3.0, "canvas": {"exact": 0.25, "parsed": 0.5}}
HISTORY = [[15.0, 8.0, math.nan], [30.0, 7.0, math.nan], [45.0, 6.0, 7.5], [60.0, 5.0, 6.5]]


def test_a_comparison_has_the_change_of_every_figure() -> None:
    report = compared(BEFORE, AFTER)
    assert is_comparison(report)
    assert not is_comparison(BEFORE)
    assert report["change"] == {"nats": -0.25, "canvas": {"exact": 0.15}}


def test_a_comparison_is_a_table() -> None:
    lines = [line.split() for line in table(compared(BEFORE, AFTER)).splitlines()]
    assert lines == [
        ["before", "after", "change"],
        ["items", "20", "20"],
        ["nats", "3.2500", "3.0000", "-0.2500"],
        ["canvas.exact", "0.1000", "0.2500", "+0.1500"],
        ["canvas.parsed", "-", "0.5000"],
    ]


def test_one_report_is_a_list() -> None:
    lines = [line.split() for line in table(AFTER).splitlines()]
    assert lines == [
        ["items", "20"],
        ["nats", "3.0000"],
        ["canvas.exact", "0.2500"],
        ["canvas.parsed", "0.5000"],
    ]


def test_json_has_no_numbers_that_json_does_not_have() -> None:
    text = to_json({"a": [math.nan, (1.5, math.inf)], "b": {"c": -math.inf}})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, [1.5, None]],
        "b": {"c": None},
    }


@pytest.mark.parametrize("history", [HISTORY, HISTORY[:2], HISTORY[2:3], []])
def test_a_plot_takes_losses_that_are_not_there(tmp_path: Path, history: list[list[float]]) -> None:
    plot_losses(history, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_there_is_a_word_and_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said: list[str] = []
    run.plot(Progress(history=HISTORY), tmp_path, said.append)
    assert not list(tmp_path.iterdir())
    (told,) = said
    assert "infilld[train]" in told


def test_a_bare_machine_judges_on_what_is_kept_for_calibration() -> None:
    seen, other, kept = (SourceFile("p", name, name) for name in ("seen", "other", "kept"))
    assert run._unseen(Corpus([seen], [other], [], [kept])) == ["other"]
    assert run._unseen(Corpus([seen], [], [], [kept])) == ["kept"]
    assert run._unseen(Corpus([seen], [], [], [seen])) == []
    assert run._unseen(Corpus([seen], [seen], [], [])) == []


def test_progress_tells_losses_as_far_as_they_are_there() -> None:
    assert Progress().losses == "encoder -  gap - nats"
    assert Progress(encoder_nats=2.5).losses == "encoder 2.500  gap - nats"
    assert Progress().tokens_per_s == 0
