"""Run GPU implementations without a GPU, in Triton's interpreter, in a process of their own.

TRITON_INTERPRET has to be set before Triton is imported and changes it for good. Importing torch
and Triton takes longer than most calls, so one child serves all test modules of a run.
"""

import atexit
import dataclasses
import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

Call = dict[str, Any]


def run_gpu(
    operation: str, calls: Sequence[Call], folder: Path, *, written: Sequence[str] = ()
) -> list[Any]:
    """Results of `infilld.kernels.<operation>` with impl="gpu", one per call, on the CPU.

    On a CUDA device where there is one, else interpreted. Tensors may stand in tuples, lists,
    dictionaries and dataclasses, in arguments and results. An exception is a result too.

    Args:
        operation: name of its module and function. calls: arguments by name. folder: for files.
        written: names of arguments that are asked for in place of the result, as they are after
            the call.
    """
    if torch.cuda.is_available():
        return _run(operation, calls, written, "cuda")
    asked, answered = folder / "calls.pt", folder / "results.pt"
    torch.save((operation, list(calls), list(written)), asked)
    _child().ask(asked, answered)
    results: list[Any] = torch.load(answered, weights_only=False)
    return results


class _Child:
    """A process in which kernels are interpreted; it ends with this one."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )
        atexit.register(self.end)

    def ask(self, asked: Path, answered: Path) -> None:
        """Have the calls in one file answered in another.

        Raises:
            RuntimeError: the child has ended; its last words are on stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(asked, answered, sep="\t", file=self._process.stdin, flush=True)
            done = self._process.stdout.readline()
        except BrokenPipeError:
            done = ""
        if not done:
            _child.cache_clear()
            self.end()
            raise RuntimeError(f"the interpreter's process ended over {asked}")

    def end(self) -> None:
        """Close its input, which is what it waits for, and wait."""
        atexit.unregister(self.end)
        self._process.communicate()


@functools.cache
def _child() -> _Child:
    return _Child()


def _serve() -> None:
    """Answer files of calls, named one a line on standard input."""
    # What a library prints is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked, answered = line.rstrip("\n").split("\t")
        operation, calls, written = torch.load(asked, weights_only=False)
        torch.save(_run(operation, calls, written, "cpu"), answered)
        print("done", file=answers, flush=True)


def _run(operation: str, calls: Sequence[Call], written: Sequence[str], device: str) -> list[Any]:
    module = importlib.import_module(f"infilld.kernels.{operation}")
    results: list[Any] = []
    for call in calls:
        moved = {name: _to(value, device) for name, value in call.items()}
        try:
            out = getattr(module, operation)(**moved, impl="gpu")
        except Exception as error:
            results.append(error)
        else:
            results.append(_to([moved[name] for name in written] if written else out, "cpu"))
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
    _serve()
