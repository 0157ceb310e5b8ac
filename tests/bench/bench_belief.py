import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, main

from infilld.kernels.belief import belief

WIDTH = 2816
TOKENS = [16, 64, 256]
KEPT = [8, 64]
# Of the model's 262,144 tokens: enough that no cache holds the rows.
VOCAB = {"cuda": 262_144, "cpu": 16_384}


def cases(device: str, impl: str) -> Iterator[Case]:
    """Beliefs of the 26B model in its 8 or 64 most probable tokens."""
    draw = torch.Generator().manual_seed(0)
    embedding = torch.zeros(VOCAB[device], WIDTH, dtype=torch.bfloat16, device=device)
    mean = embedding.new_zeros(WIDTH)
    for tokens in TOKENS:
        for kept in KEPT:
            ids = torch.randint(len(embedding), (tokens, kept), generator=draw).to(device)
            yield _case(ids, embedding, mean, impl)


def _case(ids: torch.Tensor, embedding: torch.Tensor, mean: torch.Tensor, impl: str) -> Case:
    tokens, kept = ids.shape
    probabilities = torch.full(ids.shape, 0.9 / kept, device=ids.device)
    moved = tokens * kept * (8 + 4 + WIDTH * 2) + WIDTH * 2 + tokens * WIDTH * 2

    def run() -> None:
        belief(ids, probabilities, embedding, mean, impl=impl)  # type: ignore[arg-type]

    return Case(name=f"{tokens}x{kept}", moved_bytes=moved, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
