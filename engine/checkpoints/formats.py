"""Which formats of weights in few bits can be read, and how a configuration announces them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from infilld.engine.checkpoints.files import Entry
from infilld.engine.checkpoints.schemes import Affine, Bytes, Fours, PackedIntegers, Scheme
from infilld.engine.errors import CheckpointMismatch
from infilld.kernels._weights import NVFP4_GROUP, Kind

SUPPORTED = (
    "compressed-tensors (int4, int8, fp8, nvfp4), ModelOpt (nvfp4, fp8), MLX affine, GGUF, "
    "and unquantized tensors"
)
_REMEDY = f"Use a checkpoint in one of these formats: {SUPPORTED}."
# What reading a value of the wrong kind raises.
_MALFORMED = (AttributeError, KeyError, TypeError, ValueError, re.error)
_ACTIVATIONS = "scales of activations, which are not quantized here"
_CACHE = "scales of keys and values"

# (name of the module, its tensors by the last part of their names) -> how they lie in the file
SchemeOf = Callable[[str, Mapping[str, Entry]], Scheme]


@dataclass(frozen=True)
class Format:
    """How the weights of one checkpoint may lie in its files.

    Attributes:
        name: of the format.
        roles: last parts of names of tensors that make up weights in few bits.
        ignored: last parts of names of tensors that are not read, and what they are.
        scheme_of: the scheme of one weight.
        notes: on the checkpoint as a whole.
    """

    name: str
    roles: frozenset[str]
    scheme_of: SchemeOf
    ignored: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def format_of(config: Mapping[str, Any]) -> Format | None:
    """The format a config.json announces; None: its tensors are plain.

    Raises:
        CheckpointMismatch: a format, or a variant of one, that cannot be read, or a malformed
            announcement.
    """
    try:
        return _format_of(config)
    except _MALFORMED as error:
        raise CheckpointMismatch(f"config.json: malformed quantization: {error!r}") from None


def _format_of(config: Mapping[str, Any]) -> Format | None:
    announced = config.get("quantization_config") or config.get("quantization")
    if not announced:
        return None
    method = announced.get("quant_method")
    if method == "compressed-tensors":
        return _compressed_tensors(announced)
    if method == "modelopt":
        return _modelopt(announced)
    if method in (None, "mlx") and "bits" in announced and "group_size" in announced:
        return _mlx(announced)
    raise CheckpointMismatch(
        f"config.json: a quantized checkpoint by the method {method!r}, which cannot be read",
        remedy=_REMEDY,
    )


@dataclass(frozen=True)
class _Group:
    """One entry of `config_groups`: which modules, and how."""

    targets: tuple[str, ...]
    scheme: Scheme

    def fits(self, module: str) -> int:
        """How closely a module is named: 2 by its name, 1 by its class, 0 not at all."""
        best = 0
        for target in self.targets:
            if target.startswith("re:"):
                best = max(best, 2 * bool(re.match(target[3:], module)))
            elif target == module or module.endswith(f".{target}"):
                best = 2
            elif target == "Linear":
                best = max(best, 1)
        return best


def _compressed_tensors(announced: Mapping[str, Any]) -> Format:
    if announced.get("transform_config"):
        raise _refused("compressed-tensors with rotated weights (transform_config)")
    sparsity = (announced.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _refused(f"compressed-tensors with sparse weights ({sparsity})")
    groups, notes = [], []
    for entry in announced["config_groups"].values():
        if entry.get("weights") is None:
            continue
        packing = entry.get("format") or announced.get("format", "dense")
        groups.append(_Group(tuple(entry["targets"]), _compressed(entry["weights"], packing)))
        if entry.get("input_activations"):
            notes.append("activations are not quantized, though the checkpoint asks for it")
    if announced.get("kv_cache_scheme"):
        notes.append("keys and values are not quantized, though the checkpoint asks for it")

    def scheme_of(module: str, entries: Mapping[str, Entry]) -> Scheme:
        best = max(groups, key=lambda group: group.fits(module), default=None)
        if best is None or not best.fits(module):
            raise CheckpointMismatch(
                f"{module} is quantized, but no group of config.json's quantization names it"
            )
        return best.scheme

    return Format(
        name="compressed-tensors",
        roles=frozenset(
            {
                "weight_packed",
                "weight_scale",
                "weight_shape",
                "weight_zero_point",
                "weight_global_scale",
                "weight_g_idx",
            }
        ),
        scheme_of=scheme_of,
        ignored={
            "input_global_scale": _ACTIVATIONS,
            "input_scale": _ACTIVATIONS,
            "input_zero_point": _ACTIVATIONS,
            "k_scale": _CACHE,
            "v_scale": _CACHE,
        },
        notes=tuple(dict.fromkeys(notes)),
    )


def _compressed(weights: Mapping[str, Any], packing: str) -> Scheme:
    bits, kind, strategy = weights["num_bits"], weights["type"], weights.get("strategy")
    symmetric = bool(weights.get("symmetric", True))
    group = weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if group is None else "group"
    described = f"compressed-tensors {packing}, {bits} bit {kind}, strategy {strategy}"
    whole = strategy in ("channel", "tensor")
    grouped = strategy == "group" and isinstance(group, int) and group > 0
    size = group if grouped else None
    if packing == "pack-quantized" and kind == "int" and bits in (4, 8) and (whole or grouped):
        held: Kind = "int4" if bits == 4 else "int8"
        return PackedIntegers(held, size, symmetric)
    plain = ("int-quantized", "float-quantized", "naive-quantized")
    if packing in plain and bits == 8 and kind == "int" and (whole or grouped):
        return Bytes("int8", size, symmetric)
    if packing in plain and bits == 8 and kind == "float" and symmetric and whole:
        return Bytes("fp8", None)
    if packing == "nvfp4-pack-quantized" and group == NVFP4_GROUP and symmetric:
        return Fours("nvfp4", NVFP4_GROUP)
    raise _refused(described + ("" if symmetric else ", with zero points"))


def _modelopt(announced: Mapping[str, Any]) -> Format:
    # config.json may hold what hf_quant_config.json does, one level deeper.
    inner = announced.get("quantization") or announced
    algorithm = str(inner.get("quant_algo") or "").upper()
    scheme: Scheme
    if algorithm in ("NVFP4", "W4A16_NVFP4"):
        if inner.get("group_size", NVFP4_GROUP) != NVFP4_GROUP:
            raise _refused(f"ModelOpt {algorithm} in groups of {inner['group_size']}")
        names = ("weight", "weight_scale", "weight_scale_2")
        scheme = Fours("nvfp4", NVFP4_GROUP, names=names, divides=False)
    elif algorithm == "FP8":
        scheme = Bytes("fp8", None)
    else:
        raise _refused(f"ModelOpt {inner.get('quant_algo')!r}")
    notes = []
    if algorithm != "W4A16_NVFP4":
        notes.append("activations are not quantized, though the checkpoint asks for it")
    if inner.get("kv_cache_quant_algo") or inner.get("kv_cache_scheme"):
        notes.append("keys and values are not quantized, though the checkpoint asks for it")
    return Format(
        name="ModelOpt",
        roles=frozenset({"weight_scale", "weight_scale_2", "pre_quant_scale"}),
        scheme_of=lambda module, entries: scheme,
        ignored={"input_scale": _ACTIVATIONS, "k_scale": _CACHE, "v_scale": _CACHE},
        notes=tuple(notes),
    )


def _mlx(announced: Mapping[str, Any]) -> Format:
    schemes: dict[str, Scheme] = {
        name: _mlx_scheme({"mode": announced.get("mode", "affine")} | values)
        for name, values in announced.items()
        if isinstance(values, dict)
    }
    default = _mlx_scheme(announced)

    def scheme_of(module: str, entries: Mapping[str, Entry]) -> Scheme:
        return schemes.get(module, default)

    return Format(
        name="MLX",
        roles=frozenset({"scales", "biases"}),
        scheme_of=scheme_of,
    )


def _mlx_scheme(announced: Mapping[str, Any]) -> Scheme:
    mode, bits, group = (
        announced.get("mode", "affine"),
        announced["bits"],
        announced["group_size"],
    )
    if mode == "affine" and bits in (2, 3, 4, 5, 6, 8) and isinstance(group, int) and group > 0:
        return Affine("int4" if bits <= 4 else "int8", group, bits=bits)
    if mode == "nvfp4" and bits == 4 and group == NVFP4_GROUP:
        names = ("weight", "scales", "")
        return Fours("nvfp4", NVFP4_GROUP, names=names, packed="U32", scale="U8")
    raise _refused(f"MLX {mode}, {bits} bit in groups of {group}")


def _refused(what: str) -> CheckpointMismatch:
    return CheckpointMismatch(f"config.json: {what} cannot be read", remedy=_REMEDY)
