import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import Case, main

from infilld.kernels.canvas_attention import canvas_attention

HEADS = 16
# Kind of layer: key heads, head size, the longest past it reads.
KINDS = {"sliding": (8, 256, 1023), "full": (2, 512, 1 << 20)}
# Rows (hypotheses) and positions of their canvases.
CANVASES = ((1, 16), (1, 64), (1, 256), (4, 64))
PREFIXES = (512, 4096, 32768)


def cases(device: str, impl: str) -> Iterator[Case]:
    """Canvases over one stored prefix, for both kinds of layer."""
    for kind, (_, _, longest) in KINDS.items():
        for rows, tokens in CANVASES:
            for count in sorted({min(prefix, longest) for prefix in PREFIXES}):
                yield _case(kind, rows, tokens, count, torch.bfloat16, device, impl)
    yield _case("full", 1, 64, 32768, torch.float8_e4m3fn, device, impl)


def _case(
    kind: str, rows: int, tokens: int, count: int, stored: torch.dtype, device: str, impl: str
) -> Case:
    key_heads, size, _ = KINDS[kind]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, tokens, heads, size, generator=draw).to(torch.bfloat16).to(device)
        for heads in (HEADS, key_heads, key_heads)
    )
    q = q * size**-0.5
    # A slot has more room than is used.
    past_keys, past_values = (
        torch.randn(1, key_heads, count + 256, size, generator=draw).to(stored).to(device)
        for _ in range(2)
    )
    numbers = [
        torch.full((rows,), value, dtype=torch.int32, device=device)
        for value in (0, 0, count, tokens)
    ]
    used = 2 * key_heads * count * size * stored.itemsize
    moved = 2 * (2 * q.numel() + k.numel() + v.numel()) + used

    def run() -> None:
        canvas_attention(
            q,
            k,
            v,
            past_keys,
            past_values,
            *numbers,
            impl=impl,  # type: ignore[arg-type]
        )

    suffix = "-float8" if stored == torch.float8_e4m3fn else ""
    return Case(name=f"{kind}-{rows}x{tokens}-{count}{suffix}", moved_bytes=moved, run=run)


if __name__ == "__main__":
    raise SystemExit(main(__file__, cases))
