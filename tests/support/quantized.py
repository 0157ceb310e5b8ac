"""A small random model, written as the quantized checkpoints that people download.

Where the format's own library is there it quantizes and packs; ModelOpt's layout is written here.
Every width is another, so that nothing fits by chance; all are multiples of 64.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from infilld.engine.checkpoints.weights import CheckpointSummary, expected_shapes
from infilld.engine.config import ModelConfig

EXPERTS = 3
CONFIG: dict[str, Any] = {
    "model_type": "diffusion_gemma",
    "canvas_length": 16,
    "text_config": {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 192,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "max_position_embeddings": 512,
    },
}
MODEL = ModelConfig.from_dict(CONFIG)
SHAPES = expected_shapes(MODEL)

# Which modules of a file are in few bits.
EXPERTS_ONLY = ("experts",)
EXPERTS_ATTENTION = ("experts", "self_attn")
LINEAR = ("experts", "self_attn", "mlp")


def plain_tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random numbers under the names of a Hugging Face checkpoint, with one vision tensor."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {"model.encoder.vision_tower.x.weight": torch.ones(4)}
    for name, shape in SHAPES.items():
        numbers = torch.randn(shape, generator=draw)
        if name == "encoder_scalars":
            for layer, scalar in enumerate(numbers):
                file_name = f"model.encoder.language_model.layers.{layer}.layer_scalar"
                tensors[file_name] = scalar[None].to(dtype)
        else:
            tensors[f"model.decoder.{name}"] = (numbers * shape[-1] ** -0.5).to(dtype)
    return tensors


def split_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with experts one by one, as quantizers for `Linear` modules write them."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            split[name] = tensor
            continue
        block, _, which = name.rpartition(".")
        for expert, matrix in enumerate(tensor):
            if which == "down_proj":
                split[f"{block}.{expert}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                split[f"{block}.{expert}.gate_proj.weight"] = gate
                split[f"{block}.{expert}.up_proj.weight"] = up
    return split


def joined(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By internal name what `split_experts` took apart; float32."""
    whole: dict[str, Tensor] = {}
    for target, shape in SHAPES.items():
        if target == "encoder_scalars":
            name = "model.encoder.language_model.layers.{}.layer_scalar"
            whole[target] = torch.cat([values[name.format(i)].float() for i in range(shape[0])])
        elif target.endswith("experts.down_proj"):
            block = f"model.decoder.{target.rpartition('.')[0]}"
            whole[target] = torch.stack(
                [values[f"{block}.{e}.down_proj.weight"].float() for e in range(shape[0])]
            )
        elif target.endswith("experts.gate_up_proj"):
            block = f"model.decoder.{target.rpartition('.')[0]}"
            halves = [
                [values[f"{block}.{e}.{half}_proj.weight"].float() for half in ("gate", "up")]
                for e in range(shape[0])
            ]
            whole[target] = torch.stack([torch.cat(pair) for pair in halves])
        else:
            whole[target] = values[f"model.decoder.{target}"].float()
    return whole


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], **extra: object) -> Path:
    """A folder with these tensors, and a config.json with these fields besides."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | extra))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def linear_weights(tensors: Mapping[str, Tensor], blocks: tuple[str, ...]) -> Iterator[str]:
    """Modules of these blocks of the layers that hold a matrix, in a file with split experts."""
    for name in tensors:
        parts = name.split(".")
        if len(parts) > 4 and parts[4] in blocks and name.endswith("_proj.weight"):
            yield name.removesuffix(".weight")


def replaced(
    tensors: Mapping[str, Tensor],
    blocks: tuple[str, ...],
    quantize: Callable[[str, Tensor], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Tensors of a file in which matrices are replaced by what `quantize(module, matrix)` makes."""
    written = dict(tensors)
    for module in linear_weights(tensors, blocks):
        matrix = written.pop(f"{module}.weight")
        for role, part in quantize(module, matrix).items():
            written[f"{module}.{role}"] = part
    return written


def compressed_scheme(format: str, **weights: object) -> Any:
    """A scheme of compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(**weights), format=format
    )


def compressed_config(scheme: Any, **extra: object) -> dict[str, Any]:
    """The `quantization_config` that goes with it."""
    group = scheme.model_dump(mode="json", exclude_none=True)
    return {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **extra,
    }


def compress(scheme: Any, matrix: Tensor, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """What compressed-tensors stores of one matrix."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    args = scheme.weights
    wide = matrix.float()
    state = {"weight": wide}
    if args.group_size is None:
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
        if args.strategy == "tensor":
            low, high = low.amin()[None], high.amax()[None]
    else:
        groups = wide.unflatten(-1, (-1, args.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
    if scheme.format == "nvfp4-pack-quantized":
        largest = float(wide.abs().max())
        state["weight_global_scale"] = torch.tensor([6.0 * 448.0 / largest])
        scale, zero = calculate_qparams(low, high, args, global_scale=state["weight_global_scale"])
    else:
        scale, zero = calculate_qparams(low, high, args)
        scale = scale.to(scale_dtype)
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    stored: dict[str, Tensor] = compressor.compress(state, scheme)
    return stored


def decompress(scheme: Any, stored: Mapping[str, Tensor]) -> Tensor:
    """The matrix compressed-tensors makes of what it stored, scales widened to float32 first."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    if scheme.format == "nvfp4-pack-quantized":
        packed = stored["weight_packed"]
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2)
        return dequantize(
            x_q=codes.float(),
            scale=stored["weight_scale"].float(),
            args=scheme.weights,
            global_scale=stored["weight_global_scale"],
            dtype=torch.float32,
        )
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    wide = dict(stored) | {"weight_scale": stored["weight_scale"].float()}
    matrix: Tensor = compressor.decompress(wide, scheme)["weight"]
    return matrix


def write_compressed(
    folder: Path,
    scheme: Any,
    blocks: tuple[str, ...] = LINEAR,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    plain_dtype: torch.dtype = torch.bfloat16,
    **config: object,
) -> dict[str, Tensor]:
    """A compressed-tensors folder; returns the truth by internal name, float32."""
    plain = split_experts(plain_tensors(plain_dtype))
    truth = dict(plain)

    def quantize(module: str, matrix: Tensor) -> dict[str, Tensor]:
        stored = compress(scheme, matrix, scale_dtype)
        truth[f"{module}.weight"] = decompress(scheme, stored)
        return stored

    written = replaced(plain, blocks, quantize)
    write_checkpoint(folder, written, quantization_config=compressed_config(scheme, **config))
    return joined(truth)


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def to_nvfp4(matrix: Tensor, factor: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K / 2] uint8, scales [N, K / 16] E4M3 and the factor [] they are multiplied by."""
    wide = matrix.float()
    whole = torch.tensor(float(wide.abs().max()) / (6 * 448) if factor is None else factor)
    groups = wide.unflatten(-1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6 / whole).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    steps = groups / (scales.float() * whole)[..., None]
    nibbles = (steps.flatten(-2)[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4, scales, whole


def from_nvfp4(codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    """The float32 matrix such codes stand for."""
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return E2M1[nibbles.long()] * scales.float().repeat_interleave(16, -1) * factor


MODELOPT: dict[str, Any] = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"group_size": 16}}},
    "ignore": ["lm_head"],
    "producer": {"name": "modelopt", "version": "0.45.0"},
}


def write_modelopt(
    folder: Path, factor_of: Callable[[str], float | None] = lambda module: None
) -> dict[str, Tensor]:
    """A ModelOpt NVFP4 folder; returns the truth by internal name, float32.

    `factor_of(module)` says a module's own factor; gate and up of an expert share one by default.
    """
    plain = split_experts(plain_tensors())
    truth = dict(plain)

    def quantize(module: str, matrix: Tensor) -> dict[str, Tensor]:
        factor = factor_of(module)
        if factor is None and not module.endswith("down_proj"):
            pair = [f"{module.rpartition('.')[0]}.{half}_proj.weight" for half in ("gate", "up")]
            factor = max(float(plain[name].abs().max()) for name in pair) / (6 * 448)
        codes, scales, whole = to_nvfp4(matrix, factor)
        truth[f"{module}.weight"] = from_nvfp4(codes, scales, whole)
        return {
            "weight": codes,
            "weight_scale": scales,
            "weight_scale_2": whole,
            "input_scale": torch.tensor(0.01),
        }

    write_checkpoint(folder, replaced(plain, EXPERTS_ONLY, quantize), quantization_config=MODELOPT)
    return joined(truth)


def mlx_bits(module: str) -> int:
    """What mlx-vlm's predicate for this model gives a module."""
    parts = module.split(".")
    eight = module.endswith("embed_tokens") or (len(parts) > 4 and parts[4] != "experts")
    return 8 if eight else 4


def write_mlx(
    folder: Path,
    *,
    group: int = 32,
    bits_of: Callable[[str], int] = mlx_bits,
    dtype: torch.dtype = torch.bfloat16,
    **announced: object,
) -> dict[str, Tensor]:
    """A folder as mlx-vlm writes it; returns the truth by internal name, float32."""
    written, truth, overrides = {}, {}, {}
    for name, tensor in plain_tensors(dtype).items():
        short = name.removeprefix("model.decoder.")
        if "proj" not in name and "embed_tokens" not in name:
            written[name] = tensor
            truth[short] = tensor.float()
            continue
        module = name.removesuffix(".weight")
        bits = bits_of(module)
        mode = str(announced.get("mode", "affine"))
        parts = to_mlx(tensor, group, bits, mode)
        written |= {f"{module}.{role}": part for role, part in parts.items()}
        truth[short] = from_mlx(parts, group, bits, mode)
        if bits != 4:
            overrides[module] = {"group_size": group, "bits": bits}
    scalars = [f"model.encoder.language_model.layers.{i}.layer_scalar" for i in range(2)]
    truth["encoder_scalars"] = torch.cat([truth[name] for name in scalars])
    quantization = {"group_size": group, "bits": 4, "mode": "affine"} | announced | overrides
    write_checkpoint(folder, written, quantization=quantization, quantization_config=quantization)
    return {target: truth[target] for target in SHAPES}


def to_mlx(tensor: Tensor, group: int, bits: int, mode: str = "affine") -> dict[str, Tensor]:
    """What MLX stores of a tensor [..., K]."""
    import mlx.core as mx
    import numpy as np

    numbers = mx.array(tensor.float().numpy())
    numbers = numbers.astype(mx.float16 if tensor.dtype == torch.float16 else mx.bfloat16)
    parts = mx.quantize(numbers, group_size=group, bits=bits, mode=mode)
    stored = {"weight": torch.from_numpy(np.array(parts[0]))}
    for role, part in zip(("scales", "biases"), parts[1:], strict=False):
        if part.dtype == mx.uint8:
            stored[role] = torch.from_numpy(np.array(part))
        else:
            stored[role] = torch.from_numpy(np.array(part.astype(mx.float32))).to(tensor.dtype)
    return stored


def from_mlx(parts: Mapping[str, Tensor], group: int, bits: int, mode: str = "affine") -> Tensor:
    """What MLX makes of that in float32."""
    import mlx.core as mx
    import numpy as np

    words = mx.array(parts["weight"].numpy())
    if mode == "affine":
        scales, biases = (mx.array(parts[role].float().numpy()) for role in ("scales", "biases"))
        whole = mx.dequantize(words, scales, biases, group_size=group, bits=bits)
    else:
        scales = mx.array(parts["scales"].numpy())
        whole = mx.dequantize(
            words, scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32
        )
    return torch.from_numpy(np.array(whole.astype(mx.float32)))


def loaded_bytes(summary: CheckpointSummary, dtype: torch.dtype) -> int:
    """Bytes of the weights that a summary promises once loaded, plain tensors in `dtype`."""
    return sum(
        part.parameters * dtype.itemsize if part.held_bytes is None else part.held_bytes
        for part in summary.parts
    )
