"""Gradients of a batch: on a CPU its parts are computed side by side, a thread for each.

A small model's operations are too short to share between threads. Measured with the cpu recipe on
two AVX2 cores beside other work: a whole batch on two threads took 1.65 s of processor time, its
halves on one thread each 1.27 s together.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from infilld.engine.model import DiffusionGemma
from infilld.engine.training.examples import Batch
from infilld.engine.training.joint import JointPass, Losses
from infilld.engine.training.precision import bf16_pays

_MOST_PARTS = 4
_LOSSES = ("total", "encoder", "gap")


class SideBySide:
    """Computes losses and gradients of batches.

    Args:
        model: being trained.
    """

    def __init__(self, model: DiffusionGemma) -> None:
        self._model = model
        self._weights = list(model.parameters())
        self._threads = torch.get_num_threads()
        self._parts = 1
        if model.device.type == "cpu":
            self._parts = min(_MOST_PARTS, self._threads)
        self._pool = ThreadPoolExecutor(
            self._parts, initializer=torch.set_num_threads, initargs=(self._threads // self._parts,)
        )

    def losses(
        self, batch: Batch, *, seed: int, unrolled_steps: int, encoder_weight: float
    ) -> Losses:
        """Mean losses of the parts of a batch; leaves the mean gradient in the weights.

        Args:
            batch: clean examples. seed: of the noise.
            unrolled_steps, encoder_weight: see `JointPass`.
        """

        def run(number: int, part: Batch) -> tuple[Losses, tuple[Tensor | None, ...]]:
            generator = torch.Generator().manual_seed(seed + number)
            work = JointPass(self._model, generator, encoder_weight=encoder_weight)
            device = self._model.device.type
            with torch.autocast(device, torch.bfloat16, enabled=bf16_pays(device)):
                losses = work.losses(part, unrolled_steps=unrolled_steps)
            return losses, torch.autograd.grad(losses.total, self._weights, allow_unused=True)

        parts = batch.split(self._parts)
        done = list(self._pool.map(run, range(len(parts)), parts))
        for weight, *slopes in zip(self._weights, *(slopes for _, slopes in done), strict=True):
            found = [slope for slope in slopes if slope is not None]
            weight.grad = torch.stack(found).sum(0) / len(parts) if found else None
        return Losses(*(_mean([getattr(losses, name) for losses, _ in done]) for name in _LOSSES))


def _mean(parts: Sequence[Tensor | None]) -> Any:
    """The mean of the parts that there are; None where there is none."""
    found = [part.detach() for part in parts if part is not None]
    return torch.stack(found).mean() if found else None
