"""The same shapes in `transformers`, bf16: passes, and canvases of forced passes."""

from functools import partial
from typing import Any

import torch
from notes import Notes
from plan import Machine, Plan
from timing import finish, steady, walls
from torch import Tensor

from infilld.engine.config import ModelConfig


def measure(notes: Notes, plan: Plan, machine: Machine) -> None:
    """Build it, then two canvases behind one prefix."""
    judge = _Judge(notes, plan, machine)
    for length in plan.canvases[:2]:
        notes.run(f"pass over {length}", partial(judge.time_pass, length))
    notes.run("forced passes", judge.forced, needs_s=10.0)


class _Judge:
    """A model of `transformers` with weights of no meaning, and a prefix in its cache."""

    def __init__(self, notes: Notes, plan: Plan, machine: Machine) -> None:
        from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

        self._notes, self._plan, self._device = notes, plan, machine.device
        dtype = torch.bfloat16
        config = _hugging_face(plan.config)
        with torch.device(machine.device):
            model = DiffusionGemmaForBlockDiffusion._from_config(config, dtype=dtype)
        self._model = model.eval()
        _randomise(self._model)
        finish(machine.device)
        text = config.get_text_config(decoder=True)
        self._cache = DynamicCache(config=text)
        self._prefix = self._ids(plan.home)
        with torch.no_grad():
            model.model.encoder(input_ids=self._prefix, past_key_values=self._cache)
        notes.row(
            "built",
            parameters=sum(each.numel() for each in model.parameters()),
            attention=str(model.config._attn_implementation),
            experts=str(getattr(model.config, "_experts_implementation", None)),
            bytes=torch.cuda.memory_allocated() if machine.device.type == "cuda" else None,
        )

    def _ids(self, tokens: int) -> Tensor:
        draw = torch.Generator().manual_seed(tokens)
        # Not the first few, which are controls, nor an image's, which are among the last.
        high = min(self._plan.config.vocab_tokens, 250_000)
        return torch.randint(8, high, (1, tokens), generator=draw).to(self._device)

    def time_pass(self, length: int) -> None:
        """A pass that is told the logits of the one before."""
        with torch.no_grad():
            canvas = self._ids(length)
            belief = self._pass(canvas, None).to(torch.bfloat16)
            times = steady(
                lambda: self._pass(canvas, belief), self._device, repeats=self._plan.repeats
            )
        self._notes.row(
            "passes",
            rows=1,
            canvas=length,
            prefix=self._plan.home,
            ms=times.ms,
            p20_ms=times.p20_ms,
            p80_ms=times.p80_ms,
        )

    def _pass(self, canvas: Tensor, belief: Tensor | None) -> Tensor:
        out = self._model(
            decoder_input_ids=canvas,
            self_conditioning_logits=belief,
            past_key_values=self._cache,
        )
        logits: Tensor = out.logits
        return logits

    def forced(self) -> None:
        """By its own `generate`: two canvases less one, so that reading the prompt is not in it."""
        length = self._plan.config.canvas_tokens
        times = {
            count: walls(
                partial(self._generate, count),
                self._device,
                repeats=2,
                warm_up=1 if count == 1 else 0,
            ).ms
            for count in (1, 2)
        }
        one = times[2] - times[1]
        self._notes.row(
            "forced passes",
            canvas=length,
            prefix=self._plan.home,
            passes=self._plan.forced_passes,
            one_canvas_ms=times[1],
            two_canvases_ms=times[2],
            ms_a_canvas=round(one, 2),
            tokens_per_s=round(1e3 * length / one, 1) if one > 0 else None,
        )

    def _generate(self, canvases: int) -> None:
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            DiffusionGemmaGenerationConfig,
            EntropyBoundSamplerConfig,
        )

        options: dict[str, Any] = {
            "sampler_config": EntropyBoundSamplerConfig(entropy_bound=0.1),
            "max_denoising_steps": self._plan.forced_passes,
            "max_new_tokens": canvases * self._plan.config.canvas_tokens,
            "t_min": 0.4,
            "t_max": 0.8,
            "stability_threshold": 1,
            # No entropy is below this: it never stops early. 0 is refused.
            "confidence_threshold": 1e-30,
            "bos_token_id": 2,
            "pad_token_id": 0,
        }
        config = DiffusionGemmaGenerationConfig(**options)
        self._model.generate(self._prefix, generation_config=config)


def _hugging_face(config: ModelConfig) -> Any:
    """The configuration object of these shapes, with an image part that is next to nothing."""
    from transformers import DiffusionGemmaConfig

    kinds = [f"{kind}_attention" for kind in config.layer_kinds]
    return DiffusionGemmaConfig(
        text_config={
            "vocab_size": config.vocab_tokens,
            "hidden_size": config.width,
            "intermediate_size": config.dense_width,
            "moe_intermediate_size": config.expert_width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.key_heads["sliding"],
            "head_dim": config.head_sizes["sliding"],
            "global_head_dim": config.head_sizes["full"],
            "num_global_key_value_heads": config.key_heads["full"],
            "layer_types": kinds,
            "sliding_window": config.sliding_window,
            "num_experts": config.experts,
            "top_k_experts": config.experts_per_token,
            "max_position_embeddings": config.max_positions,
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
        canvas_length=config.canvas_tokens,
    )


@torch.no_grad()
def _randomise(model: Any) -> None:
    """Numbers of a size that keeps every activation finite."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.normal_(0, 1.0 if "router" in name else weight.shape[-1] ** -0.5)
        else:
            weight.fill_(1.0)
