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
from infilld.kernels.expert_gate_up import expert_gate_up
from infilld.kernels.quant_pack import quant_pack
from infilld.kernels.route import route

# The 26B model's experts; canvases and what several of them give.
EXPERTS, CHOSEN, WIDTH, HIDDEN = 128, 8, 2816, 704
TOKENS = [16, 32, 64, 128, 256]
FORMS = {
    "int4-g64": {"kind": "int4", "group": 64},
    "int4-g32": {"kind": "int4", "group": 32},
    "nvfp4": {"kind": "nvfp4", "group": 16},
    "fp8": {"kind": "fp8", "group": WIDTH},
}


def cases(device: str, impl: str) -> Iterator[Case]:
    """Uniform routes in every form; skewed ones, which hit fewer experts, in one."""
    for name, form in FORMS.items():
        rows = random_weight((EXPERTS, 2 * HIDDEN, WIDTH), **form).to(device)  # type: ignore[arg-type]
        weight = quant_pack(rows, gated=True, impl="gpu") if impl == "gpu" else rows
        for skew in (0.0, 2.0) if name == "int4-g64" else (0.0,):
            for tokens in TOKENS:
                yield _case(name, tokens, skew, weight, device, impl)


def _case(
    name: str,
    tokens: int,
    skew: float,
    weight: QuantizedWeight | TiledWeight,
    device: str,
    impl: str,
) -> Case:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, EXPERTS, generator=draw)
    scores += skew * torch.randn(EXPERTS, generator=draw)
    x = torch.randn(tokens, WIDTH, generator=draw).bfloat16().to(device)
    routes = route(scores, torch.ones(EXPERTS), chosen=CHOSEN, impl="reference")
    hit = len(set(routes.ids.flatten().tolist()))
    routes = type(routes)(*(part.to(device) for part in routes))

    def run() -> Tensor:
        return expert_gate_up(x, weight, routes, impl=impl)  # type: ignore[arg-type]

    return Case(
        name=f"{name}-{tokens}{'-skewed' if skew else ''}",
        moved_bytes=weight.nbytes * hit // EXPERTS + x.nbytes + tokens * CHOSEN * HIDDEN * 2,
        run=run,
    )


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
