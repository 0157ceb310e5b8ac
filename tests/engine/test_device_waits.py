"""The host never asks the device for a number inside a step.

A tensor on the "meta" device has a shape and no numbers: whoever asks for one fails. So the loop of
a GPU runs here over meta tensors, with passes that are only pretended.
"""

from typing import Any

import pytest
import torch
from few_bits_model import CONFIG, random_tensors
from torch import Tensor

from infilld.engine.config import SamplerConfig
from infilld.engine.device_runner import DeviceRunner
from infilld.engine.passes import drive
from infilld.engine.polling import Polled
from infilld.engine.reading import Bans, Belief, Pins
from infilld.engine.sampler import Step, denoising
from infilld.engine.stopping import AllOf, AnyOf, LowEntropy, Stable

META = torch.device("meta")
TOP = 4


class MetaDraws:
    """Draws without numbers."""

    def first_canvas(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        return torch.empty(rows, canvas_tokens, dtype=torch.int64, device=META)

    def sample(self, probabilities: Tensor) -> Tensor:
        raise AssertionError("a GPU keeps no probabilities")

    def uniforms(self, rows: int, canvas_tokens: int) -> Tensor:
        return torch.empty(rows, canvas_tokens, 2, device=META)

    def noise(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        return self.first_canvas(rows, canvas_tokens, vocab_tokens)


class Blind(Polled[Step]):
    """Shows numbers of its own in place of those that a GPU would have copied."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(torch.device("cpu"), lag=1)

    def seen(self, *, is_last: bool = False) -> list[tuple[Step, tuple[Tensor, ...]]]:
        return [
            (step, tuple(torch.zeros(each.shape, dtype=each.dtype) + (not n) for n, each in own))
            for step, own in (
                (step, list(enumerate(tensors))) for step, tensors in super().seen(is_last=is_last)
            )
        ]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> DeviceRunner:
    """A GPU's runner on meta tensors; its passes give tensors of the right shapes."""
    made = DeviceRunner(
        CONFIG,
        dict(random_tensors()),
        device=META,
        dtype=torch.float32,
        impl="gpu",
        slots=2,
        context_tokens=48,
        belief_tokens=TOP,
        captures=False,
    )

    def canvas_pass(inputs: dict[str, Tensor], **asked: bool) -> tuple[Tensor, ...]:
        count = inputs["canvas"].numel()
        ids = torch.empty(count, dtype=torch.int64, device=META)
        number = torch.empty(count, device=META)
        top = (count, inputs["belief_ids"].shape[-1])
        wide = torch.empty(top, dtype=torch.int64, device=META)
        return ids, number, number, wide, torch.empty(top, device=META), ids, number

    def read_tokens(inputs: dict[str, Tensor], *, writes: bool) -> tuple[Tensor, ...]:
        return (torch.empty(inputs["tokens"].numel(), CONFIG.width, device=META),)

    monkeypatch.setattr(made, "_canvas_pass", canvas_pass)
    monkeypatch.setattr(made, "_read_tokens", read_tokens)
    monkeypatch.setattr("infilld.engine.sampler.Polled", Blind)
    return made


def options(**more: Any) -> dict[str, Any]:
    sure = AllOf((Stable(passes=1), LowEntropy(mean_nats=0.05)))
    return {
        "vocab_tokens": CONFIG.vocab_tokens,
        "stop": AnyOf((sure, Stable(passes=2))),
        "belief_tokens": TOP,
        **more,
    }


@pytest.mark.parametrize("greedy", [True, False])
def test_no_step_waits(runner: DeviceRunner, greedy: bool) -> None:
    cache = runner.new_cache()
    runner.encode(torch.arange(9), cache)
    canvas = torch.empty(2, 7, dtype=torch.int64, device=META)
    mask = torch.empty(2, 7, dtype=torch.bool, device=META)
    steps: list[Step] = []
    work = denoising(
        cache,
        canvas,
        SamplerConfig(max_steps=5),
        MetaDraws(),
        pins=Pins(mask=mask, tokens=canvas),
        banned=Bans(
            rows=torch.empty(2, CONFIG.vocab_tokens, dtype=torch.bool, device=META),
            places=torch.empty(7, dtype=torch.int64, device=META),
        ),
        belief=Belief(ids=canvas[..., None], probabilities=mask[..., None].float()),
        held=mask,
        is_draft=True,
        greedy=greedy,
        on_step=steps.append,
        **options(),
    )
    done = drive(runner, work)
    assert done.passes == 5
    assert [step.index for step in steps] == list(range(5))
    assert done.tokens.shape == (2, 7)


def test_no_prompt_waits(runner: DeviceRunner) -> None:
    cache = runner.new_cache()
    assert runner.encode(torch.arange(30), cache).shape == (30, CONFIG.width)
    cache.trim(20)
    runner.encode(torch.arange(3), cache)
    assert cache.tokens == 23
    rows = runner.read([torch.arange(5), torch.arange(2), torch.arange(9)], cache)
    assert [len(row) for row in rows] == [5, 2, 9]


def test_the_test_can_fail() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.empty(1, device=META) > 0)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(1, device=META).tolist()
