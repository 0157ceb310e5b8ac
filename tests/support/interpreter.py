"""Run GPU implementations without a GPU, in Triton's interpreter, in a process of their own.

TRITON_INTERPRET has to be set before Triton is imported and changes it for good, so the calls of
a test module go to one child together.
"""

import dataclasses
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Call = dict[str, Any]


def run_gpu(operation: str, calls: Sequence[Call], folder: Path) -> list[Any]:
    """Results of `infilld.kernels.<operation>` with impl="gpu", one per call, on the CPU.

    On a CUDA device where there is one, else interpreted. Tensors may stand in tuples, lists,
    dictionaries and dataclasses, in arguments and results. An exception is a result too.
    """
    if torch.cuda.is_available():
        return _run(operation, calls, "cuda")
    asked, answered = folder / "calls.pt", folder / "results.pt"
    torch.save(list(calls), asked)
    subprocess.run(
        [sys.executable, __file__, operation, str(asked), str(answered)],
        check=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    results: list[Any] = torch.load(answered, weights_only=False)
    return results


def _run(operation: str, calls: Sequence[Call], device: str) -> list[Any]:
    module = importlib.import_module(f"infilld.kernels.{operation}")
    results: list[Any] = []
    for call in calls:
        moved = {name: _to(value, device) for name, value in call.items()}
        try:
            out = getattr(module, operation)(**moved, impl="gpu")
        except Exception as error:
            results.append(error)
        else:
            results.append(_to(out, "cpu"))
    return results


def _to(value: Any, device: str) -> Any:
    """The same value with every tensor in it on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **_to(fields, device))
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to(item, device) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_to(item, device) for item in value)
    return value


if __name__ == "__main__":
    name, source, target = sys.argv[1:]
    torch.save(_run(name, torch.load(source, weights_only=False), "cpu"), target)
