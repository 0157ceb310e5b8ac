"""Passes shared by several pieces of work give what each would get alone."""

import pytest
import torch
from tiny_infill import byte_tokenizer, tiny_config, tiny_model

from infilld.engine.config import SamplerConfig
from infilld.engine.draws import SeededDraws
from infilld.engine.passes import CanvasPass, Work, drive, together
from infilld.engine.reading import Ask
from infilld.engine.sampler import Denoised, denoising
from infilld.engine.stopping import AllOf

VOCAB = byte_tokenizer().vocab_tokens
MODEL = tiny_model(tiny_config(VOCAB))


def canvas_pass(seed: int, prefix: int, rows: int, length: int, *, is_told: bool) -> CanvasPass:
    generator = torch.Generator().manual_seed(seed)
    cache = MODEL.new_cache()
    MODEL.encode(torch.randint(VOCAB, (prefix,), generator=generator), cache)
    canvas = torch.randint(VOCAB, (rows, length), generator=generator)
    belief = torch.randn(rows, length, VOCAB, generator=generator) if is_told else None
    return CanvasPass(canvas, cache, belief, Ask(temperature=torch.tensor(1.0)))


def test_a_model_that_breaks_is_no_end_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> Work[str]:
        yield [canvas_pass(1, 5, 1, 4, is_told=False)]
        return "done"

    assert drive(MODEL, work()) == "done"
    monkeypatch.setattr(MODEL, "run", lambda passes: next(iter(())))
    with pytest.raises(StopIteration):
        drive(MODEL, work())


def test_canvases_of_any_prefix_and_length_share_a_pass() -> None:
    # The window is 16: prefixes below, at and above it.
    passes = [
        canvas_pass(1, 5, 2, 12, is_told=False),
        canvas_pass(2, 16, 1, 1, is_told=True),
        canvas_pass(3, 40, 3, 30, is_told=True),
    ]
    shared = MODEL.denoise_together(passes)
    for each, logits in zip(passes, shared, strict=True):
        alone = MODEL.denoise(each.canvas, each.cache, each.belief)
        torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-4)
    # The test can fail: another neighbour's prefix is another result.
    wrong = MODEL.denoise(passes[0].canvas, passes[2].cache, None)
    assert (shared[0] - wrong).abs().max() > 0.1


def denoised(number: int, steps: int) -> Work[Denoised]:
    first = canvas_pass(number, 7 + number, 2, 9, is_told=False)
    config = SamplerConfig(max_steps=steps)
    return denoising(
        first.cache, first.canvas, config, SeededDraws(number), vocab_tokens=VOCAB, stop=AllOf(())
    )


def test_work_side_by_side_ends_as_it_would_alone() -> None:
    alone = [drive(MODEL, denoised(number, 2 + number)) for number in range(3)]
    shared = drive(MODEL, together([denoised(number, 2 + number) for number in range(3)]))
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.passes == other.passes


def test_no_work_is_done_at_once() -> None:
    assert drive(MODEL, together([])) == []


def test_when_one_fails_the_others_are_closed() -> None:
    closed = []

    def endless() -> Work[None]:
        try:
            while True:
                yield []
        finally:
            closed.append(True)

    def failing() -> Work[None]:
        yield []
        raise ValueError("so it goes")

    with pytest.raises(ValueError, match="so it goes"):
        drive(MODEL, together([endless(), failing()]))
    assert closed == [True]


def test_rows_of_any_length_are_read_as_each_would_be_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    cache = MODEL.new_cache()
    MODEL.encode(torch.randint(VOCAB, (21,), generator=generator), cache)
    rows = [torch.randint(VOCAB, (count,), generator=generator) for count in (3, 17, 1, 3)]
    for row, read in zip(rows, MODEL.read(rows, cache), strict=True):
        (alone,) = MODEL.read([row], cache)
        torch.testing.assert_close(read, alone, atol=1e-5, rtol=1e-4)
