"""What the figures depend on: the device, its two ceilings, versions."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from notes import Notes
from peaks import commit_of
from plan import Machine
from timing import is_cuda, steady, walls

_PACKAGES = ("torch", "triton", "transformers", "numpy", "tokenizers", "safetensors")


def measure(notes: Notes, machine: Machine) -> None:
    """One row of facts, then the ceilings."""
    device = machine.device
    facts: dict[str, object] = {
        "commit": commit_of(Path(__file__).resolve().parent),
        "device": torch.cuda.get_device_name(device) if is_cuda(device) else "cpu",
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        **{name: _version(name) for name in _PACKAGES},
    }
    if is_cuda(device):
        traits = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts |= {
            "capability": f"{traits.major}.{traits.minor}",
            "multiprocessors": traits.multi_processor_count,
            "memory_gb": round(total / 1e9, 2),
            "free_gb": round(free / 1e9, 2),
            "l2_mb": round(getattr(traits, "L2_cache_size", 0) / 1e6, 1),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    notes.row("facts", **facts)
    notes.run("copy", lambda: _copy(notes, device))
    notes.run("product", lambda: _product(notes, device))
    notes.run("launches", lambda: _launches(notes, device))


def _copy(notes: Notes, device: torch.device) -> None:
    count = 1 << (32 if is_cuda(device) else 22)
    source = torch.empty(count, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = steady(lambda: target.copy_(source), device, repeats=20)
    rate = 2 * count / times.ms / 1e6
    notes.row("ceilings", what="copy, read and written", per_s=f"{rate:.0f} GB", ms=times.ms)


def _product(notes: Notes, device: torch.device) -> None:
    side = 8192 if is_cuda(device) else 256
    dtype = torch.bfloat16 if is_cuda(device) else torch.float32
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times = steady(lambda: first @ second, device, repeats=20)
    rate = 2 * side**3 / times.ms / 1e9
    notes.row("ceilings", what=f"product, {dtype}", per_s=f"{rate:.2f} Tflop", ms=times.ms)


def _launches(notes: Notes, device: torch.device) -> None:
    one = torch.zeros(1, device=device)
    times = walls(lambda: [one.add_(1) for _ in range(1000)], device, repeats=3, waits=False)
    notes.row(
        "ceilings", what="launch, the host's part", per_s=f"{1e6 / times.ms:.0f}", ms=times.ms
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip().partition("\n")[0] or "unknown"
