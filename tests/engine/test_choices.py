"""The tokens of a fill: together its text, each with what the encoder thinks of it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_infill import tiny_infiller

from infilld.engine.choices import Choice, GapResult, scored_tokens, with_choices
from infilld.engine.passages import passage_of, targets_of
from infilld.engine.passes import drive
from infilld.engine.prefixes import PrefixPool
from infilld.engine.request import InfillRequest, InfillResult, Pin, Span, SpanFill
from infilld.engine.scorer import score

ENGINE = tiny_infiller()
TEXT = "def add(a, b):\n    return \n\nprint(add(1, 2))\n"
GAP = TEXT.index("return ") + 7


def infilled(text: str = TEXT, start: int = GAP, end: int = GAP, **more: object) -> InfillResult:
    asked = InfillRequest(text=text, spans=(Span(start, end),), **{"seed": 1, **more})  # type: ignore[arg-type]
    return ENGINE.infill(asked)


def text_of(fill: SpanFill) -> str:
    return "".join(token.text for token in fill.tokens)


@given(st.text(max_size=12), st.text(max_size=4), st.data())
def test_tokens_together_are_the_text_however_it_is_cut(
    text: str, stem: str, data: st.DataObject
) -> None:
    whole = (stem + text).encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))) | {0, len(whole)})
    pieces = [whole[a:b] for a, b in itertools.pairwise(cuts)]
    found = scored_tokens(pieces, [-1.0 * n for n in range(len(pieces) + 3)], stem)
    assert "".join(token.text for token in found) == text
    # Each keeps its own number, and those of the stem alone are left out.
    assert [token.log_probability for token in found] == [
        -1.0 * n for n, end in enumerate(cuts[1:]) if end > len(stem.encode())
    ]


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", "\r\n"), "x = é\nret"])
def test_a_fill_is_told_token_by_token(text: str) -> None:
    at = text.index("return ") + 7 if "return" in text else len(text)
    found = False
    for seed in range(4):
        result = infilled(text, at, at, seed=seed, alternatives=3, max_tokens=10)
        for choice in result.alternatives:
            (fill,) = choice.spans
            assert text_of(fill) == fill.text
            assert all(token.log_probability <= 0 for token in fill.tokens)
            found = True
        if result.alternatives:
            assert result.usage.text_tokens == len(result.alternatives[0].spans[0].tokens)
    assert found


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_ends_of_tokens_are_the_documents(newline: str) -> None:
    asked = InfillRequest(text=newline, spans=(Span(0, 0),))
    tokens = scored_tokens([b"a\n", b"b"], [-1.0, -2.0])
    choice = Choice("a\nb", 0.5, -1.5, tokens)
    result = GapResult(choices=(choice,), reason="ok", why="", texts=("a\nb",))
    made = with_choices(asked, InfillResult(id="", seed=1), targets_of(asked), [result])
    (fill,) = made.alternatives[0].spans
    assert fill.text == f"a{newline}b"
    assert [token.text for token in fill.tokens] == [f"a{newline}", "b"]


def test_log_probabilities_are_the_scorers() -> None:
    result = infilled(max_tokens=8)
    (fill,) = result.alternatives[0].spans
    asked = InfillRequest(text=TEXT, spans=(Span(GAP, GAP),))
    prompt = ENGINE._planner.prompt(asked, passage_of(TEXT, targets_of(asked)))
    prefix, _ = drive(ENGINE.model, PrefixPool(ENGINE.model).encoding(prompt.ids, lambda: None))
    (logs,) = score(ENGINE.model, prefix, [ENGINE.tokenizer.encode(fill.text)])
    assert [token.log_probability for token in fill.tokens] == pytest.approx(
        logs.tolist(), abs=1e-4
    )


def test_what_was_not_scored_as_a_whole_has_no_tokens() -> None:
    pinned = infilled(pins=(Pin(0, "start", "self."),), max_tokens=8)
    for choice in pinned.alternatives:
        assert choice.spans[0].tokens == ()
    assert not pinned.alternatives or pinned.usage.text_tokens > 0
    long = "".join(f"value_{number} = {number}\n" for number in range(20))
    rewritten = infilled(long, 0, len(long), instruction="Rename.")
    assert rewritten.alternatives
    assert rewritten.alternatives[0].spans[0].tokens == ()
    assert rewritten.usage.text_tokens > 0


def test_tokens_of_several_gaps_are_counted_together() -> None:
    places = (GAP, TEXT.index("1, 2"))
    asked = InfillRequest(
        text=TEXT, spans=tuple(Span(at, at) for at in places), seed=1, max_tokens=8
    )
    result = ENGINE.infill(asked)
    spans = result.alternatives[0].spans
    assert [text_of(fill) for fill in spans] == [fill.text for fill in spans]
    assert result.usage.text_tokens == sum(len(fill.tokens) for fill in spans) > 0
