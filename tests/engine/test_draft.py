"""A canvas token by token: what each position holds, and what becomes of it."""

from collections.abc import Sequence

import pytest
import torch
from tiny_infill import byte_tokenizer, tiny_infiller

from infilld.engine import draft
from infilld.engine.canvas import CanvasLayout, Gap
from infilld.engine.draft import DraftReader
from infilld.engine.infill import Hooks
from infilld.engine.prompt import FILLER
from infilld.engine.request import CanvasToken, CanvasUpdate, InfillRequest, Span
from infilld.engine.sampler import Step

TOKENIZER = byte_tokenizer()
FILLER_ID = TOKENIZER.control(FILLER)
assert FILLER_ID is not None


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text)


def step(rows: Sequence[Sequence[int]], sure: float = 0.99, accepted: bool = False) -> Step:
    argmax = torch.tensor(rows)
    shape = argmax.shape
    return Step(
        index=0,
        canvas=argmax,
        argmax=argmax,
        log_probability=torch.full(shape, sure).log(),
        entropy_nats=torch.full(shape, 0.25),
        accepted=torch.full(shape, accepted),
        belief=torch.empty(0),
    )


def reader(newlines: Sequence[str] = ("\n",)) -> DraftReader:
    return DraftReader(TOKENIZER, FILLER_ID, newlines, shows_tokens=True)


def gap(tokens: int, stem: str = "") -> Gap:
    return Gap(tokens=tokens, limit_tokens=tokens, stem=stem)


def states(tokens: Sequence[CanvasToken]) -> str:
    return "".join(each.state[0] for each in tokens)


def test_positions_are_told_in_the_order_of_the_canvas() -> None:
    """Two gaps, the text between them, and the head; line ends are the document's."""
    layout = CanvasLayout((gap(3), gap(2)), (tuple(ids("\n-")), tuple(ids(")"))))
    row = [*ids("a\n"), FILLER_ID, *ids("\n-"), *ids("bc"), *ids(")")]
    found = reader(("\r\n", "\n")).read(step([row]), layout)
    assert [each.text for each in found.tokens] == ["a", "\r\n", "", "\r\n", "-", "b", "c", ")"]
    assert [each.span for each in found.tokens] == [0, 0, 0, None, None, 1, 1, None]
    assert [each.is_filler for each in found.tokens] == [False, False, True] + [False] * 5
    assert [each.entropy_nats for each in found.tokens] == [0.25] * 3 + [0.0] * 2 + [0.25] * 2 + [0]
    assert states(found.tokens) == "nnnggnng"
    assert [each.text for each in found.spans] == ["a\r\n", "bc"]


def test_a_token_settles_when_it_stays_and_is_certain() -> None:
    layout, read = CanvasLayout((gap(2),), ((),)), reader()
    assert states(read.read(step([ids("ab")]), layout).tokens) == "nn"
    assert states(read.read(step([ids("ac")], accepted=True), layout).tokens) == "sa"
    assert states(read.read(step([ids("ac")], sure=0.5), layout).tokens) == "nn"


def test_of_several_rows_tokens_settle_and_text_does_not() -> None:
    """What is shown of the best row compares it with itself, not with the best before."""
    layout, read = CanvasLayout((gap(2),), ((),)), reader()
    read.read(step([ids("ab"), ids("xy")]), layout)
    better = step([ids("ab"), ids("xz")])
    better.log_probability[0] -= 0.5
    found = read.read(better, layout)
    assert [each.text for each in found.tokens] == ["x", "z"]
    assert (states(found.tokens), found.spans[0].settled) == ("sn", 0)


def test_the_row_that_is_shown_is_the_one_whose_text_is_most_probable() -> None:
    """Whatever certain fillers stand around a text that is not."""
    layout = CanvasLayout((gap(4),), ((),))
    rows = step([ids("abcd"), [*ids("?"), *[FILLER_ID] * 3], [FILLER_ID] * 4])
    rows.log_probability[0] -= 0.5
    rows.log_probability[1, 0] -= 1.0
    assert reader().read(rows, layout).spans[0].text == "abcd"
    nothing = step([[FILLER_ID] * 4])
    assert reader().read(nothing, layout).spans[0].text == ""


def test_parts_of_characters_are_marked_and_the_stem_is_not_told_again() -> None:
    layout = CanvasLayout((gap(3, stem="d"),), ((),))
    found = reader().read(step([[*ids("d"), *ids("é")]]), layout)
    part = "\N{REPLACEMENT CHARACTER}"
    assert [each.text for each in found.tokens] == ["", part, part]
    assert found.spans[0].text == "é"


def watched(**fields: object) -> list[CanvasUpdate]:
    seen: list[CanvasUpdate] = []
    wanted = InfillRequest(**{"seed": 1, "shows_tokens": True, **fields})  # type: ignore[arg-type]
    tiny_infiller().infill(wanted, Hooks(on_canvas=seen.append))
    assert seen
    return seen


def plain(text: str) -> str:
    return "".join(each for each in text if each.isascii())


def drafted(update: CanvasUpdate, span: int) -> str:
    return plain("".join(each.text for each in update.tokens if each.span == span))


def test_tokens_cost_nothing_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(draft, "canvas_tokens")
    spans = (Span(4, 4),)
    assert not any(each.tokens for each in watched(text="x = \n", spans=spans, shows_tokens=False))


def test_tokens_of_a_gap_read_as_its_draft() -> None:
    for update in watched(text="x = \n", spans=(Span(4, 4),), max_tokens=12):
        assert drafted(update, 0) == plain(update.spans[0].text)
        given = "".join(each.text for each in update.tokens if each.state == "given")
        assert given == "\n"
        assert all(each.entropy_nats >= 0 for each in update.tokens)


def test_gaps_of_one_canvas_and_of_several_are_told_by_the_span_they_belong_to() -> None:
    text = "a = \n" + "b = 1\n" * 40 + "c = \n d = \n"
    places = (text.index("a =") + 4, text.index("c =") + 4, text.index("d =") + 4)
    updates = watched(text=text, spans=tuple(Span(at, at) for at in places), max_tokens=8)
    for update in updates:
        numbers = [each.span for each in update.tokens if each.span is not None]
        assert numbers == sorted(numbers)
        for number, span in enumerate(update.spans):
            assert drafted(update, number) == plain(span.text)
    assert {each.span for each in updates[-1].tokens} == {None, 0, 1, 2}


def test_of_a_long_rewrite_the_canvas_that_is_written_is_told() -> None:
    text = "".join(f"value_{number} = {number}\n" for number in range(20))
    updates = watched(text=text, spans=(Span(0, len(text)),), instruction="Rename.")
    assert {update.canvas for update in updates} >= {0, 1, 2}
    for update in updates:
        assert 0 < len(update.tokens) <= 128
        assert {each.span for each in update.tokens} <= {0, None}
