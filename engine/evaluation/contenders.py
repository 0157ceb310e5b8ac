"""What answers the items: the engine, the engine with a part left out, and what it has to beat."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from infilld.engine.canvas import gap_kind
from infilld.engine.errors import RequestError
from infilld.engine.evaluation.items import Item
from infilld.engine.evaluation.names import SWITCHES
from infilld.engine.evaluation.ngram import NGram
from infilld.engine.evaluation.written import limit_of, write
from infilld.engine.found import found_drafts
from infilld.engine.infill import Infiller
from infilld.engine.plan import FillMethod
from infilld.engine.prompt import Controls
from infilld.engine.request import InfillRequest, Span


@dataclass(frozen=True)
class Answer:
    """What a contender gave for an item.

    Attributes:
        text: of the gap; None: it abstained.
        reason: "ok", or why it abstained.
        confidence: geometric mean probability of the tokens, 0 to 1; None: it knows none.
        passes: forwards of the model over a canvas, or over the tokens it reads one by one.
        ms: from the document to the answer, nothing of it encoded before.
    """

    text: str | None
    reason: str
    confidence: float | None = None
    passes: int = 0
    ms: float = 0.0


class Contender(Protocol):
    """Answers items, one after another; `name` is a key of `CONTENDERS`."""

    name: str

    def answer(self, item: Item) -> Answer:
        """The text for the item's gap, or the reason for none."""
        ...


@dataclass
class Canvas:
    """The engine.

    Attributes:
        name: see `CONTENDERS`. engine: with the method of this contender. seed: of every request.
        knows_length: requests carry the number of tokens that the true text has by itself.
    """

    name: str
    engine: Infiller
    seed: int
    knows_length: bool = False

    def answer(self, item: Item) -> Answer:
        """The engine's first alternative; what it refuses is an abstention too."""
        at = len(item.before)
        tokens = None
        # Of nothing there is no number of tokens that a gap could have.
        if self.knows_length and item.missing:
            tokens = max(1, len(self.engine.tokenizer.encode(item.missing)))
        request = InfillRequest(
            text=item.before + item.after,
            spans=(Span(at, at),),
            min_tokens=tokens,
            max_tokens=tokens,
            context=item.context,
            seed=self.seed,
        )
        # Whatever was asked before must not make an answer quicker.
        self.engine.forget()
        started = time.perf_counter()
        try:
            result = self.engine.infill(request)
        except RequestError as error:
            return Answer(None, error.code, ms=_ms_since(started))
        ms, passes = _ms_since(started), result.usage.passes
        if result.reason != "ok" or not result.alternatives:
            return Answer(None, result.reason, passes=passes, ms=ms)
        span = result.alternatives[0].spans[0]
        return Answer(span.text, "ok", span.confidence, passes, ms)


@dataclass
class CausalGreedy:
    """The same weights as an ordinary language model: the prefix alone, the likeliest token."""

    name: str
    engine: Infiller
    controls: Controls

    def answer(self, item: Item) -> Answer:
        """The tokens that follow the prefix, up to the item's limit."""
        model, tokenizer = self.engine.model, self.engine.tokenizer
        started = time.perf_counter()
        room = self.engine.prompt_tokens - 1
        prefix = tokenizer.encode(item.before[-6 * room :])[-room:]
        cache = model.new_cache()
        banned = torch.zeros(model.config.vocab_tokens, dtype=torch.bool)
        banned[sorted(tokenizer.control_ids)] = True
        banned = banned.to(model.device)
        nats: list[float] = []

        def next_token(written: Sequence[int]) -> int:
            unread = written[-1:] if written else [self.controls.bos, *prefix]
            hidden = model.encode(torch.tensor(unread, device=model.device), cache)[-1:]
            best = model.best(hidden, banned)
            nats.append(float(model.log_probabilities(hidden, best)))
            return int(best)

        # What the model can read bounds what it can write.
        limit = limit_of(item, tokenizer)
        limit = replace(limit, tokens=min(limit.tokens, model.config.canvas_tokens))
        text = write(next_token, limit, tokenizer)
        confidence = math.exp(sum(nats) / len(nats))
        return Answer(text, "ok", confidence, len(nats), _ms_since(started))


@dataclass
class Retrieval:
    """The best found draft, as it stands."""

    name: str

    def answer(self, item: Item) -> Answer:
        """Text that stood behind such a prefix elsewhere in the document."""
        started = time.perf_counter()
        kind = gap_kind(item.before, item.after)
        found = found_drafts(item.before, item.after, kind, most=1)
        ms = _ms_since(started)
        return Answer(found[0].text, "ok", ms=ms) if found else Answer(None, "not_found", ms=ms)


@dataclass
class DocumentNGram:
    """Continues the prefix with what is frequent in the document, which is all it knows."""

    name: str
    engine: Infiller

    def answer(self, item: Item) -> Answer:
        """The tokens that follow the prefix, up to the item's limit."""
        tokenizer = self.engine.tokenizer
        started = time.perf_counter()
        prefix, suffix = tokenizer.encode(item.before), tokenizer.encode(item.after)
        if not prefix and not suffix:
            return Answer(None, "empty", ms=_ms_since(started))
        # The prefix last: of two places the one before the gap counts as the later one.
        model = NGram([suffix, prefix])

        def next_token(written: Sequence[int]) -> int:
            found = model.next_token([*prefix[-8:], *written])
            assert found is not None
            return found

        text = write(next_token, limit_of(item, tokenizer), tokenizer)
        return Answer(text, "ok", ms=_ms_since(started))


def make_contender(name: str, engine: Infiller, seed: int) -> Contender:
    """A contender by its name in `CONTENDERS`.

    Args:
        name: which. engine: its model and vocabulary. seed: of the requests.
    """
    assert engine.controls is not None
    switch = SWITCHES.get(name)
    if switch is not None:
        return Canvas(name, switched(engine, name), seed, switch.knows_length)
    if name == "causal_greedy":
        return CausalGreedy(name, engine, engine.controls)
    return Retrieval(name) if name == "retrieval" else DocumentNGram(name, engine)


def switched(engine: Infiller, name: str) -> Infiller:
    """An engine of its own with a switch's method: no other one's encoded prefixes can help it.

    Args:
        engine: its model and vocabulary. name: of `SWITCHES`.
    """
    method = FillMethod(**SWITCHES[name].changes)
    return Infiller(engine.model, engine.tokenizer, engine.sampler, method, engine.calibration)


def _ms_since(started: float) -> float:
    return 1e3 * (time.perf_counter() - started)
