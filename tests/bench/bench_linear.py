import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))
from few_bits import random_weight
from harness import Case, main

from infilld.kernels._tiles import TiledWeight
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.linear import linear
from infilld.kernels.quant_pack import quant_pack

# The 26B model's: [N, K].
SHAPES = {
    "qkv-sliding": (8192, 2816),
    "qkv-full": (9216, 2816),
    "out-sliding": (2816, 4096),
    "out-full": (2816, 8192),
    "mlp-up": (4224, 2816),
    "mlp-down": (2816, 2112),
}
TOKENS = [16, 64, 256, 1024]


def cases(device: str, impl: str) -> Iterator[Case]:
    """Projections around attention and of the dense MLP, in four bits."""
    for name, shape in SHAPES.items():
        rows = random_weight(shape, kind="int4", group=64).to(device)
        weight = quant_pack(rows, impl="gpu") if impl == "gpu" else rows
        for tokens in TOKENS:
            yield _case(name, tokens, weight, device, impl)


def _case(
    name: str, tokens: int, weight: QuantizedWeight | TiledWeight, device: str, impl: str
) -> Case:
    rows, columns = weight.shape
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=draw).bfloat16().to(device)

    def run() -> Tensor:
        return linear(x, weight, impl=impl)  # type: ignore[arg-type]

    moved = weight.nbytes + x.nbytes + tokens * rows * 2
    return Case(name=f"{name}-{tokens}", moved_bytes=moved, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
