"""A random model with a real vocabulary: every route of an infill, none of its sense."""

from dataclasses import replace

import tokenizers
import torch
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from infilld.engine.config import ModelConfig, SamplerConfig
from infilld.engine.infill import Infiller
from infilld.engine.model import DiffusionGemma
from infilld.engine.plan import FillMethod
from infilld.engine.prompt import BOS, EOS, FILLER, PAD, PREFIX_MARK, SUFFIX_MARK
from infilld.engine.tokenizer import Tokenizer

# Tensors this small gain nothing from a second thread, and lose to whatever else is running.
torch.set_num_threads(1)

CONTROLS = (PAD, EOS, BOS, SUFFIX_MARK, PREFIX_MARK, FILLER)


def byte_tokenizer(controls: tuple[str, ...] = CONTROLS) -> Tokenizer:
    """One token for each byte, after the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate((*controls, *alphabet))}
    bare = tokenizers.Tokenizer(BPE(vocab=vocab, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    bare.add_special_tokens(list(controls))
    return Tokenizer(bare, byte_level=True)


def tiny_config(vocab_tokens: int = 262, canvas_tokens: int = 128) -> ModelConfig:
    """Three layers, 16 wide."""
    return ModelConfig.from_dict(
        {
            "model_type": "diffusion_gemma",
            "canvas_length": canvas_tokens,
            "text_config": {
                "vocab_size": vocab_tokens,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "global_head_dim": 8,
                "sliding_window": 16,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 8,
                "max_position_embeddings": 512,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            },
        }
    )


def tiny_model(config: ModelConfig, seed: int = 0) -> DiffusionGemma:
    """Random weights that make the logits vary."""
    torch.manual_seed(seed)
    model = DiffusionGemma(config)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    with torch.no_grad():
        model.embed_tokens.weight.normal_(0, 1)
    return model.requires_grad_(False).eval()


def tiny_infiller(seed: int = 0, *, max_steps: int = 8) -> Infiller:
    """An infiller over random weights and single bytes."""
    tokenizer = byte_tokenizer()
    model = tiny_model(tiny_config(tokenizer.vocab_tokens), seed)
    # What random weights write breaks any syntax; held back, it could not be looked at.
    method = FillMethod(holds_back=False, trims=False)
    return Infiller(model, tokenizer, replace(SamplerConfig(), max_steps=max_steps), method)
