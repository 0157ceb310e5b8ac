"""A trained model as a DiffusionGemma checkpoint folder, whole enough for `transformers` too."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from infilld.engine.config import ModelConfig
from infilld.engine.model import DiffusionGemma

WEIGHTS = "model.safetensors"

# The public class always builds a vision tower. Without this smallest one in the file it would
# build its default, 16 layers of width 768, and warn. Nothing here ever runs.
_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 8,
}
_VISION_LAYER = "model.encoder.vision_tower.encoder.layers.0"
_CHANNELS = 3


def export_model(
    model: DiffusionGemma, folder: Path, generation: dict[str, Any] | None = None
) -> None:
    """Write config.json, generation_config.json and bf16 model.safetensors.

    Args:
        model: trained. folder: made if absent; other files in it stay.
        generation: fields of generation_config.json that differ from our defaults.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", config_json(model.config))
    _write(folder / "generation_config.json", generation_json(model.config) | (generation or {}))
    fresh = folder / f"{WEIGHTS}.new"
    save_file(checkpoint_tensors(model), fresh, metadata={"format": "pt"})
    fresh.replace(folder / WEIGHTS)


def checkpoint_tensors(model: DiffusionGemma) -> dict[str, Tensor]:
    """Tensors under the names of the public layout, bf16; vision included, the tied head not."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "encoder_scalars":
            for layer, scalar in enumerate(torch.split(tensor, 1)):
                tensors[f"model.encoder.language_model.layers.{layer}.layer_scalar"] = scalar
        else:
            tensors[f"model.decoder.{name}"] = tensor
    tensors |= _vision_tensors(model.config.width)
    return {
        name: tensor.detach().cpu().to(torch.bfloat16).contiguous()
        for name, tensor in sorted(tensors.items())
    }


def config_json(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a model, in the dialect of per-layer overrides."""
    full = {
        "head_dim": config.head_sizes["full"],
        "num_key_value_heads": config.key_heads["full"],
    }
    usual = {
        "head_dim": config.head_sizes["sliding"],
        "num_key_value_heads": config.key_heads["sliding"],
    }
    differing = {key: value for key, value in full.items() if value != usual[key]}
    overrides = {
        str(layer): differing
        for layer, kind in enumerate(config.layer_kinds)
        if kind == "full" and differing
    }
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": config.vocab_tokens,
        "hidden_size": config.width,
        "intermediate_size": config.dense_width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        **usual,
        "per_layer_config": overrides,
        "layer_types": [f"{kind}_attention" for kind in config.layer_kinds],
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": config.ropes["sliding"].theta,
            },
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": config.ropes["full"].theta,
                "partial_rotary_factor": config.ropes["full"].rotary_fraction,
            },
        },
        "sliding_window": config.sliding_window,
        "num_experts": config.experts,
        "top_k_experts": config.experts_per_token,
        "moe_intermediate_size": config.expert_width,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_eps,
        "final_logit_softcapping": config.softcap,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0],
        "pad_token_id": config.pad_id,
    }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "dtype": "bfloat16",
        "canvas_length": config.canvas_tokens,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": _VISION,
    }


def generation_json(config: ModelConfig) -> dict[str, Any]:
    """`generation_config.json`: eos and pad are read from here, never from config.json."""
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "pad_token_id": config.pad_id,
        "max_denoising_steps": 24,
        "max_new_tokens": config.canvas_tokens,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "t_max": 0.8,
        "t_min": 0.4,
        "stability_threshold": 1,
        "confidence_threshold": 0.005,
    }


def _vision_tensors(width: int) -> dict[str, Tensor]:
    size: int = _VISION["hidden_size"]
    patch: int = _VISION["patch_size"]
    places: int = _VISION["position_embedding_size"]
    tower = "model.encoder.vision_tower"
    square = [f"{_VISION_LAYER}.self_attn.{name}_proj.linear.weight" for name in "qkvo"]
    square += [f"{_VISION_LAYER}.mlp.{name}_proj.linear.weight" for name in ("gate", "up", "down")]
    norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"]
    vectors = [f"{_VISION_LAYER}.{name}_layernorm.weight" for name in norms]
    vectors += [f"{_VISION_LAYER}.self_attn.{name}_norm.weight" for name in "qk"]
    return {
        "model.encoder.embed_vision.embedding_projection.weight": torch.zeros(width, size),
        f"{tower}.patch_embedder.input_proj.weight": torch.zeros(size, _CHANNELS * patch * patch),
        f"{tower}.patch_embedder.position_embedding_table": torch.zeros(2, places, size),
        **{name: torch.zeros(size, size) for name in square},
        **{name: torch.ones(size) for name in vectors},
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    # The version tells `transformers` which dialect it is looking at.
    known = {"transformers_version": _WRITTEN_FOR}
    path.write_text(json.dumps(content | known, indent=2) + "\n", encoding="utf-8")


_WRITTEN_FOR = "5.23.0"
