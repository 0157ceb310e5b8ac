"""Lines typed key by key: what is recorded, what is asked, and what is made of the answers."""

import dataclasses

import pytest
from tiny_infill import tiny_infiller

from infilld.engine.errors import RequestError
from infilld.engine.evaluation.items import Item
from infilld.engine.evaluation.names import SWITCHES
from infilld.engine.evaluation.recordings import (
    Asked,
    Keystroke,
    Recording,
    measure_typing,
    record,
    recordings,
    replay,
    run_typing,
    verdict_on,
)
from infilld.engine.infill import Infiller
from infilld.engine.request import Alternative, InfillRequest, InfillResult, SpanFill, Usage
from infilld.engine.training.corpus import SourceFile

LINE = "return sum(prices) + postage"
ITEM = Item("line", "def f():\n    ", LINE, "\n", "made up")
FILES = [
    SourceFile("p", "p/a.py", "".join(f"total_{n} = price + {n} * tax\nx\n" for n in range(40)))
]
# Two keys, one of them wrong and taken back.
SHORT = Recording(
    "", "ab", "\n", (Keystroke("a", True), Keystroke("ax", True), Keystroke("a", False))
)


class Warm(Infiller):
    """Suggests the rest of the line, and keeps the requests."""

    def __init__(self) -> None:
        plain = tiny_infiller()
        super().__init__(plain.model, plain.tokenizer, plain.sampler)
        self.requests: list[InfillRequest] = []
        self.forgotten: list[int] = []

    def infill(self, request: InfillRequest, hooks: object = None) -> InfillResult:
        self.requests.append(request)
        at = request.spans[0].start
        fill = SpanFill(at, at, "stage", 0.5)
        usage = Usage(passes=5 - min(4, len(self.requests)))
        reason = "ok" if request.text[:at].endswith("po") else "empty"
        return InfillResult(
            id="1", seed=0, alternatives=(Alternative((fill,), -1.0),), reason=reason, usage=usage
        )

    def forget(self) -> None:
        self.forgotten.append(len(self.requests))


def test_a_recording_types_the_line_and_takes_every_typo_back() -> None:
    found = record(ITEM, 3)
    assert found == record(ITEM, 3)
    assert found != record(ITEM, 4)
    assert (found.before, found.line, found.after) == (ITEM.before, LINE, ITEM.after)
    assert found.keys[-1] == Keystroke(LINE, True)
    typos = 0
    typed = ""
    for key in found.keys:
        if not LINE.startswith(key.typed):
            typos += 1
            assert LINE.startswith(key.typed[:-1])
            assert key.is_pause
        assert abs(len(key.typed) - len(typed)) == 1
        typed = key.typed
    assert len(found.keys) == len(LINE) + 2 * typos


def test_some_keys_are_wrong_and_pauses_come_every_few() -> None:
    found = [record(dataclasses.replace(ITEM, source=str(n)), 0) for n in range(40)]
    keys = [key for each in found for key in each.keys]
    wrong = [key for key in keys if not LINE.startswith(key.typed)]
    assert 20 <= len(wrong) <= 80
    assert 0.4 < sum(key.is_pause for key in keys) / len(keys) < 0.8
    assert all(each.pauses[0] == "" for each in found)
    assert all(each.pauses[-1] == LINE for each in found)


def test_lines_of_a_usual_length_are_typed() -> None:
    found = recordings(FILES, 6, 0)
    assert found == recordings(FILES, 6, 0)
    assert all(each.line.startswith("total_") for each in found)
    with pytest.raises(RequestError, match="0 lines of 12 to 60 characters in 1 files, 2 are"):
        recordings([SourceFile("p", "p/a.py", "x\ny\n" * 9)], 2, 0)


def test_one_document_stays_warm() -> None:
    engine = Warm()
    recording = record(ITEM, 0)
    asked = replay(engine, recording, "typing-0", 7)
    assert engine.forgotten == [0]
    assert [request.document for request in engine.requests] == ["typing-0"] * len(asked)
    assert [each.typed for each in asked] == recording.pauses
    for request, typed in zip(engine.requests, recording.pauses, strict=True):
        at = len(ITEM.before) + len(typed)
        assert request.text == ITEM.before + typed + ITEM.after
        assert (request.spans[0].start, request.spans[0].end, request.seed) == (at, at, 7)
    assert [each.passes for each in asked[:5]] == [4, 3, 2, 1, 1]
    assert {each.shown for each in asked} <= {"", "stage"}


@pytest.mark.parametrize(
    ("shown", "rest", "verdict"),
    [
        ("b", "b ", "whole"),
        ("b\n", "b", "whole"),
        ("b", "bc", "starts"),
        ("c", "bc", "wrong"),
        ("bcd", "bc", "wrong"),
        ("b", "", "wrong"),
        ("", "", ""),
        (" ", "b", ""),
    ],
)
def test_verdicts(shown: str, rest: str, verdict: str) -> None:
    assert verdict_on(shown, rest) == verdict


def test_every_figure() -> None:
    line = Recording("", "abcd", "\n", ())
    asked = [
        Asked("", "ab", 4, 0, 40.0),
        Asked("a", "bcd", 2, 9, 10.0),
        Asked("ax", "y", 1, 9, 12.0),
        Asked("ay", "", 1, 9, 12.0),
        Asked("ab", "zz", 2, 9, 14.0),
        Asked("abc", "", 2, 9, 10.0),
    ]
    other = [Asked("", "", 6, 0, 60.0), Asked("ab", "", 3, 9, 20.0)]
    assert measure_typing([line, line], [asked, other]) == {
        "recordings": 2,
        "requests": 8,
        "cold_passes": 5.0,
        "median_passes": 2.0,
        # Between 2 and 3 of six values, half the way.
        "p90_passes": 2.5,
        "mean_passes": round(11 / 6, 2),
        "cold_ms": 50.0,
        "warm_ms": 12.0,
        "p90_ms": 17.0,
        "speed_up": round(50 / 12, 2),
        # Without the two requests at a typo: three of six.
        "shown": 0.5,
        "whole": round(1 / 3, 4),
        "starts": round(2 / 3, 4),
        "noise": 0.5,
        "saved": 0.5,
    }


def test_nothing_shown_is_none_not_a_number() -> None:
    found = measure_typing([SHORT], [[Asked("", "", 4, 0, 40.0)]])
    assert (found["whole"], found["starts"], found["noise"]) == (None, None, None)
    assert (found["shown"], found["saved"], found["median_passes"]) == (0.0, 0.0, 4)


def test_only_the_engine_types() -> None:
    said: list[str] = []
    engine = tiny_infiller(max_steps=2)
    names = ["canvas", "oracle_length", "retrieval"]
    found = run_typing(engine, [SHORT], 0, names, said.append)
    assert list(found) == ["canvas"]
    assert found["canvas"]["requests"] == 3
    assert said[0].startswith("typing: canvas saves")
    assert SWITCHES["oracle_length"].knows_length
