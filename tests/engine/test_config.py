import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infilld.engine.config import ModelConfig, SamplerConfig
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing, ModelError

SLIDING, FULL = "sliding_attention", "full_attention"
Change = Callable[[dict[str, Any]], None]


def make(**text: Any) -> dict[str, Any]:
    """A config.json of three layers."""
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": 16,
        "text_config": {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "num_experts": 4,
            "top_k_experts": 2,
            "max_position_embeddings": 512,
            "layer_types": [SLIDING, SLIDING, FULL],
        }
        | text,
    }


def theirs(config: dict[str, Any]) -> Any:
    from transformers import DiffusionGemmaConfig

    return DiffusionGemmaConfig(
        text_config=dict(config["text_config"]), canvas_length=config["canvas_length"]
    ).text_config


# Every way to say, or not to say, how full layers differ.
DIALECTS: dict[str, dict[str, Any]] = {
    "neither": {},
    "global-head-dim": {"global_head_dim": 16},
    "global-key-heads": {"num_global_key_value_heads": 1},
    "global-both": {"global_head_dim": 16, "num_global_key_value_heads": 1},
    "per-layer-head-dim": {"per_layer_config": {"2": {"head_dim": 16}}},
    "per-layer-key-heads": {"per_layer_config": {"2": {"num_key_value_heads": 1}}},
    "per-layer-both": {"per_layer_config": {"2": {"head_dim": 16, "num_key_value_heads": 1}}},
    "per-layer-nothing": {"per_layer_config": {}},
    "both-dialects-agree": {
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "per_layer_config": {"2": {"head_dim": 16, "num_key_value_heads": 1}},
    },
    "last-layer-forced": {"layer_types": [FULL, SLIDING, SLIDING], "global_head_dim": 16},
    "default-layers": {"num_hidden_layers": 14, "layer_types": None, "global_head_dim": 16},
    "unequal-heads-ungated": {
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": False,
    },
    "vision-attention": {"use_bidirectional_attention": "vision"},
}


@pytest.mark.parametrize("name", DIALECTS)
def test_shapes_are_the_ones_transformers_reads(name: str) -> None:
    config = make(**DIALECTS[name])
    ours, reference = ModelConfig.from_dict(config), theirs(config)
    names = [{"sliding": SLIDING, "full": FULL}[kind] for kind in ours.layer_kinds]
    assert names == reference.layer_types
    for layer, kind in enumerate(ours.layer_kinds):
        layer_config = reference.per_layer_config[layer]
        assert ours.head_sizes[kind] == layer_config.head_dim
        assert ours.key_heads[kind] == layer_config.num_key_value_heads


@pytest.mark.parametrize("name", DIALECTS)
def test_what_transformers_writes_reads_the_same(name: str, tmp_path: Path) -> None:
    from transformers import DiffusionGemmaConfig

    config = make(**DIALECTS[name])
    written = DiffusionGemmaConfig(
        text_config=dict(config["text_config"]), canvas_length=config["canvas_length"]
    )
    written.save_pretrained(tmp_path)
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(config)


def test_the_26b_models_own_dialect() -> None:
    # As the public header audits give it; only what decides shapes.
    config = ModelConfig.from_dict(
        {
            "model_type": "diffusion_gemma",
            "canvas_length": 256,
            "eos_token_id": [1, 106, 50],
            "text_config": {
                "vocab_size": 262_144,
                "hidden_size": 2816,
                "intermediate_size": 2112,
                "num_hidden_layers": 30,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 256,
                "global_head_dim": 512,
                "num_global_key_value_heads": 2,
                "sliding_window": 1024,
                "num_experts": 128,
                "top_k_experts": 8,
                "moe_intermediate_size": 704,
                "max_position_embeddings": 262_144,
            },
        }
    )
    full = [i for i, kind in enumerate(config.layer_kinds) if kind == "full"]
    assert full == [5, 11, 17, 23, 29]
    assert (config.key_heads["sliding"], config.head_sizes["sliding"]) == (8, 256)
    assert (config.key_heads["full"], config.head_sizes["full"]) == (2, 512)
    assert config.eos_ids == (1, 106, 50)
    assert config.ropes["full"].rotary_fraction == 0.25
    assert (config.ropes["sliding"].theta, config.ropes["full"].theta) == (1e4, 1e6)


def test_what_a_writer_leaves_out_has_the_reference_defaults() -> None:
    from transformers import DiffusionGemmaTextConfig

    bare = DiffusionGemmaTextConfig(num_experts=4, top_k_experts=2, moe_intermediate_size=8)
    config = ModelConfig.from_dict(
        {
            "model_type": "diffusion_gemma",
            "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8},
        }
    )
    assert config.vocab_tokens == bare.vocab_size
    assert config.width == bare.hidden_size
    assert config.dense_width == bare.intermediate_size
    assert config.layers == bare.num_hidden_layers
    assert config.heads == bare.num_attention_heads
    assert config.sliding_window == bare.sliding_window
    assert config.max_positions == bare.max_position_embeddings
    assert config.rms_eps == bare.rms_norm_eps
    assert config.softcap == bare.final_logit_softcapping
    assert (config.pad_id, config.bos_id) == (bare.pad_token_id, bare.bos_token_id)
    assert config.canvas_tokens == 256


def other_model(config: dict[str, Any]) -> None:
    config["model_type"] = "gemma3"


def no_model_type(config: dict[str, Any]) -> None:
    del config["model_type"]


def untied(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False


def text_is_a_list(config: dict[str, Any]) -> None:
    config["text_config"] = [1, 2]


def text(**values: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["text_config"].update(values)

    return change


def without(name: str) -> Change:
    return lambda config: config["text_config"].pop(name)


BAD: dict[str, tuple[Change, str]] = {
    "other-model": (other_model, "model_type is 'gemma3', expected 'diffusion_gemma'"),
    "no-model-type": (no_model_type, "model_type is None"),
    "untied": (untied, "tie_word_embeddings is false"),
    "text-is-a-list": (text_is_a_list, r"config\.json"),
    "no-experts": (without("num_experts"), "num_experts is missing"),
    "no-top-k": (without("top_k_experts"), "top_k_experts is missing"),
    "no-expert-width": (without("moe_intermediate_size"), "moe_intermediate_size is missing"),
    "too-many-experts-a-token": (text(top_k_experts=5), "5 experts a token, 4 experts"),
    "no-layers": (text(num_hidden_layers=0, layer_types=[]), "num_hidden_layers is 0"),
    "negative-width": (text(hidden_size=-32), "width is -32"),
    "window-zero": (text(sliding_window=0), "sliding_window is 0"),
    "no-expert-hidden": (text(moe_intermediate_size=0), "expert_width is 0"),
    "a-word-for-a-number": (text(hidden_size="wide"), r"config\.json"),
    "a-list-for-a-number": (text(vocab_size=[128]), r"config\.json"),
    "layer-count": (text(num_hidden_layers=4), "3 layer_types for 4 layers"),
    "layer-kind": (text(layer_types=[SLIDING, "linear", FULL]), "unknown layer_types"),
    "layer-types-is-a-word": (text(layer_types="full"), r"config\.json"),
    "heads-do-not-divide": (text(num_key_value_heads=3), "do not divide"),
    "odd-head": (text(head_dim=7), "is odd"),
    "activation": (text(hidden_activation="silu"), "hidden_activation is 'silu'"),
    "bias": (text(attention_bias=True), "attention_bias is True"),
    "bidirectional": (text(use_bidirectional_attention="all"), "use_bidirectional_attention"),
    "no-soft-cap": (text(final_logit_softcapping=0.0), "softcap is 0.0"),
    "rope-kind": (
        text(rope_parameters={FULL: {"rope_type": "yarn", "rope_theta": 1e6}}),
        "'yarn'",
    ),
    "rope-without-theta": (
        text(rope_parameters={FULL: {"rope_type": "proportional"}}),
        "config.json",
    ),
    "dialects-disagree-on-size": (
        text(global_head_dim=32, per_layer_config={"2": {"head_dim": 16}}),
        r"say \(key heads, head size\) \(2, 32\), per_layer_config says \(2, 16\)",
    ),
    "dialects-disagree-on-heads": (
        text(
            global_head_dim=16,
            num_global_key_value_heads=1,
            per_layer_config={"2": {"head_dim": 16}},
        ),
        r"\(1, 16\), per_layer_config says \(2, 16\)",
    ),
    "overrides-a-sliding-layer": (
        text(per_layer_config={"1": {"head_dim": 16}}),
        r"overrides sliding layers \[1\]",
    ),
    "full-layers-differ": (
        text(
            layer_types=[FULL, SLIDING, FULL],
            per_layer_config={"0": {"head_dim": 16}, "2": {"head_dim": 32}},
        ),
        "full layers differ",
    ),
    "eos-is-a-word": (text(eos_token_id="</s>"), r"config\.json"),
    "eos-outside-the-vocabulary": (text(eos_token_id=128), "128"),
    "bos-outside-the-vocabulary": (text(bos_token_id=-1), "-1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_config_is_refused_by_name(name: str) -> None:
    change, message = BAD[name]
    config = make(global_head_dim=16)
    if "per_layer" in str(change.__closure__ and change.__closure__[0].cell_contents):
        config = make()
    change(config)
    with pytest.raises(CheckpointMismatch, match=message) as caught:
        ModelConfig.from_dict(config)
    assert caught.value.remedy
    assert "config.json" in str(caught.value)


def test_only_our_own_errors_come_out(tmp_path: Path) -> None:
    for value in ("x", [], {}, True, 1.5, -1, None, 2**70, float("nan")):
        for key in make()["text_config"]:
            config = make(global_head_dim=16)
            config["text_config"][key] = value
            (tmp_path / "config.json").write_text(json.dumps(config))
            # Anything else that is raised fails the test.
            with contextlib.suppress(ModelError):
                ModelConfig.from_folder(tmp_path)


class TestFiles:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointMissing, match=r"no model folder at .*nowhere") as caught:
            ModelConfig.from_folder(tmp_path / "nowhere")
        assert caught.value.remedy.startswith("Give the folder of a checkpoint")

    def test_folder_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointMissing, match="no model folder"):
            ModelConfig.from_folder(tmp_path / "file")

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointMissing, match=r"holds no config\.json"):
            ModelConfig.from_folder(tmp_path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"{'a': 1}", b"\xff\xfe", b"[]", b'"text"', b"null", b"[" * 100_000],
        ids=["empty", "cut-off", "python", "not-utf8", "list", "string", "null", "deep"],
    )
    def test_malformed(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointMismatch, match=r"config\.json") as caught:
            ModelConfig.from_folder(tmp_path)
        assert caught.value.remedy


class TestSampler:
    def read(self, folder: Path, **values: Any) -> SamplerConfig:
        (folder / "generation_config.json").write_text(json.dumps(values))
        return SamplerConfig.from_folder(folder)

    def test_defaults_are_those_of_generate(self, tmp_path: Path) -> None:
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            DiffusionGemmaGenerationConfig,
        )

        defaults = DiffusionGemmaGenerationConfig._get_default_generation_params()
        config = SamplerConfig.from_folder(tmp_path)
        assert config == SamplerConfig()
        assert config.max_steps == defaults["max_denoising_steps"]
        assert config.max_new_tokens == defaults["max_new_tokens"]
        assert (config.t_min, config.t_max) == (defaults["t_min"], defaults["t_max"])
        assert config.stability_passes == defaults["stability_threshold"]
        assert config.mean_entropy_nats == defaults["confidence_threshold"]
        assert config.entropy_budget_nats == defaults["sampler_config"].entropy_bound

    def test_nulls_leave_the_defaults(self, tmp_path: Path) -> None:
        from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
            DiffusionGemmaGenerationConfig,
        )

        DiffusionGemmaGenerationConfig().save_pretrained(tmp_path)
        assert SamplerConfig.from_folder(tmp_path) == SamplerConfig()

    def test_eos_and_pad_come_from_here_only(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(make() | {"eos_token_id": 7}))
        config = self.read(tmp_path, eos_token_id=None, pad_token_id=None)
        assert (config.eos_ids, config.pad_id) == ((), None)
        config = self.read(tmp_path, eos_token_id=[1, 106, 50], pad_token_id=0)
        assert (config.eos_ids, config.pad_id) == ((1, 106, 50), 0)
        assert self.read(tmp_path, eos_token_id=3).eos_ids == (3,)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"max_denoising_steps": 0}, "max_steps"),
            ({"max_denoising_steps": "many"}, "generation_config.json"),
            ({"max_denoising_steps": 3.5}, "generation_config.json"),
            ({"max_new_tokens": -1}, "max_new_tokens"),
            ({"t_min": 0.9, "t_max": 0.8}, "t_min"),
            ({"t_min": -1.0}, "t_min"),
            ({"t_max": float("nan")}, "t_max"),
            ({"t_max": float("inf")}, "t_max"),
            ({"stability_threshold": -1}, "stability_passes"),
            ({"confidence_threshold": "low"}, "generation_config.json"),
            ({"sampler_config": {"_cls_name": "OtherSampler"}}, "'OtherSampler'"),
            ({"sampler_config": {"entropy_bound": -0.1}}, "entropy_budget_nats"),
            ({"sampler_config": {"entropy_bound": float("nan")}}, "entropy_budget_nats"),
            ({"sampler_config": [0.1]}, "generation_config.json"),
            ({"eos_token_id": "</s>"}, "generation_config.json"),
        ],
        ids=str,
    )
    def test_bad_values_are_refused(
        self, tmp_path: Path, values: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(CheckpointMismatch, match=message) as caught:
            self.read(tmp_path, **values)
        assert caught.value.remedy

    def test_malformed(self, tmp_path: Path) -> None:
        (tmp_path / "generation_config.json").write_text("{")
        with pytest.raises(CheckpointMismatch, match=r"generation_config\.json"):
            SamplerConfig.from_folder(tmp_path)


def test_reading_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        ModelConfig.from_dict(make(global_head_dim=16))
    assert not [entry for entry in caplog.records if entry.name.startswith("infilld")]
