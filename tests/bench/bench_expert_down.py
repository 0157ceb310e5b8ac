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
from infilld.kernels.expert_down import expert_down
from infilld.kernels.quant_pack import quant_pack
from infilld.kernels.route import route

# The 26B model's experts; canvases and what several of them give.
EXPERTS, CHOSEN, WIDTH, HIDDEN = 128, 8, 2816, 704
TOKENS = [16, 32, 64, 128, 256]
FORMS = {
    "int4-g64": {"kind": "int4", "group": 64},
    "int4-g32": {"kind": "int4", "group": 32},
    "nvfp4": {"kind": "nvfp4", "group": 16},
    "fp8": {"kind": "fp8", "group": HIDDEN},
}


def cases(device: str, impl: str) -> Iterator[Case]:
    """Uniform routes in every form."""
    for name, form in FORMS.items():
        rows = random_weight((EXPERTS, WIDTH, HIDDEN), **form).to(device)  # type: ignore[arg-type]
        weight = quant_pack(rows, impl="gpu") if impl == "gpu" else rows
        for tokens in TOKENS:
            yield _case(name, tokens, weight, device, impl)


def _case(
    name: str, tokens: int, weight: QuantizedWeight | TiledWeight, device: str, impl: str
) -> Case:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, EXPERTS, generator=draw)
    hidden = torch.randn(tokens * CHOSEN, HIDDEN, generator=draw).bfloat16().to(device)
    routes = route(scores, torch.ones(EXPERTS), chosen=CHOSEN, impl="reference")
    hit = len(set(routes.ids.flatten().tolist()))
    routes = type(routes)(*(part.to(device) for part in routes))

    def run() -> Tensor:
        return expert_down(hidden, weight, routes, impl=impl)  # type: ignore[arg-type]

    return Case(
        name=f"{name}-{tokens}",
        moved_bytes=weight.nbytes * hit // EXPERTS + hidden.nbytes + tokens * CHOSEN * WIDTH * 2,
        run=run,
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
