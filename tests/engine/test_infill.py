"""An infill changes its span and nothing else, whatever the text is and whatever the model says."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_infill import byte_tokenizer, tiny_config, tiny_infiller, tiny_model

from infilld.engine.config import SamplerConfig
from infilld.engine.errors import (
    BadText,
    GapTooLong,
    RequestError,
    SpanOutOfRange,
    SpansOverlap,
    Unsupported,
)
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.request import CanvasUpdate, InfillRequest, Span

ENGINE = tiny_infiller()
TEXT = "def add(a, b):\n    return \n\nprint(add(1, 2))\n"
GAP = TEXT.index("return ") + 7


def request(text: str = TEXT, start: int = GAP, end: int | None = None, **fields: object):
    span = Span(start, start if end is None else end)
    return InfillRequest(text=text, spans=(span,), **{"seed": 1, **fields})  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(
    text=st.text(st.sampled_from("ab(\n\r \t\U0001f600é\u2028"), max_size=60),
    data=st.data(),
)
def test_the_fill_is_text_and_the_rest_is_kept(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    result = ENGINE.infill(request(text, start, end, max_tokens=8))
    for choice in result.alternatives:
        (fill,) = choice.spans
        assert (fill.start, fill.end) == (start, end)
        fill.text.encode()
        if "\r\n" in text:
            assert "\n" not in fill.text.replace("\r\n", "")
    assert bool(result.alternatives) == (result.reason == "ok")


def test_the_same_seed_gives_the_same_fill_with_a_cold_and_a_warm_prefix() -> None:
    engine = tiny_infiller()
    cold, warm = engine.infill(request()), engine.infill(request())
    assert cold.alternatives == warm.alternatives
    assert cold.usage.cached_tokens == 0
    assert warm.usage.cached_tokens == warm.usage.prompt_tokens


def test_a_keystroke_reuses_the_prompt() -> None:
    engine = tiny_infiller()
    engine.infill(request())
    typed = TEXT[:GAP] + "a" + TEXT[GAP:]
    usage = engine.infill(request(typed, GAP + 1)).usage
    assert usage.cached_tokens == usage.prompt_tokens - 1


def test_a_seed_is_drawn_and_told() -> None:
    result = ENGINE.infill(request(seed=None, max_tokens=4))
    again = ENGINE.infill(request(seed=result.seed, max_tokens=4))
    assert again.alternatives == result.alternatives


def test_bounds_hold() -> None:
    tokens = ENGINE.tokenizer.encode
    for choice in ENGINE.infill(request(min_tokens=5, max_tokens=9, alternatives=3)).alternatives:
        # Bytes that form no character are left out of the text, so only the upper bound shows.
        assert len(tokens(choice.spans[0].text)) <= 9


def test_nothing_multi_line_where_text_follows_on_the_line() -> None:
    at = TEXT.index("a, b")
    for seed in range(5):
        for choice in ENGINE.infill(request(start=at, seed=seed)).alternatives:
            assert "\n" not in choice.spans[0].text


def test_control_tokens_in_the_text_are_text() -> None:
    text = "x = '<eos><|filler|>'\n"
    ids = ENGINE.tokenizer.encode(text)
    assert not ENGINE.tokenizer.control_ids & set(ids)
    assert ENGINE.tokenizer.decode(ids) == text.encode()


def test_warm_encodes_and_writes_nothing() -> None:
    engine = tiny_infiller()
    result = engine.infill(request(warm=True))
    assert result.alternatives == ()
    assert result.usage.passes == 0
    assert engine.infill(request()).usage.cached_tokens == result.usage.prompt_tokens


def test_empty_document() -> None:
    result = ENGINE.infill(request("", 0, max_tokens=4))
    assert result.reason in ("ok", "empty")


def test_alternatives_differ_and_come_best_first() -> None:
    choices = ENGINE.infill(request(alternatives=4, max_tokens=12)).alternatives
    texts = [choice.spans[0].text for choice in choices]
    assert len(set(texts)) == len(texts) > 1
    assert [c.score for c in choices] == sorted((c.score for c in choices), reverse=True)
    assert all(0 < c.spans[0].confidence <= 1 for c in choices)


def test_updates_count_up_and_settled_text_is_never_lost_unsaid() -> None:
    seen: list[CanvasUpdate] = []
    ENGINE.infill(request(max_tokens=16), Hooks(on_canvas=seen.append))
    assert [update.seq for update in seen] == list(range(len(seen)))
    for before, after in itertools.pairwise(seen):
        settled = before.spans[0].text[: before.spans[0].settled]
        kept = after.spans[0].text.startswith(settled) and after.spans[0].settled >= len(settled)
        assert kept or after.revised


def test_a_struck_deadline_ends_the_run_after_its_pass() -> None:
    result = ENGINE.infill(request(), Hooks(deadline_at=time.monotonic() - 1))
    assert result.usage.passes == 1
    assert result.reason in ("ok", "deadline")


def test_what_a_check_raises_ends_the_run() -> None:
    calls = itertools.count()

    def check() -> None:
        if next(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        ENGINE.infill(request(), Hooks(check=check))
    assert next(calls) == 4


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"start": len(TEXT) + 1}, SpanOutOfRange),
        ({"start": 5, "end": 4}, SpanOutOfRange),
        ({"text": "\ud800", "start": 0}, BadText),
        ({"alternatives": 0}, RequestError),
        ({"min_tokens": 9, "max_tokens": 3}, RequestError),
        ({"deadline_ms": 0}, RequestError),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)
def test_bad_requests_say_what_is_wrong(fields: dict[str, object], error: type) -> None:
    with pytest.raises(error) as caught:
        request(**fields)
    assert caught.value.remedy


def test_overlapping_spans_are_refused() -> None:
    for spans in ((Span(0, 3), Span(2, 4)), (Span(1, 1), Span(1, 1))):
        with pytest.raises(SpansOverlap):
            InfillRequest(text="abcdef", spans=spans)
    InfillRequest(text="abcdef", spans=(Span(0, 3), Span(3, 4)))


def test_a_gap_that_cannot_fit_is_refused() -> None:
    with pytest.raises(GapTooLong, match="canvas holds"):
        ENGINE.infill(request(max_tokens=500))
    with pytest.raises(GapTooLong, match="selection"):
        ENGINE.infill(request("x" * 400, 10, 390))


def test_what_this_model_cannot_do_is_said() -> None:
    with pytest.raises(Unsupported, match="instructions"):
        ENGINE.infill(request(instruction="make it fast"))
    with pytest.raises(Unsupported, match="2 spans"):
        ENGINE.infill(InfillRequest(text="ab", spans=(Span(0, 0), Span(1, 1))))
    chat = byte_tokenizer(controls=("<pad>", "<eos>", "<bos>"))
    engine = Infiller(tiny_model(tiny_config(chat.vocab_tokens)), chat, SamplerConfig())
    with pytest.raises(Unsupported, match="filler"):
        engine.infill(request())
