"""Weights that we quantized ourselves, on disk: a checkpoint folder of our own format.

    config.json             the source's, with `quantization_config.quant_method` "infilld"
    infilld.json            which file has how many bytes, and how each weight is held
    weights-00001.safetensors, ...
    tokenizer.json, ...     the source's other small files, where a folder is to be used by itself

Tensors have the engine's own names; a weight in few bits is `NAME.codes`, `NAME.scales` and what
else it has. Numbers are held as they are read, but plain ones, which are cast when they are read.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from infilld.engine.checkpoints.weights import (
    CheckpointSummary,
    StoredPart,
    Weights,
    expected_shapes,
    part_of,
    tabulate,
)
from infilld.engine.config import ModelConfig, read_json
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing
from infilld.kernels._weights import CODES_PER_BYTE, Kind, QuantizedWeight

METHOD = "infilld"
MANIFEST = "infilld.json"
_VERSION = 1
_PARTS = ("codes", "scales", "biases", "factor")
# A file is written when it has so many bytes: what a writer holds of its result, at most.
_FILE_BYTES = 500_000_000
# What reading a value of the wrong kind raises.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError)
_REMEDY = "Quantize the checkpoint again: infilld models quantize DIR OUT"


class Writer:
    """Writes such a folder, a tensor at a time; nothing counts until `finish`.

    Args:
        folder: that is there, and empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._files: dict[str, int] = {}
        self._weights: dict[str, dict[str, object]] = {}

    def add(self, name: str, held: Tensor | QuantizedWeight) -> None:
        """Keep a tensor under its internal name.

        Raises:
            OSError: a file cannot be written.
        """
        if isinstance(held, QuantizedWeight):
            self._weights[name] = {"kind": held.kind, "group": held.group}
            for part, tensor in held.parts.items():
                self._waiting[f"{name}.{part}"] = tensor.cpu().contiguous()
        else:
            # A view of a mapped file would keep all of it in memory until it is written.
            self._waiting[name] = held.to("cpu", copy=True).contiguous()
        if sum(tensor.nbytes for tensor in self._waiting.values()) >= _FILE_BYTES:
            self._write()

    def finish(
        self,
        config: Mapping[str, Any],
        how: Mapping[str, object],
        *,
        notes: tuple[str, ...] = (),
        source: Path | None = None,
    ) -> None:
        """Write what is left, and what makes a checkpoint of it.

        Args:
            config: the source's config.json. how: kind and group that were asked for.
            notes: on the weights, for whoever reads them.
            source: folder it is made from, for `made_from`.

        Raises:
            OSError: a file cannot be written.
        """
        if self._waiting:
            self._write()
        own = {"quant_method": METHOD, "version": _VERSION, **how}
        _put(self._folder / "config.json", dict(config) | {"quantization_config": own})
        told = {
            "version": _VERSION,
            "files": self._files,
            "weights": self._weights,
            "notes": list(notes),
            "source": None if source is None else str(source.resolve()),
        }
        # Last: a folder without it is none.
        _put(self._folder / MANIFEST, told)

    def _write(self) -> None:
        path = self._folder / f"weights-{len(self._files) + 1:05d}.safetensors"
        save_file(self._waiting, path, metadata={"format": "pt"})
        # It is written for its owner alone; other files of a checkpoint are not.
        path.chmod(0o644)
        _flush(path)
        self._files[path.name] = path.stat().st_size
        self._waiting = {}


def is_kept(folder: Path) -> bool:
    """Whether a folder says that it is of this format; whether it is whole is another question."""
    try:
        announced = read_json(folder, "config.json").get("quantization_config")
    except (CheckpointMissing, CheckpointMismatch):
        return False
    return isinstance(announced, dict) and announced.get("quant_method") == METHOD


def made_from(folder: Path) -> Path | None:
    """The folder that a folder of this format says it was made from."""
    try:
        source = read_json(folder, MANIFEST).get("source")
    except (CheckpointMissing, CheckpointMismatch):
        return None
    return Path(source) if isinstance(source, str) else None


def read_kept(
    folder: Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Weights:
    """The weights of such a folder.

    Args:
        folder: of the checkpoint.
        device: where they go. On a CPU weights in few bits stay in the mapped files.
        dtype: of plain weights.

    Raises:
        CheckpointMissing: a file is absent, cut off or of another size than it was written with.
        CheckpointMismatch: another version, or tensors and configuration disagree.
    """
    kept = _Kept(folder)
    tensors: dict[str, Tensor | QuantizedWeight] = {}
    with kept.opened() as files:
        for name in kept.shapes:
            parts = {
                part: files[kept.places[key]].get_tensor(key)
                for part, key in kept.keys(name).items()
            }
            if name not in kept.held:
                tensors[name] = parts[""].to(device, dtype)
                continue
            kind, group = kept.held[name]
            try:
                weight = QuantizedWeight(kind=kind, group=group, **parts)
            except (TypeError, ValueError) as error:
                raise kept.broken(f"{name}: {error}") from None
            tensors[name] = weight.to(device)
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != kept.shapes[name]:
                raise kept.broken(f"{name} is {list(tensor.shape)}")
    return Weights(config=kept.config, tensors=tensors, format=kept.format, notes=kept.notes)


def inspect_kept(folder: Path) -> CheckpointSummary:
    """What such a folder holds, from headers alone.

    Raises:
        CheckpointMissing, CheckpointMismatch: as `read_kept`.
    """
    kept = _Kept(folder)
    lines: list[StoredPart] = []
    dtypes: set[str] = set()
    with kept.opened() as files:
        for name, shape in kept.shapes.items():
            stored_bytes = 0
            for part, key in kept.keys(name).items():
                piece = files[kept.places[key]].get_slice(key)
                dtype = str(piece.get_dtype())
                dtypes.add(dtype)
                stored_bytes += math.prod(piece.get_shape()) * _bytes_of(dtype)
                if part in ("", "codes"):
                    found = list(piece.get_shape())
                    if part:
                        found[-1] *= CODES_PER_BYTE[kept.held[name][0]]
                    if tuple(found) != shape:
                        raise kept.broken(f"{name} is {found}")
            held = kept.held.get(name)
            lines.append(
                StoredPart(
                    part=part_of(name),
                    storage=dtype if held is None else f"{held[0]}, groups of {held[1]}",
                    kind=None if held is None else held[0],
                    parameters=math.prod(shape),
                    stored_bytes=stored_bytes,
                    held_bytes=None if held is None else stored_bytes,
                )
            )
    return CheckpointSummary(
        config=kept.config,
        files=tuple(folder / name for name in kept.files),
        parameters=sum(line.parameters for line in lines),
        text_bytes=sum(line.stored_bytes for line in lines),
        vision_tensors=0,
        dtypes=tuple(sorted(dtypes)),
        format=kept.format,
        parts=tabulate(lines),
        notes=kept.notes,
    )


def copy_beside(source: Path, folder: Path) -> None:
    """Copy tokenizer, templates and whatever else is small and no weight; ours are not touched.

    Raises:
        OSError: a file cannot be read or written.
    """
    skipped = {"config.json", "hf_quant_config.json", MANIFEST}
    for path in sorted(source.iterdir()):
        is_wanted = path.suffix in (".json", ".jinja", ".model", ".txt", ".md") or (
            path.name.startswith(("LICENSE", "NOTICE"))
        )
        if path.name in skipped or path.name.endswith(".index.json") or not is_wanted:
            continue
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


class _Kept:
    """A folder whose files are there, and are those that its manifest names.

    Attributes:
        config: shapes. format: as in `Weights`. notes: as in `Weights`.
        shapes: of the model's tensors, by internal name.
        files: names. held: kind and group of each weight in few bits.
        places: file of each stored tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        told = read_json(folder, MANIFEST)
        raw = read_json(folder, "config.json")
        self.config = ModelConfig.from_dict(raw)
        self.shapes = expected_shapes(self.config)
        try:
            if told["version"] != _VERSION:
                raise CheckpointMismatch(
                    f"{folder} is of version {told['version']} of our format, expected {_VERSION}",
                    remedy=_REMEDY,
                )
            self.files: dict[str, int] = dict(told["files"])
            self.held: dict[str, tuple[Kind, int]] = {
                name: (_kind(each["kind"]), int(each["group"]))
                for name, each in told["weights"].items()
            }
            self.notes = tuple(str(note) for note in told["notes"])
            self.format = f"{METHOD} {raw['quantization_config']['kind']}"
        except _MALFORMED as error:
            raise self.broken(f"{MANIFEST} is malformed: {error!r}") from None
        for name, size in self.files.items():
            path = folder / name
            if Path(name).name != name or not path.is_file() or path.stat().st_size != size:
                raise self.broken(f"{name} is absent or not the {size} bytes that were written")
        self.places: dict[str, str] = {}
        with self.opened() as files:
            for name, file in files.items():
                self.places |= dict.fromkeys(file.keys(), name)
        for name in self.shapes:
            if not self.keys(name):
                raise self.broken(f"{name} is missing")
        if extra := set(self.held) - set(self.shapes):
            raise self.broken(f"{min(extra)} is not part of the model")

    def keys(self, name: str) -> dict[str, str]:
        """What is stored of a tensor: "" for a plain one, or the names of its parts."""
        if name not in self.held:
            return {"": name} if name in self.places else {}
        found = {part: f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in self.places}
        return found if {"codes", "scales"} <= found.keys() else {}

    @contextmanager
    def opened(self) -> Iterator[dict[str, Any]]:
        """The files, open."""
        try:
            # Closed when they are forgotten, which a tensor that is mapped from them puts off.
            yield {name: safe_open(self._folder / name, framework="pt") for name in self.files}
        except (SafetensorError, OSError) as error:
            raise self.broken(str(error)) from None

    def broken(self, why: str) -> CheckpointMissing:
        """What to raise about this folder."""
        return CheckpointMissing(f"{self._folder} is damaged: {why}", remedy=_REMEDY)


def _kind(value: object) -> Kind:
    for kind in get_args(Kind):
        if kind == value:
            return kind  # type: ignore[no-any-return]
    raise ValueError(f"{value!r} is no kind of weight")


def _bytes_of(dtype: str) -> int:
    return {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)


def _put(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    """Have it on the disk before whatever comes after says that it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
