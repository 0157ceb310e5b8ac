import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, main

from infilld.kernels.route import route

EXPERTS, CHOSEN = 128, 8
# Canvases of 16 to 256 positions, and a piece of a prompt.
TOKENS = [16, 64, 256, 512]


def cases(device: str, impl: str) -> Iterator[Case]:
    """Scores of the 26B model's router."""
    for tokens in TOKENS:
        yield _case(tokens, device, impl)


def _case(tokens: int, device: str, impl: str) -> Case:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(tokens, EXPERTS, generator=draw).to(device)
    scale = torch.ones(EXPERTS, device=device)
    routes = tokens * CHOSEN
    tiles = min(EXPERTS, routes) + routes // 64
    moved = scores.nbytes + scale.nbytes + routes * (8 + 4 + 4 + 4) + tiles * 12

    def run() -> None:
        route(scores, scale, chosen=CHOSEN, impl=impl)  # type: ignore[arg-type]

    return Case(name=f"{tokens}x{EXPERTS}-{CHOSEN}", moved_bytes=moved, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
