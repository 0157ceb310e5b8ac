"""What a calibration is fitted on, and what its command tells; the fit itself: test_ranking.py."""

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_infill import tiny_infiller

from infilld.engine.evaluation import calibrate as calibrating
from infilld.engine.evaluation.calibrate import (
    Judged,
    calibrate,
    calibration_items,
    judge,
    main,
    shown_above,
)
from infilld.engine.evaluation.held_out import calibration_files
from infilld.engine.evaluation.items import Item
from infilld.engine.ranking import CALIBRATION, Calibration
from infilld.engine.training.corpus import CALIBRATION as KEPT
from infilld.engine.training.corpus import SourceFile

TEXT = "".join(f"def area_{n}(a, b):\n    return a * b + {n}\n\n\n" for n in range(12))
FILES = [SourceFile("p", "p/a.py", TEXT)]


def test_a_quarter_of_the_items_is_silent() -> None:
    items = calibration_items(FILES, 40, 0)
    kinds = Counter(item.kind for item in items)
    assert kinds == {"rest_of_line": 18, "line": 6, "span": 6, "silent": 10}
    assert all(not item.missing for item in items if item.kind == "silent")


def test_kept_packages_are_those_of_the_corpus() -> None:
    assert {file.package for file in calibration_files()} == KEPT


def test_where_nothing_is_missing_every_text_is_wrong() -> None:
    engine = tiny_infiller(max_steps=2)
    before = "total = price + postage\nprint(total)\ntotal = price + "
    gap = Item("rest_of_line", before, "postage", "\n", "")
    told: list[tuple[int, int]] = []
    silent = Item("silent", before, "", "\n", "")
    judged = judge(engine, [gap, silent], 0, lambda done, count: told.append((done, count)))
    # The found draft is among the candidates of both, and so is nothing at all.
    for candidates, is_right_empty in zip(judged, (False, True), strict=True):
        right = [features["is_empty"] > 0 for features, is_right in candidates if is_right]
        assert right == [is_right_empty]
        assert sum(features["is_found"] for features, _ in candidates) >= 1
    assert told == [(1, 2), (2, 2)]


def test_every_item_is_reported() -> None:
    told: list[int] = []
    engine = tiny_infiller(max_steps=2)
    found = calibrate(engine, FILES, items=8, report=lambda done, count: told.append(done))
    assert told == list(range(1, len(told) + 1))
    assert len(told) >= 8
    assert set(found.weights) == set(judge(engine, calibration_items(FILES, 4, 0), 0)[0][0][0])


def test_the_table_tells_what_a_threshold_costs() -> None:
    # Evidence tells nearly everything; every fifth item is silent and has none.
    are_silent = [number % 5 == 0 for number in range(80)]
    are_right = [number % 5 > 0 and number % 7 > 0 for number in range(80)]
    pairs = zip(are_silent, are_right, strict=True)
    judged: list[Judged] = [[({"evidence": 1.0 - silent}, right)] for silent, right in pairs]
    low, high = shown_above(judged, are_silent, [0.0, 0.5])
    right = sum(are_right)
    assert low == {
        "show_above": 0.0,
        "exact": pytest.approx(right / 64),
        "shown": 1.0,
        "precision": pytest.approx(right / 80),
        "silent": 0.0,
    }
    assert (high["shown"], high["silent"]) == (1.0, 1.0)
    assert high["precision"] == pytest.approx(right / 64)


def test_where_nothing_is_likeliest_nothing_is_shown() -> None:
    silent: Judged = [({"is_empty": 1.0}, True), ({"is_empty": 0.0}, False)]
    gap: Judged = [({"is_empty": 1.0}, False), ({"is_empty": 0.0}, False)]
    (row,) = shown_above([silent, silent, gap] * 8, [True, True, False] * 8, [0.0])
    assert (row["silent"], row["shown"], row["precision"]) == (1.0, 0.0, 0.0)


class TestCommand:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch: pytest.MonkeyPatch) -> None:
        engine = tiny_infiller(max_steps=2)
        monkeypatch.setattr(calibrating, "load_infiller", lambda folder, device: engine)

    def test_it_writes_into_the_model_folder(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "area.py").write_text(TEXT)
        words = [str(tmp_path), str(tmp_path / "area.py"), "--items", "8", "--show-above", "0.2"]
        assert main([*words, "--dry-run"]) == 0
        assert not (tmp_path / CALIBRATION).exists()
        assert main(words) == 0
        out, err = capfd.readouterr()
        assert Calibration.from_folder(tmp_path) == Calibration(
            **json.loads(out[: out.index("}\n{") + 2])
        )
        assert "filled 8 of 8" in err
        assert "precision" in err

    def test_what_is_not_there_is_said(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert main([str(tmp_path), str(tmp_path / "absent")]) == 1
        assert "absent" in capfd.readouterr().err
