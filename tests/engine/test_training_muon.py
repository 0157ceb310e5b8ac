"""Orthogonalised updates, for single matrices and for stacks of experts."""

import pytest
import torch

from infilld.engine.training.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 12), (2, 12, 4)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_stack_is_updated_as_its_matrices_would_be() -> None:
    draw = torch.Generator().manual_seed(1)
    start, slope = torch.randn(2, 3, 6, 4, generator=draw)
    stack = start.clone().requires_grad_()
    single = [matrix.clone().requires_grad_() for matrix in start]
    stack.grad = slope
    for matrix, part in zip(single, slope, strict=True):
        matrix.grad = part
    for weights in ([stack], single):
        Muon(weights, lr=0.1, weight_decay=0.5).step()
    assert not torch.allclose(stack, start)
    torch.testing.assert_close(stack.detach(), torch.stack(single).detach())


def test_a_weight_without_gradient_stays() -> None:
    still = torch.ones(3, 3, requires_grad=True)
    Muon([still], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(3, 3))
