"""Pieces of weights, as files hold them, into whole tensors of the model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infilld.engine.checkpoints.files import Reader
from infilld.engine.checkpoints.plan import Piece
from infilld.engine.checkpoints.weights import part_of
from infilld.engine.errors import CheckpointMismatch
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.dequantize import dequantize

# What is turned into plain numbers, or compared, at a time.
BLOCK_NUMBERS = 1 << 24
# Every number of a type is exactly one of these too.
_WIDENINGS = {
    "F64": (torch.float64,),
    "F32": (torch.float32, torch.float64),
    "BF16": (torch.bfloat16, torch.float32, torch.float64),
    "F16": (torch.float16, torch.float32, torch.float64),
}
_E4M3_NAN = 0x7F


class Notes:
    """What is not exactly what the files say, gathered while reading."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = str(dtype).removeprefix("torch.")
        self._wide_enough = {name for name, wider in _WIDENINGS.items() if dtype in wider}
        self._rounded: dict[str, int] = {}
        self._widened: dict[str, int] = {}

    def plain(self, pieces: Sequence[Piece]) -> None:
        """Plain tensors are read."""
        for piece in pieces:
            if piece.entry.dtype not in self._wide_enough:
                stored = piece.entry.dtype
                self._rounded[stored] = self._rounded.get(stored, 0) + 1

    def widened(self, target: str, piece: Piece) -> None:
        """A weight in few bits is held as a plain tensor."""
        what = f"{part_of(target)} ({piece.storage})"
        self._widened[what] = self._widened.get(what, 0) + 1

    def lines(self) -> tuple[str, ...]:
        """All of it."""
        rounded = [
            f"{count} {stored} tensors are rounded to {self._dtype}"
            for stored, count in sorted(self._rounded.items())
        ]
        widened = [
            f"{count} weights of the {what} are held as {self._dtype}"
            for what, count in sorted(self._widened.items())
        ]
        return (*rounded, *widened)


def stack_plain(
    pieces: Sequence[Piece],
    shape: tuple[int, ...],
    reader: Reader,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """A plain tensor of this shape, cast to `dtype`; mapped from its file where nothing changes."""
    if len(pieces) == 1 and pieces[0].shape == shape:
        return reader.tensor(pieces[0].entry).to(device, dtype)
    whole = torch.empty(shape, dtype=dtype)
    for piece in pieces:
        piece.place.of(whole).copy_(reader.tensor(piece.entry))
    return whole.to(device)


def stack_quantized(
    pieces: Sequence[Piece], shape: tuple[int, ...], reader: Reader
) -> QuantizedWeight:
    """A weight in few bits, its pieces stacked, on the CPU."""
    scheme = pieces[0].scheme
    assert scheme is not None
    group = scheme.group or shape[-1]
    if len(pieces) == 1 and pieces[0].shape == shape:
        held = {name: part.contiguous() for name, part in _held(pieces[0], reader).items()}
        weight = QuantizedWeight(kind=scheme.kind, group=group, **held)
        _refuse_unusable(pieces, weight)
        return weight
    whole: dict[str, Tensor] = {}
    for name, (part_shape, dtype) in scheme.parts(pieces[0].shape, pieces[0].entries).items():
        # One factor for gate and one for up, until they are joined.
        full = (shape[0], 2) if name == "factor" else (*shape[:-1], part_shape[-1])
        whole[name] = torch.empty(full, dtype=dtype)
    for piece in pieces:
        for name, part in _held(piece, reader).items():
            if name == "factor":
                halves = {None: slice(None), "gate": slice(0, 1), "up": slice(1, 2)}
                rows = slice(None) if piece.place.index is None else piece.place.index
                whole[name][rows, halves[piece.place.half]] = part[..., None]
            else:
                piece.place.of(whole[name]).copy_(part)
    if "factor" in whole:
        whole["factor"] = _join_factors(whole["factor"], shape[-2])
    weight = QuantizedWeight(kind=scheme.kind, group=group, **whole)
    _refuse_unusable(pieces, weight)
    return weight


def _held(piece: Piece, reader: Reader) -> dict[str, Tensor]:
    assert piece.scheme is not None
    tensors = {role: reader.tensor(entry) for role, entry in piece.entries.items()}
    try:
        return piece.scheme.hold(piece.shape, tensors)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{piece.name}: {error}", remedy=error.remedy) from None


def _refuse_unusable(pieces: Sequence[Piece], weight: QuantizedWeight) -> None:
    if weight.kind == "nvfp4":
        # Without a sign these are in order, and the last is NaN.
        bad = weight.scales.view(torch.uint8) >= _E4M3_NAN
    else:
        bad = ~weight.scales.isfinite()
        if weight.biases is not None:
            bad |= ~weight.biases.isfinite()
    if bool(bad.any()):
        piece = next(piece for piece in pieces if piece.place.of(bad).any())
        raise CheckpointMismatch(
            f"{piece.name} has scales that are no numbers, or negative where they may not be",
            remedy="Download the checkpoint again, or use another one.",
        )


def _join_factors(factors: Tensor, rows: int) -> Tensor:
    """Factors [E, 2] of gate and up as one an expert [E]; one a row [E, 2F] where they differ."""
    if torch.equal(factors[:, 0], factors[:, 1]):
        return factors[:, 0].clone()
    return factors.repeat_interleave(rows // 2, dim=1)


def make_plain(weight: QuantizedWeight, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """A matrix in few bits as a plain one, a block of rows at a time."""
    rows, columns = weight.shape
    whole = torch.empty(rows, columns, device=device, dtype=dtype)
    step = max(1, BLOCK_NUMBERS // columns)
    for start in range(0, rows, step):
        parts = {
            name: part if name == "factor" else part[start : start + step]
            for name, part in weight.parts.items()
        }
        block = QuantizedWeight(kind=weight.kind, group=weight.group, **parts)
        whole[start : start + step] = dequantize(block, impl="reference")
    return whole
