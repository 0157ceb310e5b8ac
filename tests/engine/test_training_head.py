"""The chunked head is the ordinary cross-entropy of soft-capped logits, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from infilld.engine.training.head import believe, head_loss

SOFTCAP = 30.0


@pytest.mark.parametrize("rows", [1, 127, 128, 300])
def test_loss_and_gradients_are_autograd_s(rows: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 12, generator=draw, dtype=torch.float32, requires_grad=True)
    table = (3 * torch.randn(40, 12, generator=draw)).requires_grad_()
    labels = torch.randint(40, (rows,), generator=draw)
    weights = torch.rand(rows, generator=draw)

    logits = torch.tanh(F.linear(hidden, table) / SOFTCAP) * SOFTCAP
    each = F.cross_entropy(logits, labels, reduction="none")
    wanted = torch.autograd.grad(2 * (each * weights).sum(), (hidden, table))

    total, nats = head_loss(hidden, table, labels, weights, SOFTCAP)
    found = torch.autograd.grad(2 * total, (hidden, table))
    torch.testing.assert_close(nats, each.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(total, (each * weights).sum(), atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_no_row_is_no_loss() -> None:
    hidden, table = torch.zeros(0, 12, requires_grad=True), torch.randn(40, 12)
    empty = torch.zeros(0)
    total, nats = head_loss(hidden, table, empty.long(), empty, SOFTCAP)
    assert total == 0
    assert not len(nats)


def test_a_belief_is_that_of_the_softmax() -> None:
    draw = torch.Generator().manual_seed(0)
    hidden, table = torch.randn(200, 12, generator=draw), torch.randn(40, 12, generator=draw)
    heat = 0.4 + torch.rand(200, generator=draw)
    logits = torch.tanh(F.linear(hidden, table) / SOFTCAP) * SOFTCAP
    shares = (logits / heat[:, None]).softmax(-1)
    found = believe(hidden, table, SOFTCAP, heat)
    torch.testing.assert_close(found.embedding, shares @ table, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.argmax, logits.argmax(-1))
    entropy = torch.distributions.Categorical(shares).entropy()
    torch.testing.assert_close(found.entropy_nats, entropy, atol=1e-4, rtol=1e-4)
