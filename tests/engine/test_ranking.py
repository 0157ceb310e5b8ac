"""Candidates are ranked by likelihood, or by a calibration where the model has one."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_infill import tiny_infiller

from infilld.engine.errors import CheckpointMismatch
from infilld.engine.evaluation.calibrate import fit
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.plan import FillMethod
from infilld.engine.ranking import (
    CALIBRATION,
    Calibration,
    Candidate,
    Weighed,
    features_of,
    place_of,
    weigh,
)
from infilld.engine.request import InfillRequest, Span

GUESS = Candidate("a", (1,), rows=1.0)
FOUND = Candidate("b + c", (2, 3, 4), evidence=40.0)
# Two suffix tokens behind each.
LOGS = [torch.tensor([-0.5, -1.0, -1.0]), torch.tensor([-2.0, -1.0, -4.0, -0.5, -0.5])]
PLACE = place_of("x = ", "\n")
TEXT = "total = price + postage\nprint(total)\ntotal = price + "


def test_features_are_those_of_the_fill_and_of_what_follows() -> None:
    guess, found = features_of([GUESS, FOUND], LOGS, PLACE)
    assert found["fill_nats"] == pytest.approx(-0.7)
    assert found["suffix_nats"] == pytest.approx(-0.1)
    assert found["worst_nats"] == pytest.approx(-0.4)
    assert found["tokens"] == pytest.approx(0.3)
    assert (found["is_found"], found["evidence"], found["strong_evidence"]) == (1.0, 2.0, 1.0)
    assert guess["is_found"] == 0.0
    # e^-2.5 and e^-8 of their sum.
    share = math.exp(-8.0) / (math.exp(-2.5) + math.exp(-8.0))
    assert found["share_nats"] == pytest.approx(math.log(share) / 10, rel=1e-4)


def test_that_nothing_is_missing_has_features_of_its_own() -> None:
    nothing = Candidate("", ())
    logs = [torch.tensor([-3.0, -3.0]), LOGS[0]]
    empty, guess = features_of([nothing, GUESS], logs, {"block": 1.0})
    assert set(empty) == set(guess)
    assert (empty["is_empty"], empty["empty_block"], empty["block"]) == (1.0, 1.0, 0.0)
    assert (guess["is_empty"], guess["empty_block"], guess["block"]) == (0.0, 0.0, 1.0)
    # Behind the guess the suffix is e^4 times as likely as behind nothing.
    assert guess["suffix_gain"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("prefix", "suffix", "expected"),
    [
        ("x = ", "\ny", {"is_open"}),
        ("    return ", "\n", {"is_open"}),
        ("returned ", "\n", set()),
        ("foo(", ")\n", {"in_line", "is_open"}),
        ("foo(a", ", b)\n", {"in_line", "in_word"}),
        ("a\n    ", "\nb", {"block"}),
        ("x = y", "z\n", {"in_line", "in_word", "before_word"}),
        ("", "", {"block"}),
    ],
)
def test_what_a_place_tells(prefix: str, suffix: str, expected: set[str]) -> None:
    found = place_of(prefix, suffix)
    assert {name for name, value in found.items() if value} == expected


def test_without_a_calibration_the_likeliest_comes_first() -> None:
    ranked = weigh([FOUND, GUESS], [LOGS[1], LOGS[0]], None, PLACE)
    assert [each.candidate for each in ranked] == [GUESS, FOUND]
    assert ranked[0].score == pytest.approx(-2.5 / 3)
    assert ranked[0].confidence == pytest.approx(torch.tensor(-2.5 / 3).exp().item())


def test_a_calibration_may_trust_what_was_found() -> None:
    trusting = Calibration(weights={"evidence": 2.0}, bias=-2.0, show_above=0.1)
    ranked = weigh([GUESS, FOUND], LOGS, trusting, PLACE)
    assert ranked[0].candidate == FOUND
    # Beside the guess, and none of them: e^2, e^-2 and e^0 of their sum.
    likely, guess = math.exp(2.0), math.exp(-2.0)
    assert ranked[0].confidence == pytest.approx(likely / (likely + guess + 1))
    assert trusting.confidences([]) == []


def test_a_fitted_calibration_knows_how_often_it_is_right() -> None:
    generator = torch.Generator().manual_seed(0)
    judged = []
    for _ in range(400):
        evidence = float(torch.rand((), generator=generator))
        is_right = float(torch.rand((), generator=generator)) < 0.1 + 0.8 * (evidence > 0.5)
        noise = float(torch.rand((), generator=generator))
        judged.append([({"evidence": evidence, "noise": noise}, is_right)])
    found = fit(judged)
    assert found.weights["evidence"] > 5 * abs(found.weights["noise"])
    (likely,) = found.confidences([{"evidence": 0.9, "noise": 0.5}])
    (unlikely,) = found.confidences([{"evidence": 0.1, "noise": 0.5}])
    assert unlikely < 0.3 < 0.7 < likely


def test_a_calibration_is_kept_in_the_model_folder(tmp_path: Path) -> None:
    assert Calibration.from_folder(tmp_path) is None
    made = Calibration(weights={"evidence": 1.5}, bias=-1.0, show_above=0.2)
    made.save(tmp_path)
    assert Calibration.from_folder(tmp_path) == made


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"schema": 2, "weights": 1, "bias": 0, "show_above": 0}',
        '{"schema": 2, "other": 1}',
        '{"weights": {}, "bias": 0, "show_above": 0}',
    ],
)
def test_a_damaged_calibration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / CALIBRATION).write_text(text)
    with pytest.raises(CheckpointMismatch, match=CALIBRATION):
        Calibration.from_folder(tmp_path)


def _request(text: str = TEXT) -> InfillRequest:
    return InfillRequest(text=text, spans=(Span(len(text), len(text)),), seed=3)


def _engine(calibration: Calibration | None, **method: bool) -> Infiller:
    bare = tiny_infiller()
    return Infiller(bare.model, bare.tokenizer, bare.sampler, FillMethod(**method), calibration)


def test_found_text_is_weighed_beside_what_the_canvas_wrote() -> None:
    seen: list[Weighed] = []
    _engine(None, holds_back=False).infill(_request(), Hooks(on_weighed=seen.extend))
    found = [each.candidate for each in seen if each.candidate.evidence]
    assert [draft.text for draft in found] == ["postage"]
    assert any(each.candidate.rows for each in seen)


def test_what_the_encoder_would_write_is_weighed_too() -> None:
    for is_wanted in (False, True):
        seen: list[Weighed] = []
        engine = _engine(None, holds_back=False, causal_draft=is_wanted)
        result = engine.infill(_request(), Hooks(on_weighed=seen.extend))
        assert sum(each.candidate.is_causal for each in seen) == is_wanted
        # A hypothesis starts from it: found, causal, noise.
        assert result.usage.canvas_tokens % (2 + is_wanted) == 0
    within_a_line = InfillRequest(text=TEXT + ")\n", spans=(Span(len(TEXT), len(TEXT)),), seed=3)
    seen.clear()
    _engine(None, holds_back=False, causal_draft=True).infill(
        within_a_line, Hooks(on_weighed=seen.extend)
    )
    assert not any(each.candidate.is_causal for each in seen)


def test_what_was_found_wins_where_it_is_trusted() -> None:
    trusting = Calibration(weights={"is_found": 5.0}, bias=-2.0, show_above=0.5)
    result = _engine(trusting).infill(_request())
    assert result.reason == "ok"
    assert result.alternatives[0].spans[0].text == "postage"
    assert result.alternatives[0].spans[0].confidence == pytest.approx(0.9405, abs=1e-3)


def test_what_is_improbable_is_held_back_with_its_chance() -> None:
    doubting = Calibration(weights={}, bias=-2.0, show_above=0.5)
    result = _engine(doubting).infill(_request())
    assert (result.reason, result.alternatives) == ("low_confidence", ())
    assert "10%" in result.why
    shown = _engine(doubting, holds_back=False).infill(_request())
    assert shown.reason == "ok"


def test_what_breaks_the_document_is_held_back() -> None:
    # The only text that is trusted opens a block where none may be.
    trusting = Calibration(weights={"is_found": 9.0}, bias=-4.0, show_above=0.5)
    text = "for a in b:\n    pass\nx = a in "
    result = _engine(trusting).infill(_request(text))
    assert (result.reason, result.alternatives) == ("does_not_parse", ())
    assert _engine(trusting, holds_back=False).infill(_request(text)).reason == "ok"
    fits = "y = (a + b)\nx = 1\ny = (a + "
    assert _engine(trusting).infill(_request(fits)).alternatives[0].spans[0].text == "b)"


@pytest.mark.parametrize(
    ("boldness", "least"), [(None, 0.2), (0.5, 0.2), (1.0, 0.0), (0.75, 0.1), (0.0, 0.9)]
)
def test_one_threshold_from_shy_to_bold(boldness: float | None, least: float) -> None:
    made = Calibration(weights={}, bias=0.0, show_above=0.2)
    assert made.least_confidence(boldness) == pytest.approx(least)


def test_a_bold_request_is_shown_what_a_shy_one_is_not() -> None:
    doubting = Calibration(weights={}, bias=-2.0, show_above=0.5)
    bold = replace(_request(), boldness=1.0)
    assert _engine(doubting).infill(bold).reason == "ok"
    sure = Calibration(weights={}, bias=1.0, show_above=0.1)
    assert _engine(sure).infill(_request()).reason == "ok"
    shy = replace(_request(), boldness=0.0)
    assert _engine(sure).infill(shy).reason == "low_confidence"


def test_where_nothing_is_missing_nothing_is_shown() -> None:
    content = Calibration(weights={"is_empty": 4.0}, bias=-3.0, show_above=0.01)
    result = _engine(content).infill(_request())
    assert (result.reason, result.alternatives) == ("empty", ())
    assert "%" in result.why


def test_the_saved_calibration_is_plain_json(tmp_path: Path) -> None:
    Calibration(weights={"rows": 1.0}, bias=0.0, show_above=0.1).save(tmp_path)
    found = json.loads((tmp_path / CALIBRATION).read_text())
    assert found == {"schema": 2, "weights": {"rows": 1.0}, "bias": 0.0, "show_above": 0.1}
