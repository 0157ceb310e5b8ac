"""What is where: every tensor of the files is used once, skipped by rule, or refused by name.

Made from headers alone; reading numbers and summing up a checkpoint both follow it.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infilld.engine.checkpoints.files import FLOATS, Entry, read_headers, weight_files
from infilld.engine.checkpoints.formats import Format, format_of
from infilld.engine.checkpoints.places import (
    DECODER,
    HEAD,
    SCALARS,
    VISION,
    Place,
    find_place,
    missing_names,
)
from infilld.engine.checkpoints.quantizing import is_quantized
from infilld.engine.checkpoints.schemes import Scheme, Shape
from infilld.engine.checkpoints.weights import PLAIN, expected_shapes
from infilld.engine.config import ModelConfig, read_json
from infilld.engine.errors import CheckpointMismatch

# Codes are of these types; a weight of one of them is in few bits, whatever else is there.
_CODES = ("I8", "U8", "I32", "U32", "F8_E4M3", "F8_E5M2")
_SHOWN = 3


@dataclass(frozen=True)
class Piece:
    """A tensor of the model, or a part of one, as the files hold it.

    Attributes:
        name: of the weight in the files. place: where it belongs.
        shape: of the numbers it stands for.
        scheme: how they are stored; None: plainly.
        entries: its tensors, by the last part of their names.
    """

    name: str
    place: Place
    shape: Shape
    scheme: Scheme | None
    entries: Mapping[str, Entry]

    @property
    def entry(self) -> Entry:
        """The one tensor of a plain piece."""
        (entry,) = self.entries.values()
        return entry

    @property
    def storage(self) -> str:
        """What people call how it is stored."""
        return self.entry.dtype if self.scheme is None else self.scheme.storage

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def dtypes(self) -> tuple[torch.dtype, ...] | None:
        """Types its parts are held in; None: it is plain."""
        if self.scheme is None:
            return None
        return tuple(dtype for _, dtype in self.scheme.parts(self.shape, self.entries).values())

    @property
    def held_bytes(self) -> int | None:
        """Bytes it is held in; None: as a plain tensor."""
        if self.scheme is None or not is_quantized(self.place.target, self.shape):
            return None
        parts = self.scheme.parts(self.shape, self.entries)
        if self.place.half == "up":
            # Gate and up of an expert share one in the end.
            parts.pop("factor", None)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts.values())


@dataclass(frozen=True)
class Plan:
    """How a checkpoint is to be read.

    Attributes:
        config: shapes. files: in reading order.
        format: as in `Weights`.
        shapes: of the model's tensors, by internal name.
        pieces: of each of them; they fill it exactly.
        head: an output matrix of its own, which must equal the embedding.
        vision_tensors: how many are skipped.
        notes: what is not read, or not followed.
    """

    config: ModelConfig
    files: tuple[Path, ...]
    format: str
    shapes: Mapping[str, Shape]
    pieces: Mapping[str, tuple[Piece, ...]]
    head: Entry | None
    vision_tensors: int
    notes: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Is nothing in few bits?"""
        return all(piece.scheme is None for pieces in self.pieces.values() for piece in pieces)


def make_plan(folder: Path) -> Plan:
    """How to read a folder of safetensors files.

    Raises:
        CheckpointMissing: a file is absent or cut off.
        CheckpointMismatch: not a DiffusionGemma, a format that cannot be read, or tensors and
            configuration disagree.
    """
    raw = _announced(folder)
    config = ModelConfig.from_dict(raw)
    stored_as = format_of(raw)
    files = weight_files(folder)
    sorter = _Sorter(expected_shapes(config), stored_as)
    for entry in read_headers(files):
        sorter.take(entry)
    pieces = sorter.finish()
    kinds = sorted({p.scheme.kind for ps in pieces.values() for p in ps if p.scheme is not None})
    name = f"{stored_as.name} {', '.join(kinds)}" if stored_as is not None and kinds else PLAIN
    notes = [f"{count} {what}, are ignored" for what, count in sorted(sorter.ignored.items())]
    if stored_as is not None:
        notes = [*stored_as.notes, *notes]
    return Plan(
        config=config,
        files=tuple(files),
        format=name,
        shapes=sorter.shapes,
        pieces=pieces,
        head=sorter.head,
        vision_tensors=sorter.vision,
        notes=tuple(notes),
    )


def _announced(folder: Path) -> dict[str, Any]:
    """config.json, with what older ModelOpt says in a file of its own."""
    raw = read_json(folder, "config.json")
    if not raw.get("quantization_config") and (folder / "hf_quant_config.json").is_file():
        own = read_json(folder, "hf_quant_config.json")
        raw["quantization_config"] = {"quant_method": "modelopt", **own}
    return raw


class _Sorter:
    """Puts tensors in their places, one by one.

    Attributes:
        shapes: of the model's tensors. vision: tensors skipped. head: see `Plan`.
        ignored: tensors that are not read, by what they are.
    """

    def __init__(self, shapes: Mapping[str, Shape], stored_as: Format | None) -> None:
        self.shapes, self._format = shapes, stored_as
        self.vision = 0
        self.head: Entry | None = None
        self.ignored: Counter[str] = Counter()
        self._plain: list[Entry] = []
        # Tensors that may make up weights in few bits, by module and last part of the name.
        self._modules: dict[str, dict[str, Entry]] = {}

    def take(self, entry: Entry) -> None:
        """Look at one tensor."""
        if entry.name.startswith(VISION):
            self.vision += 1
            return
        if entry.name == HEAD:
            self.head = entry
            return
        module, _, role = entry.name.rpartition(".")
        if self._format is None or not module.startswith(DECODER):
            self._plain.append(entry)
        elif role in self._format.ignored:
            self.ignored[self._format.ignored[role]] += 1
        elif role in self._format.roles or role == "weight":
            self._modules.setdefault(module, {})[role] = entry
        else:
            self._plain.append(entry)

    def finish(self) -> dict[str, tuple[Piece, ...]]:
        """The pieces of every tensor of the model.

        Raises:
            CheckpointMismatch: one is missing, twice there, of another shape or type, or is no
                part of the model; or the pieces of one tensor are stored in different ways.
        """
        found: dict[str, list[Piece]] = {}
        filled: dict[str, frozenset[tuple[int, str]]] = {}
        for piece in self._pieces():
            target = piece.place.target
            slots = piece.place.slots(self.shapes[target])
            before = filled.get(target, frozenset())
            if slots & before:
                raise CheckpointMismatch(f"{piece.name} is in the files in another form too")
            filled[target] = before | slots
            found.setdefault(target, []).append(piece)
        self._refuse_missing(filled)
        for target, pieces in found.items():
            _refuse_mixture(target, pieces)
        return {target: tuple(found[target]) for target in self.shapes}

    def _pieces(self) -> list[Piece]:
        pieces = [self._plain_piece(entry) for entry in self._plain]
        for module, entries in self._modules.items():
            weight = entries.get("weight")
            if len(entries) == 1 and weight is not None and weight.dtype not in _CODES:
                pieces.append(self._plain_piece(weight))
            else:
                pieces.append(self._quantized_piece(module, entries))
        return pieces

    def _plain_piece(self, entry: Entry) -> Piece:
        place = find_place(entry.name, self.shapes)
        if place is None:
            raise _unexpected(entry.name)
        shape = place.shape(self.shapes[place.target])
        if entry.shape != shape:
            raise CheckpointMismatch(
                f"{entry.name} is {list(entry.shape)}, config.json makes it {list(shape)}"
            )
        if entry.dtype not in FLOATS:
            raise CheckpointMismatch(
                f"{entry.name} holds {entry.dtype}, expected floating point",
                remedy="Use config.json of the same checkpoint: it says how weights are stored.",
            )
        return Piece(entry.name, place, shape, None, {"": entry})

    def _quantized_piece(self, module: str, entries: Mapping[str, Entry]) -> Piece:
        assert self._format is not None
        place = find_place(f"{module}.weight", self.shapes)
        if place is None or len(self.shapes[place.target]) < 2:
            raise _unexpected(min(entries.items(), key=lambda item: item[0] == "weight")[1].name)
        shape = place.shape(self.shapes[place.target])
        scheme = self._format.scheme_of(module, entries)
        scheme.check(module, shape, entries)
        return Piece(module, place, shape, scheme, entries)

    def _refuse_missing(self, filled: Mapping[str, frozenset[tuple[int, str]]]) -> None:
        names: list[str] = []
        scalars: list[str] = []
        for target, shape in self.shapes.items():
            have = filled.get(target, frozenset())
            if have != Place(target).slots(shape):
                missing = missing_names(target, shape, have)
                (scalars if target == SCALARS else names).extend(missing)
        if names:
            raise CheckpointMismatch(f"{len(names)} tensors are missing: {_some(names)}")
        if scalars:
            # The reference would run on uninitialised memory here.
            raise CheckpointMismatch(
                f"{len(scalars)} encoder layer scalars are missing: {_some(scalars)}",
                remedy="Export the checkpoint with the encoder's layer_scalar tensors.",
            )


def _refuse_mixture(target: str, pieces: list[Piece]) -> None:
    first = pieces[0]
    for piece in pieces[1:]:
        if piece.scheme != first.scheme or piece.dtypes != first.dtypes:
            raise CheckpointMismatch(
                f"{DECODER}{target} is stored in two ways: {first.name} in {first.storage}, "
                f"{piece.name} in {piece.storage}"
            )


def _unexpected(name: str) -> CheckpointMismatch:
    return CheckpointMismatch(f"tensor {name} is not part of the model config.json describes")


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:_SHOWN])
