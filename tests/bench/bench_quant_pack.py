import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))
from few_bits import random_weight
from harness import Case, main

from infilld.kernels._tiles import TiledWeight, tile_layout
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.gpu.quant_pack import quant_pack as pack_tiles

# [N, K] of one of the 26B model's experts: packing goes through them one by one.
SHAPES = {"expert-up": (1408, 2816), "expert-down": (2816, 704)}


def cases(device: str, impl: str) -> Iterator[Case]:
    """Experts in four bits. Without the check of the scales, which waits for the device."""
    for name, shape in SHAPES.items():
        weight = random_weight(shape, kind="int4", group=64).to(device)
        yield _case(name, weight)


def _case(name: str, weight: QuantizedWeight) -> Case:
    layout = tile_layout(weight, capability=90, gated=True)

    def run() -> TiledWeight:
        return pack_tiles(weight, layout)

    return Case(name=name, moved_bytes=2 * weight.nbytes, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
