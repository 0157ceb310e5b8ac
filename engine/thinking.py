"""Thoughts before an answer: canvases of text that nobody is shown."""

from collections.abc import Callable

from infilld.engine.config import SamplerConfig
from infilld.engine.draws import SeededDraws
from infilld.engine.passes import CanvasModel, Work
from infilld.engine.prefixes import PrefixPool
from infilld.engine.prompt import InfillPrompt
from infilld.engine.sampler import denoising
from infilld.engine.stopping import reference_stop

# A thought that does not end by itself is ended.
_MOST_CANVASES = 4


def thinking(
    model: CanvasModel,
    sampler: SamplerConfig,
    prefixes: PrefixPool,
    prompt: InfillPrompt,
    seed: int,
    check: Callable[[], None],
) -> Work[tuple[int, ...]]:
    """The prompt's ids with thoughts in their place.

    Args:
        model, sampler: think. prefixes: encode. seed: of every draw.
        prompt: one that says where thoughts stand, and which tokens end them.
        check: what it raises ends the work.
    """
    assert prompt.answer_at is not None
    ids, rest = list(prompt.ids[: prompt.answer_at]), prompt.ids[prompt.answer_at :]
    draws = SeededDraws(seed, model.device)
    # A thought that is ended takes a token more.
    length, room = model.config.canvas_tokens, model.context_tokens - len(prompt.ids) - 1
    ends = set(prompt.thought_ends)
    for _ in range(min(_MOST_CANVASES, room // length)):
        prefix, _ = yield from prefixes.encoding(ids, check)
        try:
            denoised = yield from denoising(
                prefix.cache,
                draws.first_canvas(1, length, model.config.vocab_tokens).to(model.device),
                sampler,
                draws,
                vocab_tokens=model.config.vocab_tokens,
                stop=reference_stop(sampler),
                belief_tokens=model.belief_tokens,
                on_step=lambda step: check(),
            )
        finally:
            prefixes.give_back(prefix)
        tokens: list[int] = denoised.tokens[0].tolist()
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        if end is not None:
            return (*ids, *tokens[: end + 1], *rest)
        ids += tokens
    return (*ids, prompt.thought_ends[0], *rest)
