"""What a device reaches at best; the benches' harness knows it, and which commit this is."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from harness import commit_of, peak_named, timed

__all__ = ["Peak", "commit_of", "peak_of", "timed"]


@dataclass(frozen=True)
class Peak:
    """Bytes moved and bf16 operations done in a second."""

    bytes_per_s: float
    operations_per_s: float


def peak_of(device: torch.device) -> Peak | None:
    """Of a device; None where it is not known."""
    if device.type != "cuda":
        return None
    found = peak_named(torch.cuda.get_device_name(device))
    return None if found is None else Peak(*found)
