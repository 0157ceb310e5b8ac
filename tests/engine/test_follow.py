"""What is typed decides what is left of the texts that were known."""

import pytest

from infilld.engine.follow import Memory, State

BEFORE, AFTER = "def f(self):\n    return ", "\n\nx = 1\n"


def memory(*texts: str, shown: str | None = None, is_settled: bool = True) -> Memory:
    found = Memory()
    state = State(
        before=BEFORE,
        after=AFTER,
        texts=texts or ("self.items", "self.size", "None"),
        shown=shown,
        is_settled=is_settled,
    )
    found.keep("a.py", state)
    return found


def test_texts_that_agree_are_left_in_order() -> None:
    followed = memory(shown="self.items").follow("a.py", BEFORE + "self.", AFTER)
    assert followed is not None
    assert followed.texts == ("items", "size")
    assert followed.shown == "items"
    assert followed.is_settled
    assert followed.is_best
    second = memory().follow("a.py", BEFORE + "N", AFTER)
    assert second is not None
    assert (second.texts, second.is_best) == (("one",), False)


def test_the_same_gap_again_is_known_whole() -> None:
    followed = memory(shown="None").follow("a.py", BEFORE, AFTER)
    assert followed is not None
    assert followed.texts == ("self.items", "self.size", "None")
    assert followed.shown == "None"


def test_what_was_typed_to_its_end_is_no_longer_known() -> None:
    assert memory("None", shown="None").follow("a.py", BEFORE + "None", AFTER) is None
    longer = memory("None", "None or 1", shown="None").follow("a.py", BEFORE + "None", AFTER)
    assert longer is not None
    assert (longer.texts, longer.shown) == ((" or 1",), None)


def test_what_was_asked_otherwise_is_not_followed() -> None:
    found = Memory()
    for bound in (3, None):
        state = State(
            before=BEFORE,
            after=AFTER,
            texts=(str(bound),),
            shown=None,
            is_settled=True,
            asked=(bound,),
        )
        found.keep("a.py", state)
    assert found.follow("a.py", BEFORE, AFTER, (7,)) is None
    followed = found.follow("a.py", BEFORE, AFTER, (None,))
    assert followed is not None
    assert followed.texts == ("None",)


def test_huge_documents_are_not_kept() -> None:
    found = Memory()
    huge = "x" * 2_000_000
    found.keep("a", State(before=huge, after="", texts=("a",), shown=None, is_settled=True))
    assert found.follow("a", huge, "") is None


@pytest.mark.parametrize(
    ("typed", "mended"),
    [("other", ".items"), ("sea", ".items"), ("self,", "items")],
)
def test_a_contradicted_text_keeps_what_stands_behind(typed: str, mended: str) -> None:
    followed = memory("self.items").follow("a.py", BEFORE + typed, AFTER)
    assert followed is not None
    assert followed.texts == ()
    assert followed.mended == mended
    assert not followed.is_settled


def test_where_all_of_it_is_contradicted_nothing_is_left() -> None:
    assert memory("self.items").follow("a.py", BEFORE + "self.other", AFTER) is None


def test_deleted_text_stands_before_what_was_known() -> None:
    followed = memory(shown="self.items").follow("a.py", BEFORE[:-3], AFTER)
    assert followed is not None
    assert followed.texts[0] == "rn self.items"
    assert not followed.is_settled, "what was deleted may be what was wrong"


def test_a_bracket_the_editor_closed_is_taken_off_the_end() -> None:
    found = memory("len(self.items)", "len(self)").follow("a.py", BEFORE + "len(", ")" + AFTER)
    assert found is not None
    assert found.texts == ("self.items", "self")
    # Text that does not end so cannot go on there.
    other = memory("len(self) + 1").follow("a.py", BEFORE + "len(", ")" + AFTER)
    assert other is None


@pytest.mark.parametrize(
    ("document", "before", "after"),
    [
        ("b.py", BEFORE, AFTER),
        ("a.py", BEFORE, AFTER + "more"),
        ("a.py", "import os\n" + BEFORE, AFTER),
        ("a.py", BEFORE + "x" * 500, AFTER),
        ("a.py", BEFORE + "x\n", "y" + AFTER),
    ],
)
def test_other_places_are_not_followed(document: str, before: str, after: str) -> None:
    assert memory().follow(document, before, after) is None


def test_the_newest_state_that_agrees_counts() -> None:
    found = memory("self.items")
    found.keep(
        "a.py",
        State(
            before=BEFORE + "self.items", after=AFTER, texts=("[0]",), shown=None, is_settled=True
        ),
    )
    for typed, texts in (("self", (".items",)), ("self.items", ("[0]",)), ("self.items[", ("0]",))):
        followed = found.follow("a.py", BEFORE + typed, AFTER)
        assert followed is not None
        assert followed.texts == texts


def test_old_documents_and_states_are_forgotten() -> None:
    found = memory()
    for number in range(40):
        found.keep(
            f"{number}.py", State(before="", after="", texts=("x",), shown=None, is_settled=True)
        )
    assert found.follow("a.py", BEFORE, AFTER) is None
    assert found.follow("39.py", "", "") is not None
    found.clear()
    assert found.follow("39.py", "", "") is None
