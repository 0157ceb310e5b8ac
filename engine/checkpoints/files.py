"""The safetensors files of a checkpoint folder: which they are, what their headers say, numbers."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from infilld.engine.errors import CheckpointMismatch, CheckpointMissing, NotEnoughMemory

# Reading one runs whatever code it holds.
_PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
# What safetensors calls the types that hold plain numbers, and bytes of every type we meet.
FLOATS = ("F64", "F32", "BF16", "F16")
_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as its header tells.

    Attributes:
        name: in the file. path: of the file.
        shape: numbers along each axis. dtype: as safetensors writes it, "BF16".
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numbers * _BYTES.get(self.dtype, 1)

    def __str__(self) -> str:
        return f"{self.name} is {self.dtype} {list(self.shape)}"


def refuse_pickles(source: Path) -> None:
    """Name a checkpoint whose weights are pickled instead of looking into it.

    Raises:
        CheckpointMismatch: there is a pickle, and no safetensors file.
    """
    beside = [source] if source.is_file() else sorted(source.glob("*"))
    pickled = [path.name for path in beside if path.suffix in _PICKLED]
    if pickled and not any(".safetensors" in path.suffixes for path in beside):
        raise CheckpointMismatch(
            f"{source} has its weights in {pickled[0]}, a pickle, which could run any code",
            remedy="Use the model's safetensors or GGUF files; most are published as such too.",
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's tensors, by its shard index if it has one.

    Raises:
        CheckpointMissing: there is none, or the index names one that is not there.
        CheckpointMismatch: the index is malformed, or names a file outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            named = sorted({os.fspath(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointMismatch(f"{index} is not a shard index: {error!r}") from None
        if outside := [name for name in named if Path(name).name != name]:
            raise CheckpointMismatch(f"{index} names a file outside the folder: {outside[0]}")
        absent = [name for name in named if not (folder / name).is_file()]
        if absent:
            raise CheckpointMissing(
                f"{folder} lacks {len(absent)} of {len(named)} shards: {absent}"
            )
        return [folder / name for name in named]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointMissing(f"{folder} holds no safetensors file")
    return files


def read_headers(files: list[Path]) -> list[Entry]:
    """Every tensor of the files.

    Raises:
        CheckpointMissing: a file is cut off or damaged.
        CheckpointMismatch: a tensor is in two files.
    """
    entries: dict[str, Entry] = {}
    for path in files:
        # As numpy's: torch maps a file so that the system wants as much memory free.
        with _opened(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 -- a safetensors handle is no mapping
                if name in entries:
                    raise CheckpointMismatch(f"{name} is in two files")
                piece = file.get_slice(name)
                shape = tuple(piece.get_shape())
                entries[name] = Entry(name, path, shape, str(piece.get_dtype()))
    return list(entries.values())


class Reader:
    """Numbers of tensors; every file is opened once, and stays open until `close`."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def tensor(self, entry: Entry) -> Tensor:
        """All of it, on the CPU; on one that maps files into memory nothing is copied.

        Raises:
            CheckpointMissing: the file changed or vanished since its header was read.
        """
        if entry.path not in self._files:
            self._files[entry.path] = self._stack.enter_context(_opened(entry.path))
        try:
            tensor: Tensor = self._files[entry.path].get_tensor(entry.name)
        except (SafetensorError, OSError) as error:
            raise _damaged(entry.path, error) from None
        return tensor


@contextmanager
def _opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None
    except RuntimeError as error:
        # torch's, where the system would not promise as much memory as the file has.
        if "mmap" not in str(error):
            raise
        raise NotEnoughMemory(
            f"{path} cannot be mapped into memory: {error}",
            remedy="Use a checkpoint in several files, or let the system promise more memory than "
            "it has (sysctl vm.overcommit_memory=1).",
        ) from None


def _damaged(path: Path, error: Exception) -> CheckpointMissing:
    return CheckpointMissing(f"{path} is cut off or damaged: {error}")
