"""Random draws of the sampler, behind one interface so that a test can replay another sampler's."""

from typing import Protocol

import torch
from torch import Tensor


class Draws(Protocol):
    """Every random number of a denoise run, in the order the sampler asks for them."""

    def first_canvas(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        """Uniform token ids [R, L] int64 that a canvas starts from."""
        ...

    def sample(self, probabilities: Tensor) -> Tensor:
        """One token id per position [R, L] int64 from float32 probabilities [R, L, V]."""
        ...

    def uniforms(self, rows: int, canvas_tokens: int) -> Tensor:
        """What a sample is drawn with where its probabilities are not kept: [R, L, 2] in [0, 1)."""
        ...

    def noise(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        """Fresh uniform token ids [R, L] int64 for the re-noise; asked for in every step."""
        ...


class SeededDraws:
    """Draws from one private generator: the same seed gives the same canvas on the same device.

    Sampling inverts the cumulative distribution with one uniform number per position; the
    reference's multinomial spends V numbers on each.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self._generator = torch.Generator(device).manual_seed(seed)
        self._device = torch.device(device)

    def first_canvas(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        """Uniform token ids [R, L] int64."""
        return self._uniform_ids(rows, canvas_tokens, vocab_tokens)

    def sample(self, probabilities: Tensor) -> Tensor:
        """One token id per position [R, L] from probabilities [R, L, V]; never one of weight 0."""
        cumulative = probabilities.cumsum(-1)
        total = cumulative[..., -1:]
        uniform = torch.rand(total.shape, generator=self._generator, device=self._device)
        # (0, total]: a point at 0 would pick a first token that has no weight.
        point = (1.0 - uniform) * total
        found = torch.searchsorted(cumulative, point).squeeze(-1)
        return found.clamp_(max=probabilities.shape[-1] - 1)

    def uniforms(self, rows: int, canvas_tokens: int) -> Tensor:
        """Uniform numbers [R, L, 2]."""
        shape = (rows, canvas_tokens, 2)
        return torch.rand(shape, generator=self._generator, device=self._device)

    def noise(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        """Uniform token ids [R, L] int64."""
        return self._uniform_ids(rows, canvas_tokens, vocab_tokens)

    def _uniform_ids(self, rows: int, canvas_tokens: int, vocab_tokens: int) -> Tensor:
        shape = (rows, canvas_tokens)
        return torch.randint(vocab_tokens, shape, generator=self._generator, device=self._device)
