"""How surprised a model is by held-out text: as a language model, and on a canvas of noise."""

import random
import statistics
from collections.abc import Sequence

import torch

from infilld.engine.cache import PrefixCache
from infilld.engine.draws import SeededDraws
from infilld.engine.infill import Infiller
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Ask
from infilld.engine.training.copying import IGNORED
from infilld.engine.training.examples import Batch, ExampleBuilder, ExampleShape

_BATCHES = 8
_SHAPE = ExampleShape(sequences=4, encoder_tokens=320, canvases=4, gap_tokens=24)


def held_out_nats(engine: Infiller, texts: Sequence[str], seed: int) -> dict[str, float]:
    """Nats a token of the encoder, and of a gap's text in the first pass from pure noise.

    Args:
        engine: a model that can infill. texts: held out. seed: of examples and noise.
    """
    model, controls = engine.model, engine.controls
    assert controls is not None
    builder = ExampleBuilder(texts, engine.tokenizer, controls)
    rng = random.Random(seed)
    draws = SeededDraws(seed, model.device)
    encoder: list[float] = []
    gap: list[float] = []
    for _ in range(_BATCHES):
        batch = builder.batch(_SHAPE, rng).to(model.device)
        for sequence, labels in enumerate(batch.encoder_labels):
            cache = model.new_cache()
            used = int((labels != IGNORED).sum())
            # The last token is read, since canvases may start behind it, but predicts nothing.
            hidden = model.encode(batch.encoder[sequence, : used + 1], cache)[:used]
            encoder += (-model.log_probabilities(hidden, labels[:used])).tolist()
            # Later canvases first: the cache is only ever cut back.
            for number in reversed(range(_SHAPE.canvases)):
                gap += _first_pass_nats(engine, batch, (sequence, number), cache, draws)
            cache.close()
    return {
        "encoder_nats": round(statistics.fmean(encoder), 4),
        "first_pass_gap_nats": round(statistics.fmean(gap), 4),
    }


def _first_pass_nats(
    engine: Infiller,
    batch: Batch,
    at: tuple[int, int],
    cache: PrefixCache,
    draws: SeededDraws,
) -> list[float]:
    """Nats of each token of a canvas's text, its whole gap being noise; cuts the cache to it."""
    is_gap = batch.gap[at]
    if engine.controls is None or not bool(is_gap.any()):
        return []
    cache.trim(int(batch.starts[at]))
    used = is_gap | batch.head[at]
    row, free = batch.canvas[at][used], is_gap[used]
    noise = draws.noise(1, len(row), engine.model.config.vocab_tokens)[0]
    ask = Ask(temperature=torch.tensor(1.0), weighed=row[None])
    canvas = torch.where(free, noise, row)[None]
    (reading,) = engine.model.run([CanvasPass(canvas, cache, None, ask)])
    assert reading.weighed is not None
    text = free & (row != engine.controls.filler)
    nats: list[float] = (-reading.weighed[0, text]).tolist()
    return nats
