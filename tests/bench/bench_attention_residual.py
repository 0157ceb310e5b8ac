import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, main

from infilld.kernels.attention_residual import attention_residual

WIDTH = 2816
TOKENS = (16, 64, 256, 512)


def cases(device: str, impl: str) -> Iterator[Case]:
    """Canvases and a prompt's piece."""
    for tokens in TOKENS:
        yield _case(tokens, device, impl)


def _case(tokens: int, device: str, impl: str) -> Case:
    draw = torch.Generator().manual_seed(0)
    x, attended = (
        torch.randn(tokens, WIDTH, generator=draw).to(torch.bfloat16).to(device) for _ in range(2)
    )
    weights = [torch.randn(WIDTH, generator=draw).to(torch.bfloat16).to(device) for _ in range(4)]

    def run() -> None:
        attention_residual(x, attended, *weights, eps=1e-6, impl=impl)  # type: ignore[arg-type]

    # Two rows are read and four written.
    return Case(name=f"{tokens}", moved_bytes=2 * WIDTH * (6 * tokens + 4), run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
