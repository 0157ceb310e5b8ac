"""Small random checkpoints in the Hugging Face layout, written by `transformers` itself.

Nothing in them is 1 or equal where the checkpoint format lets it differ: norms, scales, the
encoder's and the decoder's layer scalars. A fault in any of them shows.

Two tempers. A *wild* one has large activations and a self-conditioning loop that amplifies every
rounding error 6-10 times a pass: good for one pass, hopeless for a whole run. A *tame* one has
calm residual branches and little self-conditioning: it stops early, ends texts with an eos, and
two correct implementations give the same tokens.
"""

import copy
import functools
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infilld.engine.checkpoints.loading import load_model
from infilld.engine.model import DiffusionGemma

# Tensors this small gain nothing from a second thread, and lose to whatever else is running.
torch.set_num_threads(1)

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to make.

    Attributes:
        layers: kinds of layer, in order.
        sliding_key_heads, full_key_heads: key heads of the two kinds.
        embedding_std: larger means larger logits.
        tame: see the module.
        shard: several files instead of one.
        experts, experts_per_token: of the mixture.
        canvas_tokens, vocab_tokens, window: L, V, W.
        seed: of every number.
    """

    layers: tuple[str, ...] = (SLIDING, SLIDING, FULL)
    sliding_key_heads: int = 1
    full_key_heads: int = 1
    embedding_std: float = 1.0
    tame: bool = False
    shard: bool = False
    experts: int = 4
    experts_per_token: int = 2
    canvas_tokens: int = 16
    vocab_tokens: int = 128
    window: int = 8
    seed: int = 0


TAME = Spec(tame=True)
WILD = Spec()
WIDE_HEADS = Spec(sliding_key_heads=2, full_key_heads=1, embedding_std=0.5, seed=1)
ALL_TWO = Spec(sliding_key_heads=2, full_key_heads=2, embedding_std=0.2, shard=True, seed=2)
DEEP = Spec(
    layers=(SLIDING, FULL, SLIDING, SLIDING, FULL, FULL),
    sliding_key_heads=2,
    full_key_heads=1,
    embedding_std=0.5,
    seed=3,
)
# More experts than the engine computes side by side: the routed path.
ROUTED = Spec(experts=12, experts_per_token=3, embedding_std=0.5, seed=4)
CHECKPOINTS = {
    "wild": WILD,
    "tame": TAME,
    "key-heads-2-1": WIDE_HEADS,
    "key-heads-2-2-sharded": ALL_TWO,
    "deep": DEEP,
    "routed": ROUTED,
}

EOS_IDS = (1, 5)
GENERATION = {
    "bos_token_id": 2,
    "eos_token_id": list(EOS_IDS),
    "pad_token_id": 0,
    "max_denoising_steps": 24,
    "max_new_tokens": 64,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}


def make_config(spec: Spec) -> Any:
    """The configuration object of `transformers`."""
    from transformers import DiffusionGemmaConfig

    return DiffusionGemmaConfig(
        text_config={
            "vocab_size": spec.vocab_tokens,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": 4,
            "num_key_value_heads": spec.sliding_key_heads,
            "head_dim": 8,
            "global_head_dim": 16,
            "num_global_key_value_heads": spec.full_key_heads,
            "layer_types": list(spec.layers),
            "sliding_window": spec.window,
            "num_experts": spec.experts,
            "top_k_experts": spec.experts_per_token,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        vision_config={
            "model_type": "gemma4_vision",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 4,
            "position_embedding_size": 8,
        },
        canvas_length=spec.canvas_tokens,
    )


@functools.cache
def checkpoint(spec: Spec) -> Path:
    """Folder with the checkpoint; made once a process. Copy it before changing it."""
    from transformers import DiffusionGemmaForBlockDiffusion
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    folder = Path(_scratch().name) / f"checkpoint-{len(list(Path(_scratch().name).iterdir()))}"
    torch.manual_seed(spec.seed)
    model = DiffusionGemmaForBlockDiffusion(make_config(spec))
    _randomise(model, spec)
    model.generation_config = DiffusionGemmaGenerationConfig(
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1), **GENERATION
    )
    model.save_pretrained(folder, max_shard_size="30KB" if spec.shard else "5GB")
    return folder


@functools.cache
def reference(spec: Spec, attention: str = "sdpa", experts: str = "grouped_mm") -> Any:
    """The checkpoint as `transformers` reads it."""
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        checkpoint(spec), attn_implementation=attention, experts_implementation=experts
    )
    return model.eval()


@functools.cache
def ours(spec: Spec, dtype: torch.dtype = torch.float32) -> DiffusionGemma:
    """The checkpoint as the engine reads it. Do not change it: `changeable` gives a copy."""
    return load_model(checkpoint(spec), dtype=dtype)


@functools.cache
def exact_reference(spec: Spec) -> Any:
    """The checkpoint in float64, as far as `transformers` goes.

    It keeps float32 islands (norms, softmaxes, the soft cap), and so does the engine; they round
    equal values to equal bits, so that two correct float64 models decide alike for a whole run.
    """
    from transformers import DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        checkpoint(spec),
        dtype=torch.float64,
        attn_implementation="sdpa",
        experts_implementation="eager",
    )
    return model.eval()


def changeable(spec: Spec) -> DiffusionGemma:
    """A copy of `ours` to plant faults in."""
    return copy.deepcopy(ours(spec))


def random_tokens(spec: Spec, count: int, seed: int) -> Tensor:
    """Token ids [count] int64 without controls."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(8, spec.vocab_tokens, (count,), generator=draw)


def edit_config(folder: Path, change: Any) -> None:
    """Rewrite config.json with what `change(config)` did to it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="infilld-tiny-")


@torch.no_grad()
def _randomise(model: Any, spec: Spec) -> None:
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if "vision" in name or "inv_freq" in name or "embed_scale" in name:
            continue
        if name.endswith("layer_scalar"):
            tensor.uniform_(0.5, 1.5)
        elif "embed_tokens" in name:
            tensor.normal_(0, spec.embedding_std)
        elif tensor.dim() > 1:
            tensor.normal_(0, tensor.shape[-1] ** -0.5)
        else:
            tensor.normal_(1, 0.3)
        if not spec.tame:
            continue
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            tensor *= 0.3
        elif name.endswith("self_conditioning.down_proj.weight"):
            tensor *= 0.1
        elif name.endswith(".norm.weight") and ".layers." not in name:
            tensor *= 2
