import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, main

from infilld.kernels.accept import accept

# Rows are hypotheses of one request; 256 is the 26B model's canvas.
SHAPES = [(1, 64), (1, 256), (4, 64), (4, 256), (16, 64)]


def cases(device: str, impl: str) -> Iterator[Case]:
    """Canvases half of which are certain, with and without pins."""
    for rows, tokens in SHAPES:
        for pinned in (False, True):
            yield _case(rows, tokens, pinned, device, impl)


def _case(rows: int, tokens: int, pinned: bool, device: str, impl: str) -> Case:
    draw = torch.Generator().manual_seed(0)
    entropy = (torch.rand(rows, tokens, generator=draw) ** 8 * 12).to(device)
    ids = torch.randint(262_144, (3, rows, tokens), generator=draw).to(device)
    mask = (torch.rand(rows, tokens, generator=draw) < 0.5).to(device)
    moved = rows * tokens * (4 + 8 + 8 + 8 + 1 + (9 if pinned else 0))

    def run() -> None:
        accept(
            entropy,
            ids[0],
            ids[1],
            mask if pinned else None,
            ids[2] if pinned else None,
            budget_nats=0.1,
            impl=impl,  # type: ignore[arg-type]
        )

    return Case(name=f"{rows}x{tokens}{'-pins' if pinned else ''}", moved_bytes=moved, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
