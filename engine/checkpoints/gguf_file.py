"""The container of a GGUF file: metadata, and where each tensor lies. Nothing of a model.

Source: the GGUF specification, ggml/docs/gguf.md, versions 2 and 3.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infilld.engine.errors import CheckpointMismatch, CheckpointMissing

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# Code of a type, and how numpy writes it; what is neither string nor array.
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
# More than any file has; a damaged count must not be looped over.
_MOST_ENTRIES, _MOST_DIMENSIONS = 1_000_000, 4
# Name, numbers in a block, bytes of a block. Those that no reader needs have no block.
_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136),
    30: ("BF16", 1, 2),
}
# Named in a refusal only.
_OTHER_TYPES = {
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
READABLE = tuple(name for name, _, _ in _TYPES.values())


@dataclass(frozen=True)
class Strings:
    """An array of strings that is left in the file: a vocabulary has hundreds of thousands.

    Attributes:
        count: how many. start: offset of the first one's length.
    """

    count: int
    start: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: as in the file.
        shape: outermost dimension first, as torch has it; the file has it the other way round.
        storage: name of the type, "Q4_K".
        block_numbers, block_bytes: of one block; blocks run along the last dimension.
        start: offset in the file.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    block_numbers: int
    block_bytes: int
    start: int

    @property
    def blocks(self) -> int:
        """How many."""
        return math.prod(self.shape) // self.block_numbers

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.blocks * self.block_bytes


class GgufFile:
    """Metadata and tensors of a file, which is mapped and not read.

    Attributes:
        path: of the file.
        metadata: scalars as Python's, arrays of numbers as numpy's, arrays of strings as `Strings`.
        tensors: by name, in the file's order.

    Raises:
        CheckpointMissing: no such file, or it is cut off.
        CheckpointMismatch: not a GGUF of version 2 or 3, or a tensor's type is not read here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Only for reading: for a private mapping the system would want as much memory free.
            self._bytes: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise CheckpointMissing(f"{path} cannot be read: {error}") from None
        cursor = _Cursor(self._bytes, path)
        tensors, entries = self._counts(cursor)
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number("<u4"))
        listed = [cursor.tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise CheckpointMismatch(f"{path}: general.alignment is {alignment!r}")
        begin = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, StoredTensor] = {}
        for name, shape, code, offset in listed:
            if name in self.tensors:
                raise CheckpointMismatch(f"{path}: {name} is in it twice")
            self.tensors[name] = self._place(name, shape, code, begin + offset)

    def blocks(self, tensor: StoredTensor, first: int, last: int) -> npt.NDArray[np.uint8]:
        """Bytes [last - first, block_bytes] of the blocks [first, last), copied."""
        start = tensor.start + first * tensor.block_bytes
        flat = self._bytes[start : start + (last - first) * tensor.block_bytes]
        return np.array(flat).reshape(last - first, tensor.block_bytes)

    def places(self, strings: Strings, wanted: frozenset[str]) -> dict[str, int]:
        """Index of each wanted text in an array of strings, where it is there."""
        encoded = {text.encode(): text for text in wanted}
        longest = max(map(len, encoded), default=0)
        found: dict[str, int] = {}
        for index, (start, end) in enumerate(self._spans(strings)):
            if end - start <= longest:
                text = encoded.get(self._bytes[start:end].tobytes())
                if text is not None:
                    found.setdefault(text, index)
        return found

    def texts(self, strings: Strings, wanted: set[int]) -> dict[int, str]:
        """The strings of an array with the wanted indices, where they are there."""
        return {
            index: self._bytes[start:end].tobytes().decode(errors="replace")
            for index, (start, end) in enumerate(self._spans(strings))
            if index in wanted
        }

    def _spans(self, strings: Strings) -> Iterator[tuple[int, int]]:
        """Where each string of an array lies, [start, end)."""
        at, read, view = strings.start, struct.Struct("<Q").unpack_from, self._bytes.data
        for _ in range(strings.count):
            end = at + 8 + read(view, at)[0]
            yield at + 8, end
            at = end

    def _counts(self, cursor: "_Cursor") -> tuple[int, int]:
        if len(self._bytes) < 4 or cursor.raw(4) != _MAGIC:
            raise CheckpointMismatch(f"{self.path} is not a GGUF file")
        version = cursor.number("<u4")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            told = "big-endian" if swapped in _VERSIONS else f"version {version}"
            raise CheckpointMismatch(f"{self.path} is a {told} GGUF, expected version 2 or 3")
        tensors, entries = cursor.number("<u8"), cursor.number("<u8")
        if max(tensors, entries) > _MOST_ENTRIES:
            raise CheckpointMismatch(f"{self.path} counts {tensors} tensors and {entries} entries")
        return tensors, entries

    def _place(self, name: str, shape: tuple[int, ...], code: int, start: int) -> StoredTensor:
        if code not in _TYPES:
            told = _OTHER_TYPES.get(code, f"type {code}")
            raise CheckpointMismatch(
                f"{self.path}: {name} is stored as {told}, which is not read here",
                remedy=f"Use a file of {', '.join(READABLE)}, for example Q4_K_M or Q8_0.",
            )
        storage, numbers, size = _TYPES[code]
        if not shape or min(shape) < 1 or shape[-1] % numbers:
            raise CheckpointMismatch(
                f"{self.path}: {name} {list(shape)} does not divide into {storage} blocks"
            )
        tensor = StoredTensor(name, shape, storage, numbers, size, start)
        if tensor.start + tensor.nbytes > len(self._bytes):
            raise CheckpointMissing(f"{self.path} is cut off: {name} ends beyond it")
        return tensor


class _Cursor:
    """Reads a file's header from front to back."""

    def __init__(self, data: npt.NDArray[np.uint8], path: Path, at: int = 0) -> None:
        self._data, self._path, self.at = data, path, at
        # Slicing a memory map makes an array each time; of a buffer it is several times as fast.
        self._view: memoryview = data.data

    def raw(self, count: int) -> bytes:
        end = self.at + count
        if count < 0 or end > len(self._view):
            raise CheckpointMissing(f"{self._path} is cut off in its header")
        taken = bytes(self._view[self.at : end])
        self.at = end
        return taken

    def number(self, kind: str) -> Any:
        dtype = np.dtype(kind)
        return np.frombuffer(self.raw(dtype.itemsize), dtype)[0].item()

    def length(self, item_bytes: int) -> int:
        """A count of items that must still fit into the file."""
        (count,) = struct.unpack("<Q", self.raw(8))
        if count * item_bytes > len(self._view) - self.at:
            raise CheckpointMissing(f"{self._path} is cut off in its header")
        return int(count)

    def string(self) -> str:
        return self.raw(self.length(1)).decode(errors="replace")

    def value(self, code: int) -> Any:
        if code == _STRING:
            return self.string()
        if code == _ARRAY:
            return self._array()
        if code not in _SCALARS:
            raise CheckpointMismatch(f"{self._path}: metadata of unknown type {code}")
        return self.number(_SCALARS[code])

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.number("<u4")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise CheckpointMismatch(f"{self._path}: {name} has {dimensions} dimensions")
        shape = tuple(self.number("<u8") for _ in range(dimensions))
        return name, shape[::-1], self.number("<u4"), self.number("<u8")

    def _array(self) -> Any:
        code = self.number("<u4")
        if code == _STRING:
            count = self.length(8)
            strings = Strings(count, self.at)
            # Half a million of them: as little as can be for each.
            at, read, view = self.at, struct.Struct("<Q").unpack_from, self._view
            try:
                for _ in range(count):
                    at += 8 + read(view, at)[0]
            except (struct.error, OverflowError):
                at = len(view) + 1
            self.at = at
            self.raw(0)
            return strings
        if code not in _SCALARS:
            raise CheckpointMismatch(f"{self._path}: an array of type {code} in the metadata")
        dtype = np.dtype(_SCALARS[code])
        return np.frombuffer(self.raw(self.length(dtype.itemsize) * dtype.itemsize), dtype)


def iterate(total: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges [first, last) of `step` and a rest that make up [0, total)."""
    for first in range(0, total, step):
        yield first, min(first + step, total)
