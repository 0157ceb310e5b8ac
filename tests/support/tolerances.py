"""How far a result may be from the exact one: as far as the definition is, and its own rounding."""

import torch
from torch import Tensor


def assert_close(found: Tensor, low: Tensor, exact: Tensor, *, roundings: int = 2) -> None:
    """Compare with the definition in float64, and with how well a narrower type can do.

    Args:
        found: the result. low: the definition's in the same type. exact: the definition's for the
            same inputs in float64.
        roundings: of the largest value, in found's type, that may be added to twice low's error.
            The interpreter cuts off bits when it stores bfloat16, which counts as two.
    """
    assert found.dtype == low.dtype
    assert found.shape == low.shape == exact.shape
    assert torch.isfinite(found).all()
    if found.numel() == 0:
        return
    largest = exact.abs().max().item()
    theirs = (low.double() - exact).abs().max().item()
    error = (found.double() - exact).abs().max().item()
    allowed = 2 * theirs + roundings * torch.finfo(found.dtype).eps * largest
    assert error <= allowed, f"off by {error}, allowed {allowed}, the definition is off by {theirs}"
