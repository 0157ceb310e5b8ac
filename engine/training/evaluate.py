"""How good a model is on files of packages it never saw. Nothing is picked by hand: a seed is."""

import ast
import difflib
import math
import random
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from infilld.engine.cache import PrefixCache
from infilld.engine.draws import SeededDraws
from infilld.engine.infill import Infiller
from infilld.engine.request import InfillRequest, Span
from infilld.engine.training.copying import IGNORED
from infilld.engine.training.examples import Batch, ExampleBuilder, ExampleShape

_LONGEST_LINE_TOKENS = 24
_BATCHES = 8
_SHAPE = ExampleShape(sequences=4, encoder_tokens=320, canvases=4, gap_tokens=24)


@dataclass(frozen=True)
class Item:
    """The rest of a line taken out of a held-out file."""

    before: str
    missing: str
    after: str


def rest_of_line_items(texts: Sequence[str], count: int, seed: int) -> list[Item]:
    """Random cuts within lines of code: what stands behind the cut on its line is missing."""
    rng = random.Random(seed)
    items: list[Item] = []
    sizes = [len(text) for text in texts]
    while len(items) < count:
        text = rng.choices(texts, sizes)[0]
        at = rng.randrange(len(text))
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        line_start = text.rfind("\n", 0, at) + 1
        if text[at:end].strip() and text[line_start:at].strip():
            items.append(Item(text[:at], text[at:end], text[end:]))
    return items


def evaluate(
    engine: Infiller, texts: Sequence[str], *, items: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Measure a model on held-out texts.

    Args:
        engine: the model. texts: of packages that were held out.
        items: rest-of-line gaps to fill. seed: chooses them.

    Returns:
        Figures for evaluation.json and the model card: cross-entropies in nats for each token,
        shares in [0, 1], times in milliseconds.
    """
    report: dict[str, Any] = {"items": items, "seed": seed, "held_out_files": len(texts)}
    report |= _losses(engine, texts, seed)
    found = rest_of_line_items(texts, items, seed)
    report["rest_of_line"] = {
        "canvas": _score(engine, found, lambda item: _canvas_fill(engine, item, seed)),
        "causal_greedy_prefix_only": _score(engine, found, lambda item: _causal_fill(engine, item)),
    }
    return report


def _losses(engine: Infiller, texts: Sequence[str], seed: int) -> dict[str, float]:
    """Nats a token of the encoder, and of a gap's text in the first pass from pure noise."""
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
            loss = F.cross_entropy(model.logits(hidden), labels[:used], reduction="none")
            encoder += loss.tolist()
            # Later canvases first: the cache is only ever cut back.
            for number in reversed(range(_SHAPE.canvases)):
                gap += _first_pass_nats(engine, batch, (sequence, number), cache, draws)
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
    logits = engine.model.denoise(torch.where(free, noise, row)[None], cache, None)[0]
    text = free & (row != engine.controls.filler)
    nats: list[float] = F.cross_entropy(logits[text], row[text], reduction="none").tolist()
    return nats


def _score(engine: Infiller, items: Sequence[Item], fill: Any) -> dict[str, float]:
    exact: list[bool] = []
    similar: list[float] = []
    parsed: list[bool] = []
    ms: list[float] = []
    for item in items:
        started = time.perf_counter()
        text: str = fill(item)
        ms.append(1e3 * (time.perf_counter() - started))
        exact.append(text.rstrip() == item.missing.rstrip())
        similar.append(difflib.SequenceMatcher(None, text, item.missing, autojunk=False).ratio())
        if parses(item.before + item.missing + item.after):
            parsed.append(parses(item.before + text + item.after))
    return {
        "exact_match": round(statistics.fmean(exact), 4),
        "edit_similarity": round(statistics.fmean(similar), 4),
        "parse_rate": round(statistics.fmean(parsed), 4) if parsed else math.nan,
        "median_ms": round(statistics.median(ms), 2),
    }


def parses(source: str) -> bool:
    """Whether Python can parse the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _canvas_fill(engine: Infiller, item: Item, seed: int) -> str:
    at = len(item.before)
    request = InfillRequest(text=item.before + item.after, spans=(Span(at, at),), seed=seed)
    found = engine.infill(request).alternatives
    return found[0].spans[0].text if found else ""


def _causal_fill(engine: Infiller, item: Item) -> str:
    """The same weights used as an ordinary language model, without the suffix."""
    model, tokenizer, controls = engine.model, engine.tokenizer, engine.controls
    assert controls is not None
    room = engine.prompt_tokens - 1
    ids = [controls.bos, *tokenizer.encode(item.before[-6 * room :])[-room:]]
    cache = model.new_cache()
    hidden = model.encode(torch.tensor(ids, device=model.device), cache)[-1:]
    banned = torch.tensor(sorted(tokenizer.control_ids), device=model.device)
    written: list[int] = []
    while len(written) < _LONGEST_LINE_TOKENS:
        best = int(model.logits(hidden)[0].index_fill(0, banned, -torch.inf).argmax())
        written.append(best)
        if b"\n" in tokenizer.decode([best]):
            break
        hidden = model.encode(torch.tensor([best], device=model.device), cache)
    return tokenizer.text(written).partition("\n")[0]
