"""Spans become targets, passages and back, and nothing outside them changes."""

from hypothesis import assume, given
from hypothesis import strategies as st

from infilld.engine.passages import composed, passage_of, targets_of
from infilld.engine.request import InfillRequest, Pin, Span

TEXT = "one two\r\nthree four\r\nfive"


def request(*spans: tuple[int, int], text: str = TEXT, **more: object) -> InfillRequest:
    return InfillRequest(text=text, spans=tuple(Span(*span) for span in spans), **more)  # type: ignore[arg-type]


def test_targets_stand_in_the_order_of_the_document() -> None:
    targets = targets_of(request((9, 14), (0, 3)))
    assert [target.number for target in targets] == [1, 0]
    assert [target.selection for target in targets] == ["one", "three"]
    passage = passage_of(TEXT, targets)
    assert (passage.before, passage.between, passage.after) == ("", (" two\n",), " four\nfive")


def test_pins_become_part_of_what_stays() -> None:
    pins = (Pin(0, "end", "!"), Pin(1, "start", "a\r\n"), Pin(1, "end", "z"))
    targets = targets_of(request((0, 3), (9, 14), pins=pins))
    passage = passage_of(TEXT, targets)
    assert passage.between == ("! two\na\n",)
    assert passage.after == "z four\nfive"


def test_a_draft_is_the_whole_result() -> None:
    pins = (Pin(0, "start", "self."),)
    (whole,) = targets_of(request((0, 0), pins=pins, drafts=("self.items",)))
    (rest,) = targets_of(request((0, 0), pins=pins, drafts=("items",)))
    assert whole.draft == rest.draft == "items"


def test_what_stands_around_a_target_holds_the_fills_before_it() -> None:
    passage = passage_of(TEXT, targets_of(request((0, 3), (9, 14), (21, 22))))
    before, after = passage.around(1, ["ONE"])
    assert before + "three" + after == "ONE two\nthree four\nfive"


@given(text=st.text(st.sampled_from("ab\n\U0001f600 "), max_size=40), data=st.data())
def test_everything_but_the_spans_stays(text: str, data: st.DataObject) -> None:
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    spans = list(zip(places[::2], places[1::2], strict=False))
    assume(spans)
    wanted = request(*spans, text=text)
    targets = targets_of(wanted)
    new = text
    for number, (start, end) in reversed(list(enumerate(spans))):
        (target,) = (each for each in targets if each.number == number)
        replaced = composed(wanted, number, [(target, "NEW")])
        assert replaced == "NEW"
        new = new[:start] + replaced + new[end:]
    passage = passage_of(text, targets)
    expected = passage.before
    for between in (*passage.between, passage.after):
        expected += "NEW" + between
    assert new == expected


def test_a_piece_that_stays_keeps_its_own_line_ends() -> None:
    text = "a\r\nb\nc\rd"
    wanted = request((0, len(text)), text=text)
    (target,) = targets_of(wanted)
    assert composed(wanted, 0, [(target, None)]) == text
    assert composed(wanted, 0, []) == text
