"""An infill changes its span and nothing else, whatever the text is and whatever the model says."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_infill import byte_tokenizer, tiny_config, tiny_infiller, tiny_model

from infilld.engine import filling
from infilld.engine.config import SamplerConfig
from infilld.engine.errors import (
    BadText,
    GapTooLong,
    RequestError,
    SpanOutOfRange,
    SpansOverlap,
    UnknownOption,
    Unsupported,
)
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.lines import line_end
from infilld.engine.pace import Pace
from infilld.engine.passages import targets_of
from infilld.engine.passes import CanvasPass
from infilld.engine.plan import FillMethod
from infilld.engine.ranking import Weighed
from infilld.engine.reading import Belief, Reading
from infilld.engine.request import CanvasUpdate, Context, InfillRequest, InfillResult, Pin, Span

ENGINE = tiny_infiller()
TEXT = "def add(a, b):\n    return \n\nprint(add(1, 2))\n"
GAP = TEXT.index("return ") + 7


def request(text: str = TEXT, start: int = GAP, end: int | None = None, **fields: object):
    span = Span(start, start if end is None else end)
    return InfillRequest(text=text, spans=(span,), **{"seed": 1, **fields})  # type: ignore[arg-type]


def texts(result: InfillResult) -> list[str]:
    return [span.text for choice in result.alternatives for span in choice.spans]


@settings(max_examples=25, deadline=None)
@given(
    text=st.text(st.sampled_from("ab(\n\r \t\U0001f600é\u2028"), max_size=60),
    data=st.data(),
)
def test_the_fill_is_text_and_the_rest_is_kept(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    assume(all(text[at - 1 : at + 1] != "\r\n" for at in (start, end) if at))
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
    assert texts(cold) == texts(warm)
    assert cold.usage.cached_tokens == 0
    assert warm.usage.cached_tokens == warm.usage.prompt_tokens


def test_a_keystroke_reuses_the_prompt() -> None:
    engine = tiny_infiller()
    engine.infill(request())
    typed = TEXT[:GAP] + "a" + TEXT[GAP:]
    usage = engine.infill(request(typed, GAP + 1)).usage
    # The unfinished word is read again with what is written; all before it was there.
    assert usage.cached_tokens == usage.prompt_tokens


def test_a_seed_is_drawn_and_told() -> None:
    result = ENGINE.infill(request(seed=None, max_tokens=4))
    again = ENGINE.infill(request(seed=result.seed, max_tokens=4))
    assert texts(again) == texts(result)


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
    different = {choice.spans[0].text for choice in choices}
    assert len(different) == len(choices) > 1
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
    monkeypatch.setattr(filling, "_SHOWN_PROBABILITY", shown)
    # What was measured before is forgotten: a slow moment would leave no time for a pass.
    monkeypatch.setattr(ENGINE, "pace", Pace())
    struck = time.monotonic() + 0.2
    seen: list[CanvasUpdate] = []

    def watch(update: CanvasUpdate) -> None:
        seen.append(update)
        time.sleep(max(0.0, struck - time.monotonic()))

    result = ENGINE.infill(request(), Hooks(on_canvas=watch, deadline_at=struck))
    assert result.usage.passes == 1
    shown_texts = texts(result)
    assert shown_texts == ([seen[0].spans[0].text] if shown < 1 else [])
    assert result.reason == ("ok" if shown_texts else "deadline")


def test_a_deadline_far_away_cuts_nothing() -> None:
    late = ENGINE.infill(request(), Hooks(deadline_at=time.monotonic() + 3600))
    assert texts(late) == texts(ENGINE.infill(request()))


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
        ({"text": "a\r\nb", "start": 2}, SpanOutOfRange),
        ({"text": "\ud800", "start": 0}, BadText),
        ({"instruction": "\ud800"}, BadText),
        ({"context": (Context("a.py", "\udfff"),)}, BadText),
        ({"drafts": ("a", "b")}, UnknownOption),
        ({"pins": (Pin(1, "start", "a"),)}, UnknownOption),
        ({"pins": (Pin(0, "start", "a"), Pin(0, "start", "b"))}, UnknownOption),
        ({"repair": ()}, UnknownOption),
        ({"end": GAP + 3, "repair": (Span(0, 2),)}, SpanOutOfRange),
        ({"boldness": 1.5}, UnknownOption),
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
    for warm in (False, True):
        with pytest.raises(GapTooLong, match="a line of the selection"):
            ENGINE.infill(request("x" * 400, 10, 390, warm=warm))


def test_a_huge_selection_is_refused_at_once() -> None:
    text = "x = 1\n" * 400_000
    began = time.monotonic()
    with pytest.raises(GapTooLong, match="canvases"):
        ENGINE.infill(request(text, 0, len(text)))
    assert time.monotonic() - began < 2


def test_what_this_model_cannot_do_is_said() -> None:
    with pytest.raises(Unsupported, match="think"):
        ENGINE.infill(request(think=True))
    chat = byte_tokenizer(controls=("<pad>", "<eos>", "<bos>"))
    with pytest.raises(Unsupported, match="infill tokens"):
        Infiller(tiny_model(tiny_config(chat.vocab_tokens)), chat, SamplerConfig())


def spans_request(*spans: tuple[int, int], text: str = TEXT, **fields: object) -> InfillRequest:
    return InfillRequest(
        text=text,
        spans=tuple(Span(*span) for span in spans),
        **{"seed": 1, **fields},  # type: ignore[arg-type]
    )


def test_several_spans_are_filled_on_one_canvas_in_the_order_asked() -> None:
    at = TEXT.index("1, 2")
    result = ENGINE.infill(spans_request((at, at + 1), (GAP, GAP), max_tokens=8))
    (choice,) = result.alternatives
    assert [(span.start, span.end) for span in choice.spans] == [(at, at + 1), (GAP, GAP)]
    alone = ENGINE.infill(spans_request((GAP, GAP), max_tokens=8))
    assert result.usage.prompt_tokens < 2 * alone.usage.prompt_tokens


def test_spans_far_apart_share_passes_and_not_a_canvas() -> None:
    text = TEXT + "# " + "x" * 200 + "\n" + TEXT
    far = len(TEXT) + 203 + GAP
    both = ENGINE.infill(spans_request((GAP, GAP), (far, far), text=text, max_tokens=8, seed=2))
    each = [
        ENGINE.infill(spans_request((at, at), text=text, max_tokens=8, seed=2)) for at in (GAP, far)
    ]
    assert len(both.alternatives[0].spans) == 2
    assert both.usage.canvas_tokens == sum(one.usage.canvas_tokens for one in each)
    assert both.usage.passes == max(one.usage.passes for one in each)
    assert texts(both) == texts(each[0]) + texts(each[1])


def test_pins_hold() -> None:
    pins = (Pin(0, "start", "a +"), Pin(0, "end", "# sum"))
    result = ENGINE.infill(request(pins=pins, alternatives=3, max_tokens=8))
    assert result.alternatives
    for text in texts(result):
        assert text.startswith("a +")
        assert text.endswith("# sum")


def test_the_answer_may_be_the_draft() -> None:
    engine = tiny_infiller()
    seen: list[Weighed] = []
    engine.infill(request(drafts=("a + b",)), Hooks(on_weighed=seen.extend))
    assert "a + b" in [each.candidate.text for each in seen]


def test_a_draft_with_the_whole_canvas_known_is_told_to_the_first_pass() -> None:
    engine = tiny_infiller()
    told: list[CanvasPass] = []
    plain = engine.model.run

    def spy(passes: Sequence[CanvasPass]) -> list[Reading]:
        told.extend(passes)
        return plain(passes)

    engine.model.run = spy  # type: ignore[method-assign]
    engine.infill(request(drafts=("a + b",)))
    first = told[0]
    assert isinstance(first.belief, Belief)
    tokens = engine.tokenizer.encode("a + b")
    # Row 0 starts from the draft: each of its tokens is certain, as are the fillers behind it.
    assert first.canvas[0, :5].tolist() == tokens
    assert first.belief.probabilities[0].sum(-1).min() == 1.0
    assert first.belief.ids[0, :5, 0].tolist() == tokens
    # The other row starts from noise: nothing is known of its gap.
    assert first.belief.probabilities[1, :5].max() == 0.0


def test_a_long_selection_is_rewritten_canvas_after_canvas() -> None:
    lines = "".join(f"value_{n} = compute({n})\n" for n in range(12))
    text = TEXT + lines + "end\n"
    seen: list[CanvasUpdate] = []
    result = ENGINE.infill(
        request(text, len(TEXT), len(TEXT + lines), instruction="add 1"),
        Hooks(on_canvas=seen.append),
    )
    assert {update.canvas for update in seen} == set(range(max(u.canvas for u in seen) + 1))
    assert seen[-1].canvas > 1
    (choice,) = result.alternatives
    assert (choice.spans[0].start, choice.spans[0].end) == (len(TEXT), len(TEXT + lines))
    # What was written stays when the next canvas begins.
    passes = [update.passes for update in seen]
    assert passes == sorted(passes)
    assert result.usage.passes == passes[-1]


def test_a_rewrite_is_not_the_old_text() -> None:
    engine = tiny_infiller()
    seen: list[Weighed] = []
    engine.infill(request(start=GAP - 7, end=GAP), Hooks(on_weighed=seen.extend))
    assert "return " not in [each.candidate.text for each in seen]


def test_a_repair_changes_what_is_suspected_alone() -> None:
    text = "total = count + 1\nprint(totl)\n"
    at = text.index("totl")
    result = ENGINE.infill(request(text, 0, len(text), repair=(Span(at, at + 1),)))
    for fixed in texts(result):
        assert fixed.startswith(text[:at])
        assert fixed.endswith(text[at + 4 :])


def test_a_repair_finds_what_is_unlikely_by_itself() -> None:
    text = "total = count + 1\nprint(totl)\n"
    result = ENGINE.infill(request(text, 8, 17, repair=()))
    assert result.reason in ("ok", "empty", "low_confidence")
    for fixed in texts(result):
        assert len(fixed) < 40


def test_typing_on_is_followed() -> None:
    engine = tiny_infiller()
    first = engine.infill(request(document="a", max_tokens=12))
    (shown,) = texts(first)
    typed = TEXT[:GAP] + shown[:2] + TEXT[GAP:]
    second = engine.infill(request(typed, GAP + 2, document="a", max_tokens=12))
    assert second.usage.passes <= 3
    seen: list[Weighed] = []
    engine.infill(
        request(typed, GAP + 2, document="a", max_tokens=12), Hooks(on_weighed=seen.extend)
    )
    assert shown[2:] in [each.candidate.text for each in seen]
    # Another document's typing is not.
    other = engine.infill(request(typed, GAP + 2, document="b", max_tokens=12))
    assert other.usage.passes > 3


def test_binary_text_is_left_alone() -> None:
    result = ENGINE.infill(request("a\0b", 1))
    assert (result.reason, result.usage.passes) == ("filtered", 0)
    assert "NUL" in result.why


def test_a_passage_that_cannot_be_filled_leaves_the_others_alone() -> None:
    # Half of a vocabulary of bytes are no characters, so some texts come out empty.
    at = TEXT.index("1, 2")
    result = ENGINE.infill(spans_request((at, at + 1), (GAP, GAP), max_tokens=1, seed=5))
    if result.alternatives:
        for span in result.alternatives[0].spans:
            assert span.confidence > 0 or span.text == TEXT[span.start : span.end]


def test_exact_lengths_are_tried_without_a_filler() -> None:
    method = FillMethod(searches_length=True, holds_back=False, trims=False, found_drafts=0)
    bare = tiny_infiller()
    engine = Infiller(bare.model, bare.tokenizer, bare.sampler, method)
    passes: list[int] = []
    plain = engine.model.run

    def spy(wanted: Sequence[CanvasPass]) -> list[Reading]:
        passes.append(len(wanted))
        return plain(wanted)

    engine.model.run = spy  # type: ignore[method-assign]
    result = engine.infill(request())
    assert result.usage.passes == len(passes)
    assert passes[0] == 7, "a probing pass over every length of a tail"
    assert max(passes[1:]) == 3, "then the best are refined side by side"
    assert result.alternatives


def test_cancelling_at_any_pass_leaves_nothing_in_use() -> None:
    for count in range(12):
        engine = tiny_infiller()
        calls = itertools.count()

        def check(calls: Iterator[int] = calls, last: int = count) -> None:
            if next(calls) == last:
                raise InterruptedError

        with contextlib.suppress(InterruptedError):
            engine.infill(spans_request((GAP, GAP), (3, 3)), Hooks(check=check))
        assert not engine._prefixes._used
        assert engine.infill(request()).usage.prompt_tokens > 0


def test_invoked_by_hand_at_a_known_place_the_noise_gets_its_steps() -> None:
    engine = tiny_infiller()
    engine.infill(request(document="a", max_tokens=12))
    known = engine.infill(request(document="a", max_tokens=12, alternatives=3))
    fresh = engine.infill(request(document="b", max_tokens=12, alternatives=3))
    assert known.usage.passes == fresh.usage.passes
    assert len(known.alternatives) == 3


def test_other_bounds_are_another_question() -> None:
    engine = tiny_infiller()
    engine.infill(request(document="a", max_tokens=3))
    assert engine.infill(request(document="a")).usage.passes > 3


def test_a_late_rewrite_is_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENGINE, "pace", Pace())
    monkeypatch.setattr(filling, "_SHOWN_PROBABILITY", 0.5)
    struck = time.monotonic() + 0.3

    def watch(update: CanvasUpdate) -> None:
        time.sleep(max(0.0, struck - time.monotonic()))

    wanted = request(start=0, end=GAP, instruction="shorten")
    result = ENGINE.infill(wanted, Hooks(on_canvas=watch, deadline_at=struck))
    assert (result.reason, result.alternatives) == ("deadline", ())


def test_what_was_slow_once_does_not_silence_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Pace()
    slow.pass_s = 20.0
    slow.measured_at -= 60
    monkeypatch.setattr(ENGINE, "pace", slow)
    results = [ENGINE.infill(request(), Hooks(deadline_at=time.monotonic() + 5)) for _ in range(20)]
    assert results[0].reason == "deadline"
    assert results[-1].reason == "ok"


def test_finished_pieces_of_a_long_rewrite_stay_in_the_draft() -> None:
    lines = "".join(f"value_{n} = compute({n})\n" for n in range(12))
    text = TEXT + lines + "end\n"
    seen: list[CanvasUpdate] = []
    result = ENGINE.infill(
        request(text, len(TEXT), len(TEXT + lines), instruction="add 1", seed=3),
        Hooks(on_canvas=seen.append),
    )
    (final,) = texts(result)
    last = seen[-1].spans[0].text
    # What the first canvas settled on stands at the start of every later draft.
    first = next(a for a, b in itertools.pairwise(seen) if b.canvas > a.canvas)
    second = next(update for update in seen if update.canvas == 1)
    assert final[:10] == second.spans[0].text[:10] == last[:10]
    assert first.canvas == 0


def test_spans_at_one_place_stand_in_order() -> None:
    targets = targets_of(spans_request((2, 4), (2, 2), text="abcdef"))
    assert [target.span for target in targets] == [Span(2, 2), Span(2, 4)]


def test_a_pin_that_the_selection_has_is_not_doubled() -> None:
    pins = (Pin(0, "start", "ret"),)
    (target,) = targets_of(request(start=GAP - 7, end=GAP, pins=pins))
    assert target.selection == "urn "
    for text in texts(ENGINE.infill(request(start=GAP - 7, end=GAP, pins=pins, max_tokens=8))):
        assert text.startswith("ret")
        assert text != "return "


def test_near_spans_with_a_least_length_get_canvases_of_their_own() -> None:
    spans = tuple((at, at) for at in (GAP, TEXT.index("1, 2"), TEXT.index("a, b")))
    result = ENGINE.infill(spans_request(*spans, min_tokens=60))
    assert result.reason in ("ok", "empty")


def test_a_repair_of_a_book_is_refused() -> None:
    text = "value = compute(1)\n" * 400
    with pytest.raises(GapTooLong):
        ENGINE.infill(request(text, 0, len(text), repair=()))
