"""An instruction-tuned checkpoint, which has no filler token: every route, none of its sense."""

from dataclasses import replace

import pytest
import torch
from tiny_infill import tiny_config, tiny_model
from tiny_tokenizers import CHANNEL_END, chat_template, chat_tokenizer

from infilld.engine.cache import PrefixCache
from infilld.engine.chat_prompt import ChatLayout
from infilld.engine.config import SamplerConfig
from infilld.engine.errors import GapTooLong
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.plan import FillMethod
from infilld.engine.request import CanvasUpdate, InfillRequest, InfillResult, Pin, Span
from infilld.engine.sampler import denoising

TOKENIZER = chat_tokenizer()
TEXT = "def add(a, b):\n    return \n\nprint(add(1, 2))\n"
GAP = TEXT.index("return ") + 7


@pytest.fixture(scope="module")
def engine() -> Infiller:
    config = replace(tiny_config(TOKENIZER.vocab_tokens, canvas_tokens=64), max_positions=2048)
    method = FillMethod(holds_back=False, trims=False)
    sampler = replace(SamplerConfig(), max_steps=4)
    layout = ChatLayout(TOKENIZER, chat_template())
    return Infiller(tiny_model(config), TOKENIZER, sampler, method, layout=layout)


def request(start: int = GAP, end: int = GAP, text: str = TEXT, **fields: object) -> InfillRequest:
    return InfillRequest(text=text, spans=(Span(start, end),), **{"seed": 1, **fields})  # type: ignore[arg-type]


def texts(result: InfillResult) -> list[str]:
    return [span.text for choice in result.alternatives for span in choice.spans]


def test_a_gap_finds_its_length_among_several(engine: Infiller) -> None:
    found = {
        len(TOKENIZER.encode(text))
        for seed in range(6)
        for text in texts(engine.infill(request(seed=seed)))
    }
    assert len(found) > 1
    assert max(found) <= 48


def test_bounds_are_exact_lengths(engine: Infiller) -> None:
    result = engine.infill(request(min_tokens=5, max_tokens=5))
    # Bytes that form no character are left out of the text.
    assert all(len(text.encode()) <= 5 for text in texts(result))
    assert result.usage.canvas_tokens < 2 * 64


def test_typing_appends_to_the_prompt(engine: Infiller) -> None:
    engine.infill(request(warm=True))
    typed = TEXT[:GAP] + "a" + TEXT[GAP:]
    usage = engine.infill(request(GAP + 1, GAP + 1, typed, warm=True)).usage
    # The unfinished word is read again with what is written.
    assert usage.cached_tokens == usage.prompt_tokens


def test_a_rewrite_ends_by_itself(engine: Infiller, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = TOKENIZER.encode("sum(a, b)\n```\nmore")

    def scripted(cache: object, canvas: torch.Tensor, *rest: object, **more: object):
        work = denoising(cache, canvas, *rest, **more)  # type: ignore[arg-type]
        denoised = yield from work
        tokens = denoised.tokens.clone()
        for row in range(len(tokens)):
            tokens[row, : len(fixed)] = torch.tensor(fixed)
        return replace(denoised, tokens=tokens)

    monkeypatch.setattr("infilld.engine.filling.denoising", scripted)
    result = engine.infill(request(GAP - 7, GAP, instruction="sum them"))
    assert texts(result) == ["sum(a, b)"]


def test_pins_and_several_spans(engine: Infiller) -> None:
    at = TEXT.index("1, 2")
    result = engine.infill(
        InfillRequest(
            text=TEXT,
            spans=(Span(GAP, GAP), Span(at, at + 1)),
            pins=(Pin(0, "start", "a"), Pin(1, "end", ",")),
            seed=4,
        )
    )
    (choice,) = result.alternatives
    assert choice.spans[0].text.startswith("a")
    assert choice.spans[1].text.endswith(",")


def test_thoughts_come_before_the_answer(engine: Infiller, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    plain = engine._prefixes.encoding

    def spy(ids: list[int], *rest: object):
        seen.append(list(ids))
        return plain(ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine._prefixes, "encoding", spy)
    prompt = engine._planner.prompt(
        request(think=True), engine._planner.passages(request(), _targets())[0]
    )
    engine.infill(request(think=True))
    assert prompt.answer_at is not None
    assert seen[0] == list(prompt.ids[: prompt.answer_at])
    final = seen[-1]
    rest = list(prompt.ids[prompt.answer_at :])
    assert final[-len(rest) :] == rest
    assert final[-len(rest) - 1] == CHANNEL_END
    assert len(final) > len(prompt.ids)


def test_thoughts_end_where_the_planned_context_does(
    engine: Infiller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU has room for less than the model could read."""
    passage = engine._planner.passages(request(), _targets())[0]
    prompt = len(engine._planner.prompt(request(think=True), passage).ids)
    room = prompt + 64 + 32
    monkeypatch.setattr(type(engine.model), "context_tokens", property(lambda model: room))
    encode, longest = engine.model.encode, 0

    def measured(tokens: torch.Tensor, cache: PrefixCache) -> torch.Tensor:
        nonlocal longest
        hidden = encode(tokens, cache)
        longest = max(longest, cache.tokens)
        return hidden

    monkeypatch.setattr(engine.model, "encode", measured)
    engine.infill(request(think=True))
    assert prompt < longest <= room


def _targets():
    from infilld.engine.passages import targets_of

    return targets_of(request())


def test_a_long_rewrite_takes_several_canvases(engine: Infiller) -> None:
    lines = "".join(f"value_{n} = {n}\n" for n in range(9))
    text = TEXT + lines + "end\n"
    seen: list[CanvasUpdate] = []
    result = engine.infill(
        request(len(TEXT), len(TEXT + lines), text, instruction="add 1"),
        Hooks(on_canvas=seen.append),
    )
    assert seen[-1].canvas > 1
    assert result.alternatives[0].spans[0].end == len(TEXT + lines)


def test_a_line_that_fits_no_canvas_is_refused(engine: Infiller) -> None:
    with pytest.raises(GapTooLong):
        engine.infill(request(0, 300, "x" * 300, instruction="shorten"))
