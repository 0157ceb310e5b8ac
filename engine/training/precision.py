"""Which type of number matrix products are fastest in."""

import functools
import math
import time

import torch
from torch import Tensor


@functools.cache
def bf16_pays(device_type: str) -> bool:
    """Whether bfloat16 products are faster than float32 ones here; measured once.

    CPUs with AVX-512 bf16 run them 4 to 5 times as fast, CPUs without it 10 times as slow.
    """
    if device_type != "cpu":
        return True
    wide = torch.randn(512, 512)
    single, half = (_product_s(wide.to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    return half < single


def _product_s(square: Tensor) -> float:
    best = math.inf
    for _ in range(3):
        started = time.perf_counter()
        square @ square
        best = min(best, time.perf_counter() - started)
    return best
