import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, main

from infilld.kernels.head import head

WIDTH, SOFTCAP = 2816, 30.0
TOKENS = [16, 64, 256]
KEPT = [8, 64]
# The whole vocabulary on a GPU; a CPU would take minutes.
VOCAB = {"cuda": 262_144, "cpu": 4096}


def cases(device: str, impl: str) -> Iterator[Case]:
    """Canvases of the 26B model, and a text that is scored."""
    draw = torch.Generator(device).manual_seed(0)
    embedding = torch.randn(
        VOCAB[device], WIDTH, generator=draw, device=device, dtype=torch.bfloat16
    )
    for tokens in TOKENS:
        for kept in KEPT:
            yield _case(tokens, embedding, impl, kept=kept)
    yield _case(64, embedding, impl, kept=8, banned=True)
    yield _case(512, embedding, impl, kept=1, scored=True)


def _case(
    tokens: int,
    embedding: torch.Tensor,
    impl: str,
    *,
    kept: int,
    banned: bool = False,
    scored: bool = False,
) -> Case:
    device, vocab = embedding.device, len(embedding)
    # Scores of a standard deviation of 5: a few tokens share most of the mass.
    hidden = torch.randn(tokens, WIDTH, device=device) * (5 / WIDTH**0.5)
    hidden = hidden.to(embedding.dtype)
    ban = torch.rand(2, vocab, device=device) < 0.1 if banned else None
    ban_row = torch.arange(tokens, device=device) % 2 if banned else None
    targets = torch.arange(tokens, device=device) if scored else None
    uniforms = None if scored else torch.rand(tokens, 2, device=device)
    temperature = torch.full((tokens,), 0.6, device=device)

    def run() -> None:
        head(
            hidden,
            embedding,
            softcap=SOFTCAP,
            temperature=temperature,
            top=kept,
            banned=ban,
            ban_row=ban_row,
            targets=targets,
            uniforms=uniforms,
            impl=impl,  # type: ignore[arg-type]
        )

    name = f"{tokens}x{vocab}-{kept}{'-bans' if banned else ''}{'-scored' if scored else ''}"
    return Case(name=name, moved_bytes=embedding.nbytes + hidden.nbytes, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
