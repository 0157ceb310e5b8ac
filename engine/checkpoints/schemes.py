"""How a weight in few bits lies in a file, and what it is held as.

A scheme belongs to one weight [..., N, K]. It names the tensors that make it up by the last part
of their names, says of which types and shapes they must be, and turns their numbers into those of
a `QuantizedWeight` without changing what they stand for, but where its docstring says so.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from infilld.engine.checkpoints.files import Entry
from infilld.engine.errors import CheckpointMismatch
from infilld.kernels._weights import Kind

Shape = tuple[int, ...]
_SCALES = ("F16", "BF16", "F32")
_TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class Expected:
    """What one tensor of a weight must be.

    Attributes:
        dtypes: any of these. shapes: any of these.
        needed: False: it may be absent.
    """

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    needed: bool = True


@dataclass(frozen=True)
class Scheme(ABC):
    """See the module; equal schemes can be stacked into one weight.

    Attributes:
        kind: what it is held as.
        group: G, consecutive k that share a scale; None: a whole row.
    """

    kind: Kind
    group: int | None

    @property
    def storage(self) -> str:
        """What people call it."""
        return f"{self.kind}, " + (f"groups of {self.group}" if self.group else "a scale a row")

    @abstractmethod
    def expected(self, shape: Shape) -> dict[str, Expected]:
        """The tensors a weight of this shape is made of, by the last part of their names."""

    @abstractmethod
    def parts(
        self, shape: Shape, entries: Mapping[str, Entry]
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and type of what `hold` returns."""

    @abstractmethod
    def hold(self, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts of a `QuantizedWeight` from the numbers in the file; factors are [leading]."""

    def groups(self, shape: Shape) -> Shape:
        """Shape of the scales: [..., N, K / G]."""
        return (*shape[:-1], 1 if self.group is None else shape[-1] // self.group)

    def scale_shapes(self, shape: Shape) -> tuple[Shape, ...]:
        """Shapes that scales may have: without groups also one a row, or one for the weight."""
        groups = self.groups(shape)
        return (groups,) if self.group is not None else (groups, shape[:-1], (1,), ())

    def spread_scales(self, scales: Tensor, shape: Shape) -> Tensor:
        """Scales of any of those shapes as [..., N, K / G]."""
        groups = self.groups(shape)
        if scales.numel() == 1:
            return scales.reshape(()).expand(groups)
        return scales.reshape(groups)

    def check(self, name: str, shape: Shape, entries: Mapping[str, Entry]) -> None:
        """Refuse what is absent, too much, or of another type or shape.

        Args:
            name: of the weight, as messages call it.
            shape: [..., N, K].
            entries: by the last part of their names.

        Raises:
            CheckpointMismatch: naming the tensor.
        """
        if self.group is not None and shape[-1] % self.group:
            raise CheckpointMismatch(
                f"{name} has {shape[-1]} columns, which do not divide into {self.storage}"
            )
        expected = self.expected(shape)
        for role, needs in expected.items():
            entry = entries.get(role)
            if entry is None:
                if not needs.needed:
                    continue
                raise CheckpointMismatch(f"{name}.{role} is missing, its weight is {self.storage}")
            if entry.shape not in needs.shapes or entry.dtype not in needs.dtypes:
                raise CheckpointMismatch(
                    f"{entry}, expected {' or '.join(needs.dtypes)} {list(needs.shapes[0])} "
                    f"of a weight {list(shape)} in {self.storage}"
                )
        if extra := sorted(set(entries) - set(expected)):
            raise CheckpointMismatch(
                f"{entries[extra[0]].name} has no meaning for a weight in {self.storage}",
                remedy="Use a checkpoint without this refinement, or the unquantized one.",
            )


@dataclass(frozen=True)
class PackedIntegers(Scheme):
    """compressed-tensors, `pack-quantized`: unsigned codes of 4 or 8 bits in int32, low bits first.

    Its value is `scale * (code - zero)`; without zero points the zero is half the range. A zero
    point becomes a bias `-scale * zero`, and both are held as float32 to be exact.

    Source: compressed-tensors 0.20.0, compressors/pack_quantized.
    """

    symmetric: bool = True

    @property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.kind == "int4" else 8

    @property
    def storage(self) -> str:
        """See `Scheme`."""
        return super().storage + ("" if self.symmetric else ", zero points")

    def expected(self, shape: Shape) -> dict[str, Expected]:
        """See `Scheme`."""
        *leading, rows, columns = shape
        packed = -(-columns * self.bits // 32)
        groups = self.groups(shape)
        zeros = (*leading, -(-rows * self.bits // 32), groups[-1])
        wanted = {
            "weight_packed": Expected(("I32",), ((*leading, rows, packed),)),
            "weight_scale": Expected(_SCALES, self.scale_shapes(shape)),
            "weight_shape": Expected(("I64", "I32"), ((len(shape),),), needed=False),
        }
        if not self.symmetric:
            wanted["weight_zero_point"] = Expected(("I32",), (zeros,))
        return wanted

    def parts(
        self, shape: Shape, entries: Mapping[str, Entry]
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """See `Scheme`."""
        codes = (*shape[:-1], shape[-1] * self.bits // 8)
        groups = self.groups(shape)
        code_dtype = torch.uint8 if self.bits == 4 else torch.int8
        if self.symmetric:
            scale_dtype = _TORCH[entries["weight_scale"].dtype]
            return {"codes": (codes, code_dtype), "scales": (groups, scale_dtype)}
        held = {"scales": (groups, torch.float32), "biases": (groups, torch.float32)}
        return {"codes": (codes, code_dtype), **held}

    def hold(self, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Scheme`."""
        told = tensors.get("weight_shape")
        if told is not None and tuple(told.tolist()) != shape:
            raise CheckpointMismatch(f"weight_shape says {told.tolist()}, expected {list(shape)}")
        codes = _bytes(tensors["weight_packed"])[..., : shape[-1] * self.bits // 8]
        scales = self.spread_scales(tensors["weight_scale"], shape)
        if self.bits == 8:
            codes = _centred(codes)
        if self.symmetric:
            return {"codes": codes, "scales": scales}
        zeros = _bytes(tensors["weight_zero_point"].transpose(-1, -2))
        if self.bits == 4:
            zeros = torch.stack((zeros & 15, zeros >> 4), dim=-1).flatten(-2)
        # Codes of 8 bits lie around zero, and so do their zero points.
        centre = 0 if self.bits == 4 else 128
        wide = scales.float()
        biases = -wide * (zeros[..., : shape[-2]].transpose(-1, -2).float() - centre)
        return {"codes": codes, "scales": wide, "biases": biases}


@dataclass(frozen=True)
class Bytes(Scheme):
    """A byte a number, E4M3 or signed, and a scale a row, a group or for the whole weight.

    compressed-tensors `float-quantized`, `int-quantized`, `naive-quantized`, and ModelOpt's FP8.
    A zero point becomes a bias `-scale * zero` in float32, exact for scales of 16 bits.

    Source: compressed-tensors 0.20.0, compressors/naive_quantized.
    """

    symmetric: bool = True

    @property
    def storage(self) -> str:
        """See `Scheme`."""
        return super().storage + ("" if self.symmetric else ", zero points")

    def expected(self, shape: Shape) -> dict[str, Expected]:
        """See `Scheme`."""
        scales = self.scale_shapes(shape)
        wanted = {
            "weight": Expected(("F8_E4M3",) if self.kind == "fp8" else ("I8",), (shape,)),
            "weight_scale": Expected(_SCALES, scales),
        }
        if not self.symmetric:
            wanted["weight_zero_point"] = Expected(("I8",), scales)
        return wanted

    def parts(
        self, shape: Shape, entries: Mapping[str, Entry]
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """See `Scheme`."""
        codes = torch.float8_e4m3fn if self.kind == "fp8" else torch.int8
        groups = self.groups(shape)
        if self.symmetric:
            dtype = _TORCH[entries["weight_scale"].dtype]
            return {"codes": (shape, codes), "scales": (groups, dtype)}
        held = {"scales": (groups, torch.float32), "biases": (groups, torch.float32)}
        return {"codes": (shape, codes), **held}

    def hold(self, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Scheme`."""
        scales = self.spread_scales(tensors["weight_scale"], shape)
        if self.symmetric:
            return {"codes": tensors["weight"], "scales": scales}
        zeros = self.spread_scales(tensors["weight_zero_point"], shape)
        wide = scales.float()
        return {"codes": tensors["weight"], "scales": wide, "biases": -wide * zeros.float()}


@dataclass(frozen=True)
class Fours(Scheme):
    """E2M1 nibbles, the low one first, with E4M3 scales of 16 numbers (NVFP4).

    Attributes:
        names: of the tensors that hold codes, scales and the factor of the whole weight; the
            last may be absent ("").
        divides: the value is divided by that factor: its float32 reciprocal is held, which is
            off by at most half a unit in the last place. Else it multiplies, and is exact.
        packed: type of the codes in the file.
        scale: type of the scales in the file.

    Source: compressed-tensors 0.20.0, compressors/nvfp4; nvidia-modelopt 0.47.0,
    torch/quantization/qtensor/nvfp4_tensor.py; MLX 0.32.4, `mx.quantize(mode="nvfp4")`.
    """

    names: tuple[str, str, str] = ("weight_packed", "weight_scale", "weight_global_scale")
    divides: bool = True
    packed: str = "U8"
    scale: str = "F8_E4M3"

    def expected(self, shape: Shape) -> dict[str, Expected]:
        """See `Scheme`."""
        codes, scales, factor = self.names
        per_code = {"U8": 2, "U32": 8}[self.packed]
        wanted = {
            codes: Expected((self.packed,), ((*shape[:-1], shape[-1] // per_code),)),
            scales: Expected((self.scale,), (self.groups(shape),)),
        }
        if factor:
            leading = shape[:-2]
            stacked = (leading, (*leading, 1), (*leading, 1, 1)) if leading else ()
            wanted[factor] = Expected(("F32",), ((1,), (), *stacked))
        return wanted

    def parts(
        self, shape: Shape, entries: Mapping[str, Entry]
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """See `Scheme`."""
        held = {
            "codes": ((*shape[:-1], shape[-1] // 2), torch.uint8),
            "scales": (self.groups(shape), torch.float8_e4m3fn),
        }
        if self.names[2]:
            held["factor"] = (shape[:-2], torch.float32)
        return held

    def hold(self, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Scheme`."""
        codes, scales, factor = self.names
        held = {
            "codes": _bytes(tensors[codes]),
            "scales": tensors[scales].view(torch.float8_e4m3fn),
        }
        if factor:
            whole = tensors[factor]
            if not ((whole > 0) & (whole < torch.inf)).all():
                raise CheckpointMismatch(f"{factor} is {whole.tolist()}, expected above 0")
            whole = 1 / whole if self.divides else whole
            one = whole.reshape(()) if whole.numel() == 1 else whole.reshape(shape[:-2])
            held["factor"] = one.expand(shape[:-2])
        return held


@dataclass(frozen=True)
class Affine(Scheme):
    """MLX: codes of 2 to 8 bits, a stream of bits in uint32, each group scaled and shifted.

    Its value is `scale * code + bias`. Codes of 2 and 3 bits are held as 4, those of 5 to 8 as 8.
    Codes of 8 bits are moved down by 128 to be signed, and the bias up by 128 scales: both are
    held as float32 then, where that is exact.

    Source: MLX 0.32.4, `mx.quantize`.
    """

    bits: int = 4

    @property
    def storage(self) -> str:
        """See `Scheme`."""
        return f"affine {self.bits} bit, groups of {self.group}"

    def expected(self, shape: Shape) -> dict[str, Expected]:
        """See `Scheme`."""
        groups = self.groups(shape)
        return {
            "weight": Expected(("U32",), ((*shape[:-1], shape[-1] * self.bits // 32),)),
            "scales": Expected(_SCALES, (groups,)),
            "biases": Expected(_SCALES, (groups,)),
        }

    def parts(
        self, shape: Shape, entries: Mapping[str, Entry]
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """See `Scheme`."""
        groups = self.groups(shape)
        dtype = torch.float32 if self.bits == 8 else _TORCH[entries["scales"].dtype]
        code = torch.int8 if self.kind == "int8" else torch.uint8
        columns = shape[-1] if self.kind == "int8" else shape[-1] // 2
        return {
            "codes": ((*shape[:-1], columns), code),
            "scales": (groups, dtype),
            "biases": (groups, dtype),
        }

    def check(self, name: str, shape: Shape, entries: Mapping[str, Entry]) -> None:
        """See `Scheme`."""
        super().check(name, shape, entries)
        if entries["scales"].dtype != entries["biases"].dtype:
            raise CheckpointMismatch(f"{entries['biases']}, its scales {entries['scales'].dtype}")

    def hold(self, shape: Shape, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Scheme`."""
        stream, scales, biases = _bytes(tensors["weight"]), tensors["scales"], tensors["biases"]
        if self.bits == 8:
            wide = scales.float()
            shifted = biases.float() + 128 * wide
            return {"codes": _centred(stream), "scales": wide, "biases": shifted}
        if self.bits == 4:
            codes = stream
        else:
            codes = _spread(stream, self.bits)
            if self.kind == "int4":
                codes = codes[..., ::2] | codes[..., 1::2] << 4
            else:
                codes = codes.view(torch.int8)
        return {"codes": codes, "scales": scales, "biases": biases}


def _bytes(words: Tensor) -> Tensor:
    """Little-endian words [..., n] as their bytes [..., n * size]."""
    return words.contiguous().view(torch.uint8)


def _centred(codes: Tensor) -> Tensor:
    """Unsigned bytes less 128, as signed ones."""
    return (codes ^ 128).view(torch.int8)


def _spread(stream: Tensor, bits: int) -> Tensor:
    """Codes [..., n] uint8 of a stream of bits [..., n * bits / 8] uint8, lowest bits first.

    Eight codes start and end with a byte, whatever their width.
    """
    pieces = stream.view(*stream.shape[:-1], -1, bits).to(torch.int64)
    places = torch.arange(bits, device=stream.device) * 8
    words = (pieces << places).sum(-1)
    shifts = torch.arange(8, device=stream.device) * bits
    codes = (words[..., None] >> shifts) & ((1 << bits) - 1)
    spread: Tensor = codes.to(torch.uint8).flatten(-2)
    return spread
