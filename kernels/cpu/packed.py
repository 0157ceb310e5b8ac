"""Weights in the layout that this CPU multiplies fastest; which one that is, is measured.

torch's own product reads a weight as it lies. Two libraries that come with torch read one that
was rearranged for them: oneDNN in the weight's type, FBGEMM in half precision with float32 sums.
A head of 16,384 tokens is read 2 and 3 times as fast so, with AVX2 and 16 positions.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Way = Literal["plain", "blocked", "half"]

# Rows of x that the layout is tuned for, and of the product that is measured.
TYPICAL_ROWS = 32
# What half precision may change a weight by, as a share of the largest: less than the sums lose.
_LOSS = 2.0**-20
_MEASURED = (4096, 512)
_REPEATS = 5
_HALF_THE_BYTES = 0.8


class PackedWeight:
    """One weight [N, K] of `x @ weight.T`.

    Args:
        weight: [N, K] float32 or bfloat16, on a CPU.
        way: layout; None: the fastest here that changes no result. "half" is left out where
            numbers would be lost: a bfloat16 checkpoint fits, most float32 ones do not.

    Attributes:
        shape: (N, K). way: as laid out. nbytes: of the layout.
    """

    def __init__(self, weight: Tensor, way: Way | None = None) -> None:
        self.shape = tuple(weight.shape)
        self.way: Way = _best_way(weight) if way is None else way
        self._multiply, self.nbytes = _PACKERS[self.way](weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        """[T, N] of x [T, K], contiguous, of the weight's type."""
        return self._multiply(x)


def _best_way(weight: Tensor) -> Way:
    ranked = fastest(weight.dtype)
    return next(each for each in ranked if each != "half" or fits_half(weight))


def fits_half(weight: Tensor) -> bool:
    """Whether half precision holds a weight as well as float32 sums do."""
    if weight.dtype != torch.float32:
        return False
    largest = float(weight.abs().max())
    lost = float((weight - weight.half().float()).abs().max())
    return lost <= _LOSS * largest


@functools.cache
def fastest(dtype: torch.dtype) -> tuple[Way, ...]:
    """The layouts that work here for weights of a type, fastest first; measured once."""
    weight = torch.ones(_MEASURED, dtype=dtype)
    x = torch.ones(TYPICAL_ROWS, _MEASURED[1], dtype=dtype)
    products: dict[Way, Callable[[Tensor], Tensor]] = {}
    for way, pack in _PACKERS.items():
        try:
            multiply, _ = pack(weight)
            multiply(x)
        except (AttributeError, RuntimeError, NotImplementedError):
            # The libraries are not in every build of torch, and this is not their public face.
            continue
        products[way] = multiply
    best = dict.fromkeys(products, math.inf)
    for _ in range(_REPEATS):
        for way, multiply in products.items():
            started = time.perf_counter()
            multiply(x)
            best[way] = min(best[way], time.perf_counter() - started)
    # Half the bytes: where it is as fast alone, it is faster in a model that fills no cache.
    best["half"] = best.get("half", math.inf) * _HALF_THE_BYTES
    return tuple(sorted(products, key=best.__getitem__))


def _plain(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    return lambda x: F.linear(x, weight), weight.nbytes


def _blocked(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    operations: Any = torch.ops.mkldnn
    held = operations._reorder_linear_weight(weight, TYPICAL_ROWS)
    product = operations._linear_pointwise.default
    return lambda x: product(x, held, None, "none", [], ""), weight.nbytes


def _half(weight: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    operations: Any = torch.ops.quantized
    if weight.dtype != torch.float32:
        raise NotImplementedError("FBGEMM multiplies float32")
    held = operations.linear_prepack_fp16(weight, None)
    product = operations.linear_dynamic_fp16.default
    return lambda x: product(x, held), weight.nbytes // 2


_PACKERS: dict[Way, Callable[[Tensor], tuple[Callable[[Tensor], Tensor], int]]] = {
    "plain": _plain,
    "blocked": _blocked,
    "half": _half,
}
