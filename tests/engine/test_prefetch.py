"""The request behind an inserted text: once, soon, and for the newest answer alone."""

import pytest

from infilld.engine import prefetch
from infilld.engine.errors import UnknownId, UnknownOption
from infilld.engine.prefetch import Answers
from infilld.engine.request import (
    Alternative,
    Context,
    InfillRequest,
    InfillResult,
    Pin,
    Span,
    SpanFill,
)

TEXT = "x = 12\ny\n"


def asked(**more: object) -> InfillRequest:
    known: dict[str, object] = {
        "text": TEXT,
        "spans": (Span(4, 6),),
        "document": "d",
        "path": "a.py",
        "language": "python",
        "context": (Context("b.py", "B"),),
        "boldness": 0.25,
    }
    return InfillRequest(**{**known, **more})  # type: ignore[arg-type]


def answered(
    answers: Answers, request: InfillRequest, *fills: str, job_id: str = "1"
) -> InfillResult:
    choices = tuple(
        Alternative(tuple(SpanFill(s.start, s.end, fill, 1.0) for s in request.spans), 0.0)
        for fill in fills
    )
    result = InfillResult(id=job_id, seed=0, alternatives=choices)
    answers.begin(job_id, request.document)
    answers.keep(request, result)
    return result


@pytest.mark.parametrize(
    ("choice", "chars", "inserted"),
    [(0, None, "f()"), (1, None, "g"), (0, 2, "f("), (0, 99, "f()")],
)
def test_the_gap_behind_the_inserted_text(choice: int, chars: int | None, inserted: str) -> None:
    answers = Answers()
    given = asked(deadline_ms=50, seed=3, pins=(Pin(0, "start", "f"),), drafts=("f",), max_tokens=9)
    answered(answers, given, "f()", "g")
    got = answers.follow_up("1", choice, chars)
    at = 4 + len(inserted)
    assert got == asked(
        text=f"x = {inserted}\ny\n", spans=(Span(at, at),), background=True, max_tokens=9
    )


def test_only_once() -> None:
    answers = Answers()
    answered(answers, asked(), "f")
    assert answers.follow_up("1", 0, None) is not None
    assert answers.follow_up("1", 0, None) is None


@pytest.mark.parametrize(
    "more",
    [
        {"document": None},
        {"instruction": "shorten"},
        {"repair": ()},
        {"think": True},
        {"spans": (Span(0, 1), Span(4, 6))},
    ],
    ids=str,
)
def test_nothing_follows_what_is_not_typed(more: dict[str, object]) -> None:
    answers = Answers()
    answered(answers, asked(**more), "f")
    assert answers.follow_up("1", 0, None) is None
    answers.know("1", 0)


def test_nothing_follows_a_silent_or_an_unknown_answer() -> None:
    answers = Answers()
    answered(answers, asked())
    assert answers.follow_up("1", 0, None) is None
    assert answers.follow_up("2", 0, None) is None
    answered(answers, asked(), "f", job_id="3")
    assert answers.follow_up("3", 1, None) is None
    assert answers.follow_up("3", -1, None) is None


def test_a_newer_job_of_the_document_comes_first() -> None:
    answers = Answers()
    answered(answers, asked(), "f")
    answers.begin("2", "other")
    answers.begin("3", None)
    assert answers.follow_up("1", 0, None) is not None
    answered(answers, asked(), "f")
    answers.begin("4", "d")
    assert answers.follow_up("1", 0, None) is None
    # The other way round: answered when a newer one had already begun.
    answers.keep(asked(), InfillResult(id="1", seed=0))
    assert answers.follow_up("1", 0, None) is None


def test_a_minute_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, now = Answers(), [100.0]
    monkeypatch.setattr(prefetch.time, "monotonic", lambda: now[0])
    answered(answers, asked(), "f")
    now[0] += 60
    assert answers.follow_up("1", 0, None) is not None
    answered(answers, asked(), "f")
    now[0] += 61
    assert answers.follow_up("1", 0, None) is None


def test_no_gap_within_a_line_end() -> None:
    answers = Answers()
    answered(answers, asked(text="x = 12\ny\n"), "f\r")
    assert answers.follow_up("1", 0, None) is None


def test_feedback_needs_one_of_the_last_answers() -> None:
    answers = Answers()
    answered(answers, asked(), "f")
    answers.know("1", 0)
    with pytest.raises(UnknownOption):
        answers.know("1", 1)
    with pytest.raises(UnknownId):
        answers.know("2", 0)
    for number in range(2, 66):
        answered(answers, asked(), "f", job_id=str(number))
    with pytest.raises(UnknownId):
        answers.know("1", 0)
    answers.know("2", 0)


def test_one_text_a_document_is_held() -> None:
    answers = Answers()
    for number in range(20):
        answered(answers, asked(document=str(number % 2)), "f", job_id=str(number))
    held = [each.request for each in answers._answers.values() if each.request is not None]
    assert len(held) == 2
