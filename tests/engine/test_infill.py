"""An infill changes its span and nothing else, whatever the text is and whatever the model says."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_infill import byte_tokenizer, tiny_config, tiny_infiller, tiny_model

from infilld.engine import gap
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
from infilld.engine.lines import line_end
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
        kinds = {
            "\r\n": fill.text.count("\r\n"),
            "\n": fill.text.replace("\r\n", "").count("\n"),
            "\r": fill.text.replace("\r\n", "").count("\r"),
        }
        assert {end for end, count in kinds.items() if count} <= {line_end(text, start)}
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


def settled_is_kept(seen: list[CanvasUpdate]) -> bool:
    """Every settled text stands at the start of the next draft, or that draft says otherwise."""
    for before, after in itertools.pairwise(seen):
        settled = before.spans[0].text[: before.spans[0].settled]
        kept = after.spans[0].text.startswith(settled) and after.spans[0].settled >= len(settled)
        if not kept and not after.revised:
            return False
    return True


def test_updates_count_up_and_settled_text_is_never_lost_unsaid() -> None:
    for seed in range(8):
        seen: list[CanvasUpdate] = []
        # Few tokens first, so that some of the gaps grow.
        ENGINE.infill(request(TEXT, TEXT.index("1, 2"), seed=seed), Hooks(on_canvas=seen.append))
        assert [update.seq for update in seen] == list(range(len(seen)))
        assert settled_is_kept(seen)


def test_nothing_is_settled_while_rows_compete() -> None:
    seen: list[CanvasUpdate] = []
    ENGINE.infill(request(alternatives=3), Hooks(on_canvas=seen.append))
    assert {update.spans[0].settled for update in seen} == {0}


def test_a_deadline_that_struck_before_starts_nothing() -> None:
    result = tiny_infiller().infill(request(), Hooks(deadline_at=time.monotonic() - 1))
    assert (result.reason, result.usage.passes) == ("deadline", 0)
    assert result.why


@pytest.mark.parametrize("shown", [0.0001, 1.1], ids=["all is certain", "nothing is"])
def test_a_deadline_cuts_what_is_uncertain(shown: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap, "_SHOWN_PROBABILITY", shown)
    struck = time.monotonic() + 0.2
    seen: list[CanvasUpdate] = []

    def watch(update: CanvasUpdate) -> None:
        seen.append(update)
        time.sleep(max(0.0, struck - time.monotonic()))

    result = ENGINE.infill(request(), Hooks(on_canvas=watch, deadline_at=struck))
    assert result.usage.passes == 1
    texts = [choice.spans[0].text for choice in result.alternatives]
    assert texts == ([seen[0].spans[0].text] if shown < 1 else [])
    assert result.reason == ("ok" if texts else "deadline")


def test_a_deadline_far_away_cuts_nothing() -> None:
    late = ENGINE.infill(request(), Hooks(deadline_at=time.monotonic() + 3600))
    assert late.alternatives == ENGINE.infill(request()).alternatives


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
        ({"deadline_ms": 10**400}, RequestError),
        ({"seed": 2**63}, RequestError),
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
    with pytest.raises(GapTooLong, match="selection"):
        ENGINE.infill(request("x" * 400, 10, 390, warm=True))


def test_a_huge_selection_is_refused_at_once() -> None:
    text = "x = 1\n" * 400_000
    began = time.monotonic()
    with pytest.raises(GapTooLong, match="at least"):
        ENGINE.infill(request(text, 0, len(text)))
    assert time.monotonic() - began < 2


def test_what_this_model_cannot_do_is_said() -> None:
    with pytest.raises(Unsupported, match="instructions"):
        ENGINE.infill(request(instruction="make it fast"))
    with pytest.raises(Unsupported, match="2 spans"):
        ENGINE.infill(InfillRequest(text="ab", spans=(Span(0, 0), Span(1, 1))))
    chat = byte_tokenizer(controls=("<pad>", "<eos>", "<bos>"))
    engine = Infiller(tiny_model(tiny_config(chat.vocab_tokens)), chat, SamplerConfig())
    with pytest.raises(Unsupported, match="filler"):
        engine.infill(request())
