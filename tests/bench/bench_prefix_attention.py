import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, main

from infilld.kernels.prefix_attention import prefix_attention

HEADS = 16
# Kind of layer: key heads, head size, window.
KINDS: dict[str, tuple[int, int, int | None]] = {
    "sliding": (8, 256, 1024),
    "full": (2, 512, None),
}
# What typing appends, and a piece of a long prompt.
TOKENS = (1, 16, 512)
COUNTS = (0, 4096, 32256)


def cases(device: str, impl: str) -> Iterator[Case]:
    """New tokens behind prefixes of several lengths, for both kinds of layer."""
    for kind in KINDS:
        for tokens in TOKENS:
            for count in COUNTS:
                yield _case(kind, tokens, count, device, impl)


def _case(kind: str, tokens: int, count: int, device: str, impl: str) -> Case:
    key_heads, size, window = KINDS[kind]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(tokens, heads, size, generator=draw).to(torch.bfloat16).to(device)
        for heads in (HEADS, key_heads, key_heads)
    )
    q = q * size**-0.5
    past_keys, past_values = (
        torch.randn(1, key_heads, count + tokens, size, generator=draw)
        .to(torch.bfloat16)
        .to(device)
        for _ in range(2)
    )
    slot, held = (torch.tensor([at], dtype=torch.int32, device=device) for at in (0, count))
    seen = count if window is None else min(count, window - 1)
    # The new keys and values are read and stored.
    moved = 2 * (2 * q.numel() + 4 * k.numel() + 2 * key_heads * seen * size)

    def run() -> None:
        prefix_attention(
            q,
            k,
            v,
            past_keys,
            past_values,
            slot,
            held,
            window=window,
            writes=True,
            impl=impl,  # type: ignore[arg-type]
        )

    return Case(name=f"{kind}-{tokens}-after-{count}", moved_bytes=moved, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
