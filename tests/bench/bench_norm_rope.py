import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, main

from infilld.kernels.norm_rope import norm_rope

# Kind of layer: heads, key heads, head size, whether values are projected.
KINDS = {"sliding": (16, 8, 256, True), "full": (16, 2, 512, False)}
TOKENS = (16, 64, 256, 512)


def cases(device: str, impl: str) -> Iterator[Case]:
    """The projections of canvases and of a prompt's piece, for both kinds of layer."""
    for kind in KINDS:
        for tokens in TOKENS:
            yield _case(kind, tokens, device, impl)


def _case(kind: str, tokens: int, device: str, impl: str) -> Case:
    heads, key_heads, size, values = KINDS[kind]
    draw = torch.Generator().manual_seed(0)
    width = (heads + (2 if values else 1) * key_heads) * size
    qkv, cosine, sine, q_weight, k_weight = (
        torch.randn(shape, generator=draw).to(torch.bfloat16).to(device)
        for shape in ((tokens, width), (tokens, size), (tokens, size), (size,), (size,))
    )
    written = tokens * (heads + 2 * key_heads) * size
    read = sum(tensor.numel() for tensor in (qkv, cosine, sine, q_weight, k_weight))

    def run() -> None:
        norm_rope(
            qkv,
            q_weight,
            k_weight,
            cosine,
            sine,
            heads=heads,
            key_heads=key_heads,
            eps=1e-6,
            impl=impl,  # type: ignore[arg-type]
        )

    return Case(name=f"{kind}-{tokens}", moved_bytes=2 * (read + written), run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
