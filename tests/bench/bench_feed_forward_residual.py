import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, main

from infilld.kernels.feed_forward_residual import feed_forward_residual

WIDTH, CHOSEN = 2816, 8
TOKENS = (16, 64, 256, 512)


def cases(device: str, impl: str) -> Iterator[Case]:
    """Canvases and a prompt's piece, eight experts a token."""
    for tokens in TOKENS:
        yield _case(tokens, device, impl)


def _case(tokens: int, device: str, impl: str) -> Case:
    draw = torch.Generator().manual_seed(0)
    routes = tokens * CHOSEN
    residual, dense, expert_rows = (
        torch.randn(rows, WIDTH, generator=draw).to(torch.bfloat16).to(device)
        for rows in (tokens, tokens, routes)
    )
    place = torch.randperm(routes, generator=draw).to(torch.int32).to(device)
    dense_weight, expert_weight, after_weight, next_weight = (
        torch.randn(WIDTH, generator=draw).to(torch.bfloat16).to(device) for _ in range(4)
    )
    scalar = torch.ones(1, dtype=torch.bfloat16, device=device)

    def run() -> None:
        feed_forward_residual(
            residual,
            dense,
            expert_rows,
            place,
            dense_weight,
            expert_weight,
            after_weight,
            next_weight,
            scalar,
            eps=1e-6,
            impl=impl,  # type: ignore[arg-type]
        )

    # Two rows and those of the experts are read, two written.
    moved = 2 * WIDTH * ((4 + CHOSEN) * tokens + 4) + 4 * routes
    return Case(name=f"{tokens}", moved_bytes=moved, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
