"""`generate` refuses what has no answer instead of answering nonsense."""

import pytest
import torch
from tiny_infill import tiny_config, tiny_model

from infilld.engine.config import SamplerConfig
from infilld.engine.draws import SeededDraws
from infilld.engine.errors import ContextTooLong, RequestError
from infilld.engine.sampler import generate

MODEL = tiny_model(tiny_config(canvas_tokens=16))
CONFIG = SamplerConfig(max_steps=2)


def run(prompt_tokens: int, new_tokens: int) -> torch.Tensor:
    prompt = torch.arange(prompt_tokens) % MODEL.config.vocab_tokens
    return generate(MODEL, prompt, CONFIG, SeededDraws(0), max_new_tokens=new_tokens)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        run(0, 16)


def test_the_last_position_is_the_limit() -> None:
    limit = MODEL.config.max_positions
    assert len(run(limit - 16, 16)) == 16
    with pytest.raises(ContextTooLong, match=str(limit)):
        run(limit - 15, 16)


def test_a_planned_context_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU has room for less than the model could read: that is said before the first canvas."""
    monkeypatch.setattr(type(MODEL), "context_tokens", property(lambda model: 40))
    monkeypatch.setattr(MODEL, "run", None)
    with pytest.raises(ContextTooLong, match="room for 56"):
        run(25, 32)


def test_new_tokens_are_rounded_up_to_canvases() -> None:
    assert len(run(3, 17)) == 32
