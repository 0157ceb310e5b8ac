"""What is asked of a chat model, and what is read out of its answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infilld.engine.errors import ContextTooLong
from infilld.engine.request import Context
from infilld.server.remote.questions import Place, code_in, draft_in, fill_in, question

BEFORE = "import os\n\n\ndef size(path):\n    return "
AFTER = "\n\n\nprint(size('.'))\n"
PLACE = Place(before=BEFORE, after=AFTER, path="sizes.py", language="python")

LINES = st.text(st.sampled_from("ab (){}=.\t"), max_size=12)
TEXTS = st.lists(LINES, max_size=4).map("\n".join)


def read(answer: str, place: Place = PLACE) -> str | None:
    found = code_in(answer, place)
    return None if found is None else fill_in(found.code, place)


def test_the_question_shows_the_file_with_a_mark_in_it() -> None:
    asked = question(PLACE, 10_000)
    assert f"{BEFORE}<gap>{AFTER}" in asked
    assert "sizes.py" in asked
    assert "```python\n" in asked


def test_a_document_with_marks_and_fences_gets_others() -> None:
    place = Place(before="<gap>\n```\n", after="\n```\n")
    asked = question(place, 10_000)
    assert "<gap>\n```\n<gap-2>\n```\n" in asked
    assert asked.endswith("````")
    assert "4 backticks" in asked


def test_typing_changes_only_the_end_of_a_question() -> None:
    context = [Context("other.py", "def other(): ...\n")]
    one = question(Place(before="x = 1\ny =", after="\n", context=context), 10_000)
    two = question(Place(before="x = 1\ny = f", after="\n", context=context), 10_000)
    assert two.startswith(one[: one.rindex("<gap>")])


def test_a_rewrite_shows_instruction_selection_and_both_sides() -> None:
    place = Place(before="a\n", selection="b\n", after="c\n", instruction="  shout ")
    asked = question(place, 10_000)
    assert "a\n<selection>b\n</selection>c\n" in asked
    assert "\nshout\n" in asked


def test_a_draft_is_shown() -> None:
    assert "os.stat(path)" in question(
        Place(before=BEFORE, after=AFTER, draft="os.stat(path)"), 10_000
    )


@given(TEXTS, TEXTS, st.integers(900, 3000), st.booleans())
def test_a_question_never_exceeds_its_budget(
    before: str, after: str, budget: int, has_context: bool
) -> None:
    context = [Context("a.py", after * 50)] if has_context else []
    place = Place(before=before * 100, after=after * 100, context=context)
    assert len(question(place, budget)) <= budget


def test_a_selection_that_does_not_fit_is_refused() -> None:
    place = Place(before="", after="", selection="x" * 5000, instruction="shorten")
    with pytest.raises(ContextTooLong) as raised:
        question(place, 3000)
    assert raised.value.remedy


@pytest.mark.parametrize(
    "answer",
    [
        "```python\n    return os.stat(path).st_size\n```",
        "Sure! Here it is:\n\n```\n    return os.stat(path).st_size\n```\nIt asks the system.",
        "```python\nreturn os.stat(path).st_size\n```",
        "```python\nos.stat(path).st_size\n```",
        "~~~\n    return os.stat(path).st_size\n~~~",
        "```python\ndef size(path):\n    return os.stat(path).st_size\n```",
        f"```python\n{BEFORE}os.stat(path).st_size{AFTER}```",
        "<think>```\nno\n```</think>\n```python\n    return os.stat(path).st_size\n```",
        "    return os.stat(path).st_size",
        "```python\n    return os.stat(path).st_size",
    ],
)
def test_the_missing_text_is_found_in_every_usual_answer(answer: str) -> None:
    assert read(answer) == "os.stat(path).st_size"


@pytest.mark.parametrize("answer", ["", "I cannot help with that.", "Use os.stat, of course."])
def test_words_are_no_code(answer: str) -> None:
    assert read(answer) is None


def test_what_follows_in_the_line_is_cut_off() -> None:
    place = Place(before="x = f(", after=")\ny = 2\n")
    assert read("```\nx = f(a, b)\n```", place) == "a, b"
    assert read("```\nx = f(a, b)\ny = 2\n```", place) == "a, b"
    assert read("```\nx = f((a), b)\n```", place) == "(a), b"


def test_lines_keep_their_indentation() -> None:
    place = Place(before="def f():\n    ", after="\n")
    both = "if a:\n        b()\n    c()"
    assert read(f"```\n    {both}\n```", place) == both
    assert read("```\nif a:\n    b()\nc()\n```", place) == both
    assert read(f"```\n{both}\n```", place) == both
    assert read("```\nif a:\n    b()\n```", place) == "if a:\n        b()"


def test_whole_lines_stay_whole_lines() -> None:
    place = Place(before="a\n", selection="b\n", after="c\n", instruction="double")
    assert read("```\nb\nb\n```", place) == "b\nb\n"
    assert read("```\na\nb2\nc\n```", place) == "b2\n"


def test_an_answer_in_a_shape_is_taken_as_it_is() -> None:
    place = Place(before="x = ", after="\n", has_shape=True)
    assert read('{"a": "```"}', place) == '{"a": "```"}'
    assert "code block" in question(place, 10_000)


def test_drafts_begin_behind_what_is_given() -> None:
    assert draft_in("Sure", PLACE) is None
    assert draft_in("```python\n    ret", PLACE) == ""
    assert draft_in("```python\n    return os.s", PLACE) == "os.s"


@given(TEXTS, TEXTS, TEXTS, st.text(max_size=80))
def test_no_answer_breaks_the_reading(before: str, after: str, selection: str, said: str) -> None:
    for instruction in (None, "do"):
        place = Place(before=before, after=after, selection=selection, instruction=instruction)
        for answer in (said, f"```\n{said}\n```", f"```\n{said}"):
            read(answer, place)
            draft_in(answer, place)


@given(TEXTS, st.from_regex(r"[a-z]{1,4} ?= ?[a-z]{1,4}", fullmatch=True))
def test_whole_lines_around_a_gap_give_back_the_gap(before: str, fill: str) -> None:
    """A model that does as it is told loses nothing."""
    place = Place(before=before, after="\nzz\n")
    assert read(f"```\n{place.lead}{fill}\n```", place) == fill
