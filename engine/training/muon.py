"""Muon: momentum whose matrices are orthogonalised, for the weights between embeddings.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), its quintic
Newton-Schulz iteration; the step size that matches AdamW's is from arXiv 2502.16982, section 2.2.
Differs: float32, and stacks of experts as batches; torch.optim.Muon takes 2-D weights in bfloat16,
which processors without bf16 products run 10 times slower.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from infilld.engine.model import DiffusionGemma

# Coefficients of x -> a x + b x^3 + c x^5, steep at 0; the result has singular values near 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
# Root mean square of an update in units of the learning rate, as AdamW's usually is.
_UPDATE_RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for 2-D and 3-D weights (the last two axes are the matrix).

    Args:
        params: weights. lr: learning rate, comparable with AdamW's.
        weight_decay: decoupled. momentum: of the gradient's average, used with look-ahead.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape[-2:]].append(weight)
            for weights in by_shape.values():
                self._move(weights, group)

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        """Update weights whose matrices have one shape, all in one batch."""
        rate, keep = group["lr"], group["momentum"]
        directions = []
        for weight in weights:
            state, slope = self.state[weight], weight.grad
            assert slope is not None
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            mean = state["momentum"].lerp_(slope, 1 - keep)
            ahead = torch.lerp(slope, mean, keep)
            directions.append(ahead.reshape(-1, *weight.shape[-2:]))
        rows, columns = weights[0].shape[-2:]
        scale = rate * _UPDATE_RMS * max(rows, columns) ** 0.5
        updates = orthogonalised(torch.cat(directions))
        parts = torch.split(updates, [len(direction) for direction in directions])
        for weight, update in zip(weights, parts, strict=True):
            weight.mul_(1 - rate * group["weight_decay"])
            weight.add_(update.view_as(weight), alpha=-scale)


def orthogonalised(matrices: Tensor) -> Tensor:
    """The nearest matrices [N, rows, columns] with singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def optimizers_of(
    model: DiffusionGemma, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embeddings, AdamW for everything else."""
    hidden, table, vectors = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif name == "embed_tokens.weight" or ".router." in name:
            table.append(parameter)
        else:
            hidden.append(parameter)
    others = [
        {"params": table, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [
        Muon(hidden, learning_rate, weight_decay),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), fused=True),
    ]
