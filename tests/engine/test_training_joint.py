"""The joint training pass computes what the engine computes, and leaks nothing."""

import dataclasses
import itertools
import random
from collections import Counter

import pytest
import torch
from tiny_infill import byte_tokenizer, tiny_config, tiny_model

from infilld.engine.prompt import Controls
from infilld.engine.training.batches import Batches
from infilld.engine.training.examples import Batch, ExampleBuilder, ExampleShape
from infilld.engine.training.joint import (
    JointPass,
    accept_by_entropy,
    canvas_mask,
    corrupt,
)

TOKENIZER = byte_tokenizer()
CONTROLS = Controls.of(TOKENIZER)
assert CONTROLS is not None
TEXTS = [
    "".join(f"def f{n}(a, b):\n    return a + {n} * b\n\n\n" for n in range(30)),
    "# \U0001f600 é\r\n" * 40,
]
SHAPE = ExampleShape(
    sequences=3, encoder_tokens=256, canvases=4, gap_tokens=24, suffix_tokens=16, renamed=0
)
SHAPES = [(SHAPE, 1.0)]


@pytest.fixture
def batch() -> Batch:
    return ExampleBuilder(TEXTS, TOKENIZER, CONTROLS).batch(SHAPE, random.Random(3))


def joint_logits(batch: Batch, canvas: torch.Tensor, belief: torch.Tensor | None) -> torch.Tensor:
    model = tiny_model(tiny_config(TOKENIZER.vocab_tokens))
    run = JointPass(model, torch.Generator())
    keys: list[tuple[torch.Tensor, torch.Tensor]] = []
    run._encode(batch, keys)
    signal = None if belief is None else model.embed_belief(belief)
    attend, positions = run._attend_canvas(batch, keys), run._positions(batch)
    hidden = run._denoise(canvas.flatten(1), signal, attend, positions)
    return model.logits(hidden).view(*canvas.shape, -1)


def test_a_canvas_gets_the_logits_the_engine_would_give_it(batch: Batch) -> None:
    canvas, _ = corrupt(batch, TOKENIZER.vocab_tokens, torch.Generator().manual_seed(0))
    first = joint_logits(batch, canvas, None)
    second = joint_logits(batch, canvas, first.flatten(1, 2))
    model = tiny_model(tiny_config(TOKENIZER.vocab_tokens))
    filled = batch.gap.any(-1).nonzero().tolist()
    assert len(filled) > 3
    for b, c in filled[::2]:
        used = int((batch.gap | batch.head)[b, c].sum())
        cache = model.new_cache()
        model.encode(batch.encoder[b, : batch.starts[b, c]], cache)
        row = canvas[b, c, None, :used]
        alone = model.denoise(row, cache, None)
        torch.testing.assert_close(alone[0], first[b, c, :used], atol=2e-5, rtol=1e-4)
        again = model.denoise(row, cache, alone)
        torch.testing.assert_close(again[0], second[b, c, :used], atol=1e-4, rtol=1e-4)


def test_nothing_at_or_after_a_cut_reaches_its_canvas(batch: Batch) -> None:
    canvas, _ = corrupt(batch, TOKENIZER.vocab_tokens, torch.Generator().manual_seed(0))
    before = joint_logits(batch, canvas, None)
    b = int(batch.gap[:, :2].any(-1).all(-1).nonzero()[0])
    encoder = batch.encoder.clone()
    start = int(batch.starts[b, 1])
    encoder[b, start:] = 100
    after = joint_logits(dataclasses.replace(batch, encoder=encoder), canvas, None)
    assert torch.equal(before[b, :2], after[b, :2])
    # The test can fail: one token earlier does reach it.
    encoder[b, start - 1] = 101
    reached = joint_logits(dataclasses.replace(batch, encoder=encoder), canvas, None)
    assert not torch.equal(before[b, 1], reached[b, 1])


def test_workers_make_the_same_batches() -> None:
    builder = ExampleBuilder(TEXTS, TOKENIZER, CONTROLS)
    alone, helped = (Batches(builder, 7, workers=n) for n in (0, 1))
    try:
        for step in (4, 5):
            ours, theirs = alone.take(step, SHAPES), helped.take(step, SHAPES)
            assert torch.equal(ours.encoder, theirs.encoder)
            assert torch.equal(ours.canvas, theirs.canvas)
        assert not torch.equal(alone.take(4, SHAPES).encoder, alone.take(5, SHAPES).encoder)
    finally:
        helped.close()


def test_a_canvas_does_not_see_its_neighbours(batch: Batch) -> None:
    canvas, _ = corrupt(batch, TOKENIZER.vocab_tokens, torch.Generator().manual_seed(0))
    other = canvas.clone()
    other[:, 1] = 77
    before, after = joint_logits(batch, canvas, None), joint_logits(batch, other, None)
    assert torch.equal(before[:, [0, 2, 3]], after[:, [0, 2, 3]])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_noise_falls_on_gaps_alone(batch: Batch) -> None:
    plain = dataclasses.replace(batch, drafted=torch.zeros_like(batch.drafted))
    noised, _ = corrupt(plain, TOKENIZER.vocab_tokens, torch.Generator().manual_seed(0))
    changed = noised != batch.canvas
    assert not (changed & ~batch.gap).any()
    rates = changed.sum(-1) / batch.gap.sum(-1).clamp(min=1)
    assert rates.max() > 0.9 > rates.min()


def test_a_drafted_canvas_starts_from_its_draft(batch: Batch) -> None:
    assert batch.drafted.any()
    given = batch.head & batch.drafted[..., None]
    assert torch.equal(batch.first[given], batch.canvas[given])
    draws = [
        corrupt(batch, TOKENIZER.vocab_tokens, torch.Generator().manual_seed(seed))[0]
        for seed in range(8)
    ]
    kept = torch.stack([(canvas == batch.first).all(-1) for canvas in draws])[:, batch.drafted]
    assert 0 < kept.float().mean() < 1
    share = torch.stack([canvas == batch.first for canvas in draws])
    gap = batch.gap & batch.drafted[..., None]
    assert share[:, gap].float().mean() > 0.6


def test_no_row_of_the_mask_is_empty(batch: Batch) -> None:
    for window in (None, 16):
        assert canvas_mask(batch, window).any(-1).all()


def test_examples_are_text_in_order() -> None:
    builder, rng = ExampleBuilder(TEXTS, TOKENIZER, CONTROLS), random.Random(3)
    seen: Counter[str] = Counter()
    for batch in (builder.batch(SHAPE, rng) for _ in range(40)):
        for b, c in batch.gap.any(-1).nonzero().tolist():
            seen += _checked(batch, b, c)
    assert seen["canvases"] > 250
    for name in ("two gaps", "no head", "short gap", "end of text"):
        assert seen[name] > 0, seen


def _checked(batch: Batch, b: int, c: int) -> Counter[str]:
    """What kind of canvas it is; its text continues its prefix, fillers stand behind middles."""
    gap, head = batch.gap[b, c], batch.head[b, c]
    used = int((gap | head).sum())
    row = batch.canvas[b, c, :used].tolist()
    assert not (gap | head)[used:].any()
    runs = [
        list(run) for _, run in itertools.groupby(range(used), key=lambda place: bool(gap[place]))
    ]
    gaps = [[row[place] for place in run] for run in runs if gap[run[0]]]
    for tokens in gaps:
        middle = [token for token in tokens if token != CONTROLS.filler]
        assert tokens == middle + [CONTROLS.filler] * (len(tokens) - len(middle))
    written = [token for token in row if token not in (CONTROLS.filler, CONTROLS.eos)]
    prefix = batch.encoder[b, : batch.starts[b, c]].tolist()
    if CONTROLS.prefix_mark in prefix:
        prefix = prefix[prefix.index(CONTROLS.prefix_mark) + 1 :]
    joined = TOKENIZER.decode([*prefix[-12:], *written])
    assert any(joined in text.encode() for text in TEXTS), joined
    assert CONTROLS.eos not in row or row[-1] == CONTROLS.eos
    return Counter(
        {
            "canvases": 1,
            "two gaps": len(gaps) == 2,
            "no head": not head.any(),
            "short gap": len(gaps) == 1 and len(gaps[0]) < SHAPE.gap_tokens,
            "end of text": CONTROLS.eos in row,
        }
    )


def test_acceptance_takes_the_surest_while_the_others_fit() -> None:
    entropy = torch.tensor([[[0.5, 0.01, torch.inf, 0.04, 0.2], [3.0, torch.inf, 2.0, 5.0, 4.0]]])
    accepted = accept_by_entropy(entropy, torch.tensor([[0.1, 0.1]]))
    assert accepted.tolist() == [
        [[False, True, False, True, True], [False, False, True, False, False]]
    ]
    assert accept_by_entropy(entropy, torch.tensor([[8.9, 8.9]])).sum() == 7


def test_an_unrolled_canvas_is_what_the_sampler_would_hand_on(batch: Batch) -> None:
    model = tiny_model(tiny_config(TOKENIZER.vocab_tokens))
    run = JointPass(model, torch.Generator().manual_seed(0))
    keys: list[tuple[torch.Tensor, torch.Tensor]] = []
    run._encode(batch, keys)
    attend, positions = run._attend_canvas(batch, keys), run._positions(batch)
    hidden = run._denoise(batch.canvas.flatten(1), None, attend, positions)
    canvas, signal = run._step(hidden, batch)
    assert torch.equal(canvas[batch.head], batch.canvas[batch.head])
    assert torch.equal(signal[batch.head.flatten(1)], model.embed(batch.canvas[batch.head]))
    believed = model.logits(hidden).argmax(-1).view_as(canvas)
    kept = (canvas == believed) & batch.gap
    # At least the surest position of every canvas, and noise elsewhere.
    assert kept.any(-1)[batch.gap.any(-1)].all()
    assert (canvas != believed)[batch.gap].any()


def test_the_first_pass_is_told_which_positions_are_given(batch: Batch) -> None:
    model = tiny_model(tiny_config(TOKENIZER.vocab_tokens))
    run = JointPass(model, torch.Generator().manual_seed(0))
    keys: list[tuple[torch.Tensor, torch.Tensor]] = []
    read = run._encode(batch, keys)
    canvas, given = run._first_canvas(batch, read)
    assert given[~batch.gap].all()
    assert 0 < given[batch.gap].float().mean() < 1
    signals = [run._first_signal(canvas, given) for _ in range(40)]
    told = [signal for signal in signals if signal is not None]
    assert len(told) in range(20, 40)
    # As the engine says it: a belief that is certain of what is given and open about the rest.
    belief = torch.zeros(*canvas.shape, TOKENIZER.vocab_tokens)
    certain = torch.full_like(belief, -torch.inf).scatter_(-1, canvas[..., None], 0.0)
    belief = torch.where(given[..., None], certain, belief).flatten(1, 2)
    torch.testing.assert_close(told[0], model.embed_belief(belief), atol=1e-6, rtol=1e-4)
