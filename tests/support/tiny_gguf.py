"""Small random GGUF files, written by the `gguf` package with its own names and its own maths.

Names come from the package's table for Gemma 4, and from the converter of this architecture where
the released package does not know it yet. What is stored is what the package reads back.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.quants import dequantize, quantize

from infilld.engine.checkpoints.weights import expected_shapes
from infilld.engine.config import ModelConfig

Type = gguf.GGMLQuantizationType
Numbers = npt.NDArray[np.float32]
# Byte offsets of the float16 factors of blocks that the package reads but does not make.
_FACTORS = {
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}
_CONVERTED = {
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "layer_scalar": "layer_output_scale.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
    "self_conditioning.gate_proj.weight": "self_cond_gate.weight",
    "self_conditioning.up_proj.weight": "self_cond_up.weight",
    "self_conditioning.down_proj.weight": "self_cond_down.weight",
}
_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|tool_response>", "a", "<turn|>"]


def config_json(**changes: Any) -> dict[str, Any]:
    """A config.json of two layers, wide enough for blocks of 256."""
    text = {
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "num_experts": 3,
        "top_k_experts": 2,
        "max_position_embeddings": 512,
        "final_logit_softcapping": 30.0,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": 16,
        "eos_token_id": 1,
        "text_config": text | changes,
    }


@dataclass(frozen=True)
class Written:
    """A file, and what it stands for.

    Attributes:
        path: of the file; a file called tokenizer.json is beside it.
        config: what the metadata stands for.
        numbers: of every tensor by internal name, as the package reads them back.
        storage: type of every tensor, by internal name.
    """

    path: Path
    config: ModelConfig
    numbers: Mapping[str, Numbers]
    storage: Mapping[str, Type]


def file_name(internal: str, layers: int) -> str:
    """What the converter calls a tensor."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, layers)
    _, _, inside = internal.split(".", 2) if internal.startswith("layers.") else ("", "", internal)
    if inside in _CONVERTED:
        prefix = f"blk.{internal.split('.')[1]}." if internal != inside else ""
        return prefix + _CONVERTED[inside]
    name = table.get_name(f"model.{internal}", try_suffixes=(".weight",))
    assert name is not None, internal
    return name


def write_gguf(
    folder: Path,
    storage: Callable[[str, tuple[int, ...]], Type],
    *,
    config: Mapping[str, Any] | None = None,
    given_numbers: Mapping[str, Numbers] | None = None,
    seed: int = 0,
    apart: bool = False,
    metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    skip: Callable[[str], bool] = lambda name: False,
    architecture: str = "diffusion-gemma",
) -> Written:
    """Write `folder/model.gguf`.

    Args:
        folder: made if it is not there.
        storage: type of a tensor, given its internal name and shape.
        config: a config.json.
        given_numbers: of every tensor by internal name, instead of random ones.
        seed: of the numbers.
        apart: gate and up projections of the experts as two tensors.
        metadata: adds more of it. skip: names in the file to leave out.
        architecture: as the file tells it.
    """
    given = dict(config or config_json())
    shapes = expected_shapes(ModelConfig.from_dict(given))
    draw = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    _describe(writer, given)
    metadata(writer)
    layers = given["text_config"]["num_hidden_layers"]
    head_size = given["text_config"]["global_head_dim"]
    turning = head_size // 8
    still = head_size // 2 - turning
    writer.add_tensor("rope_freqs.weight", np.array([1] * turning + [1e30] * still, np.float32))
    numbers: dict[str, Numbers] = {}
    types: dict[str, Type] = {}

    def put(name: str, kind: Type, shape: tuple[int, ...], own: Numbers | None) -> Numbers:
        raw, read_back = _stored(kind, shape, draw, own)
        if not skip(name):
            writer.add_tensor(name, raw, raw_dtype=kind)
        return read_back

    for internal, shape in shapes.items():
        kind = types[internal] = storage(internal, shape)
        own = None if given_numbers is None else given_numbers[internal]
        if internal == "encoder_scalars":
            parts = [
                put(
                    f"blk.{layer}.enc_layer_output_scale.weight",
                    kind,
                    (1,),
                    None if own is None else own[layer : layer + 1],
                )
                for layer in range(layers)
            ]
            numbers[internal] = np.concatenate(parts)
        elif apart and internal.endswith("experts.gate_up_proj"):
            block, half = f"blk.{internal.split('.')[1]}", (shape[0], shape[1] // 2, shape[2])
            both = [
                put(f"{block}.ffn_{each}_exps.weight", kind, half, None) for each in ("gate", "up")
            ]
            numbers[internal] = np.concatenate(both, axis=1)
        else:
            numbers[internal] = put(file_name(internal, layers), kind, shape, own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "tokenizer.json").write_text(json.dumps({}))
    return Written(path, ModelConfig.from_dict(given), numbers, types)


def _describe(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    text = config["text_config"]
    sliding = [kind == "sliding_attention" for kind in text["layer_types"]]
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    heads = (text["num_global_key_value_heads"], text["num_key_value_heads"])
    writer.add_head_count_kv([heads[each] for each in sliding])
    turning = text.get("rope_parameters", {})
    full, window = (turning.get(f"{kind}_attention", {}) for kind in ("full", "sliding"))
    writer.add_rope_freq_base(full.get("rope_theta", 1e6))
    writer.add_float32("diffusion-gemma.rope.freq_base_swa", window.get("rope_theta", 1e4))
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_expert_count(text["num_experts"])
    writer.add_expert_used_count(text["top_k_experts"])
    writer.add_expert_feed_forward_length(text["moe_intermediate_size"])
    for key, size in (("", text["global_head_dim"]), ("_swa", text["head_dim"])):
        writer.add_uint32(f"diffusion-gemma.attention.key_length{key}", size)
        writer.add_uint32(f"diffusion-gemma.attention.value_length{key}", size)
        writer.add_uint32(f"diffusion-gemma.rope.dimension_count{key}", size)
    writer.add_final_logit_softcapping(text["final_logit_softcapping"])
    writer.add_sliding_window(text["sliding_window"])
    writer.add_array("diffusion-gemma.attention.sliding_window_pattern", sliding)
    writer.add_causal_attention(False)
    writer.add_uint32("diffusion.canvas_length", config["canvas_length"])
    writer.add_token_list(_TOKENS)
    writer.add_token_scores([0.0] * len(_TOKENS))
    writer.add_bos_token_id(text["bos_token_id"])
    writer.add_eos_token_id(text["eos_token_id"])
    writer.add_pad_token_id(text["pad_token_id"])


def _stored(
    kind: Type, shape: tuple[int, ...], draw: np.random.Generator, own: Numbers | None
) -> tuple[npt.NDArray[Any], Numbers]:
    """Numbers, random ones or given, as a file has them, and as the package reads them back."""
    if own is not None:
        raw = quantize(own, kind)
    elif kind in _FACTORS:
        blocks = gguf.quant_shape_to_byte_shape(shape, kind)
        _, size = gguf.GGML_QUANT_SIZES[kind]
        raw = draw.integers(0, 256, (int(np.prod(blocks)) // size, size), dtype=np.uint8)
        for start in _FACTORS[kind]:
            # Small ones too, whose products float16 holds with fewer bits.
            factor = draw.normal(0, 1, len(raw)) * 10.0 ** draw.uniform(-6, -2, len(raw))
            raw[:, start : start + 2] = factor.astype(np.float16)[:, None].view(np.uint8)
        raw = raw.reshape(blocks)
    else:
        raw = quantize(draw.normal(0, 0.05, shape).astype(np.float32), kind)
    return raw, dequantize(raw, kind).astype(np.float32)
