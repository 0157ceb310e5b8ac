"""Good checkpoints load as they are; bad ones are refused by name, with what to do about it."""

import functools
import json
import logging
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import LOGIT_CEILING, PassCase, our_pass, pass_distance, pass_inputs
from safetensors.torch import load_file, save_file
from tiny_model import ALL_TWO, TAME, WIDE_HEADS, checkpoint, edit_config, ours
from torch import Tensor

from infilld.engine.checkpoints.loading import inspect_checkpoint, load_model
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing

Tensors = dict[str, Tensor]
SHARD_INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a checkpoint in one file."""
    return Path(shutil.copytree(checkpoint(TAME), tmp_path / "model"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A copy of a checkpoint in several files."""
    return Path(shutil.copytree(checkpoint(ALL_TWO), tmp_path / "model"))


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(
    folder: Path, kind: type[CheckpointMissing | CheckpointMismatch], *parts: str
) -> Exception:
    with pytest.raises(kind) as caught:
        load_model(folder)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.remedy
    assert caught.value.code in ("checkpoint_missing", "checkpoint_mismatch")
    assert "\n" not in str(caught.value)
    return caught.value


class TestGood:
    def test_several_shards_are_several_files(self, shards: Path) -> None:
        files = sorted(shards.glob("*.safetensors"))
        assert len(files) > 2
        assert (shards / SHARD_INDEX).exists()
        summary = inspect_checkpoint(shards)
        assert summary.files == tuple(files)

    def test_every_parameter_is_read_once(self) -> None:
        stored = load_file(checkpoint(WIDE_HEADS) / "model.safetensors")
        model = ours(WIDE_HEADS)
        state = model.state_dict()
        scalars = state.pop("encoder_scalars")
        for name, tensor in state.items():
            assert torch.equal(tensor, stored[f"model.decoder.{name}"]), name
        for layer, scalar in enumerate(scalars):
            name = f"model.encoder.language_model.layers.{layer}.layer_scalar"
            assert scalar == stored[name]
        used = len(state) + len(scalars)
        vision = sum("vision" in name for name in stored)
        assert used + vision == len(stored)

    def test_vision_is_skipped_and_reported(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        stored = load_file(folder / "model.safetensors")
        vision = [name for name in stored if "vision" in name]
        assert vision
        with caplog.at_level(logging.INFO, logger="infilld"):
            load_model(folder)
        assert f"skipped {len(vision)} vision tensors" in caplog.text
        summary = inspect_checkpoint(folder)
        assert summary.vision_tensors == len(vision)
        assert summary.parameters == sum(
            tensor.numel() for name, tensor in stored.items() if name not in vision
        )
        assert summary.text_bytes == 4 * summary.parameters
        assert summary.dtypes == ("F32",)

    def test_without_vision_the_same_model(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def drop(tensors: Tensors) -> None:
            for name in [name for name in tensors if "vision" in name]:
                del tensors[name]

        edit_tensors(folder, drop)
        edit_config(folder, lambda config: config.pop("vision_config"))
        with caplog.at_level(logging.INFO, logger="infilld"):
            model = load_model(folder)
        assert "vision" not in caplog.text
        case = PassCase(prefix=9, tokens=5, belief=True)
        assert pass_distance(model, TAME, [case]) < LOGIT_CEILING

    def test_an_equal_head_is_the_tied_one(self, folder: Path) -> None:
        def add(tensors: Tensors) -> None:
            tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"].clone()

        edit_tensors(folder, add)
        load_model(folder)

    @pytest.mark.parametrize("spec", [TAME, WIDE_HEADS], ids=["head-size-only", "both"])
    def test_both_dialects_give_the_same_model(self, spec: Any, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(checkpoint(spec), tmp_path / "model"))

        def other_dialect(config: dict[str, Any]) -> None:
            text = config["text_config"]
            (values,) = text.pop("per_layer_config").values()
            text["global_head_dim"] = values["head_dim"]
            if "num_key_value_heads" in values:
                text["num_global_key_value_heads"] = values["num_key_value_heads"]

        edit_config(folder, other_dialect)
        case = PassCase(prefix=9, tokens=5, belief=True)
        assert pass_distance(load_model(folder), spec, [case]) < LOGIT_CEILING

    def test_a_last_layer_called_sliding_is_full(self, folder: Path) -> None:
        def call_it_sliding(config: dict[str, Any]) -> None:
            config["text_config"]["layer_types"][-1] = "sliding_attention"

        edit_config(folder, call_it_sliding)
        case = PassCase(prefix=20, tokens=5, belief=True)
        assert pass_distance(load_model(folder), TAME, [case]) < LOGIT_CEILING

    def test_dtype_covers_the_scalars(self, folder: Path) -> None:
        model = load_model(folder, dtype=torch.bfloat16)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
        # The angles of the rotary embedding stay exact.
        assert {rotation.frequencies.dtype for rotation in model.rotations.values()} == {
            torch.float32
        }

    def test_bfloat16_files_are_read(self, folder: Path) -> None:
        def halve(tensors: Tensors) -> None:
            for name in tensors:
                tensors[name] = tensors[name].bfloat16()

        edit_tensors(folder, halve)
        assert inspect_checkpoint(folder).dtypes == ("BF16",)
        inputs = pass_inputs(TAME, PassCase(prefix=9, tokens=5, belief=False))
        assert our_pass(load_model(folder), *inputs).isfinite().all()

    def test_torchs_compiler_is_left_alone(self) -> None:
        # Importing it took 2 of the 2.5 seconds that loading the starter took.
        code = (
            "import sys; from pathlib import Path\n"
            "from infilld.engine.checkpoints.loading import load_model\n"
            f"load_model(Path({str(checkpoint(TAME))!r}))\n"
            "assert 'torch._dynamo' not in sys.modules"
        )
        subprocess.run([sys.executable, "-P", "-c", code], check=True)

    def test_frequencies_are_those_of_the_configuration(self) -> None:
        for rotation in ours(TAME).rotations.values():
            assert torch.equal(rotation.frequencies, rotation.inverse_frequencies())

    def test_nothing_is_trainable_or_left_on_meta(self) -> None:
        model = ours(TAME)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        assert not any(buffer.is_meta for buffer in model.buffers())


class TestMissing:
    def test_no_folder(self, tmp_path: Path) -> None:
        refused(tmp_path / "nowhere", CheckpointMissing, "no model folder", "nowhere")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        refused(folder, CheckpointMissing, "no safetensors file")

    @pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
    def test_cut_off_file(self, folder: Path, kept: float) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(kept if kept > 1 else kept * len(content))])
        refused(folder, CheckpointMissing, "model.safetensors is cut off or damaged")

    def test_not_a_safetensors_file(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"<html>404 Not Found</html>" * 10)
        refused(folder, CheckpointMissing, "model.safetensors")

    def test_a_pointer_instead_of_the_file(self, folder: Path) -> None:
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n"
        (folder / "model.safetensors").write_text(pointer)
        refused(folder, CheckpointMissing, "model.safetensors")

    def test_missing_shard(self, shards: Path) -> None:
        gone = sorted(shards.glob("*.safetensors"))[1]
        gone.unlink()
        refused(shards, CheckpointMissing, "lacks 1 of", gone.name)

    def test_cut_off_shard(self, shards: Path) -> None:
        path = sorted(shards.glob("*.safetensors"))[1]
        path.write_bytes(path.read_bytes()[:-10])
        refused(shards, CheckpointMissing, path.name)


class TestMismatch:
    def test_wrong_shape(self, folder: Path) -> None:
        name = "model.decoder.layers.1.mlp.up_proj.weight"
        edit_tensors(folder, lambda t: t.update({name: t[name][:-1].clone()}))
        refused(folder, CheckpointMismatch, name, "[47, 32]", "[48, 32]")

    def test_config_of_another_size(self, folder: Path) -> None:
        edit_config(folder, lambda config: config["text_config"].update(hidden_size=64))
        refused(folder, CheckpointMismatch, "config.json makes it", "64")

    def test_config_with_more_layers(self, folder: Path) -> None:
        def grow(config: dict[str, Any]) -> None:
            config["text_config"]["num_hidden_layers"] = 4
            config["text_config"]["layer_types"].insert(0, "sliding_attention")
            config["text_config"]["per_layer_config"] = {"3": {"head_dim": 16}}

        edit_config(folder, grow)
        refused(folder, CheckpointMismatch)

    @pytest.mark.parametrize(
        "name",
        [
            "model.decoder.layers.0.self_attn.v_proj.weight",
            "model.decoder.layers.2.layer_scalar",
            "model.decoder.embed_tokens.weight",
            "model.decoder.norm.weight",
            "model.decoder.self_conditioning.pre_norm.weight",
            "model.decoder.layers.1.experts.gate_up_proj",
            "model.decoder.layers.1.router.per_expert_scale",
        ],
    )
    def test_missing_tensor(self, folder: Path, name: str) -> None:
        edit_tensors(folder, lambda t: t.pop(name))
        refused(folder, CheckpointMismatch, "missing", name)

    @pytest.mark.parametrize(
        "name",
        [
            "model.decoder.layers.3.layer_scalar",
            "model.decoder.layers.2.self_attn.v_proj.weight",
            "model.decoder.layers.0.self_attn.q_proj.bias",
            "model.encoder.language_model.layers.9.layer_scalar",
            "model.encoder.language_model.norm.weight",
            "something.else",
            "layers.0.layer_scalar",
            "model.decoder.encoder_scalars",
            "model.decoder.rotations.full.frequencies",
        ],
    )
    def test_unexpected_tensor(self, folder: Path, name: str) -> None:
        edit_tensors(folder, lambda t: t.update({name: torch.ones(1)}))
        refused(folder, CheckpointMismatch, name, "not part of the model")

    def test_no_encoder_scalars(self, folder: Path) -> None:
        def drop(tensors: Tensors) -> None:
            for name in [n for n in tensors if n.startswith("model.encoder.language_model")]:
                del tensors[name]

        edit_tensors(folder, drop)
        error = refused(
            folder,
            CheckpointMismatch,
            "3 encoder layer scalars are missing",
            "model.encoder.language_model.layers.0.layer_scalar",
        )
        assert "layer_scalar" in error.remedy  # type: ignore[attr-defined]

    def test_one_encoder_scalar_fewer(self, folder: Path) -> None:
        name = "model.encoder.language_model.layers.1.layer_scalar"
        edit_tensors(folder, lambda t: t.pop(name))
        refused(folder, CheckpointMismatch, "1 encoder layer scalars are missing", name)

    def test_another_head(self, folder: Path) -> None:
        def untie(tensors: Tensors) -> None:
            tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"] * 2

        edit_tensors(folder, untie)
        refused(folder, CheckpointMismatch, "lm_head.weight differs from the embedding")

    def test_a_head_of_another_shape(self, folder: Path) -> None:
        edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.ones(3, 32)}))
        refused(folder, CheckpointMismatch, "lm_head.weight")

    def test_integers(self, folder: Path) -> None:
        name = "model.decoder.layers.0.mlp.up_proj.weight"
        edit_tensors(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
        refused(folder, CheckpointMismatch, name, "holds I8")

    def test_quantized(self, folder: Path) -> None:
        edit_config(folder, lambda c: c.update(quantization_config={"quant_method": "awq"}))
        refused(folder, CheckpointMismatch, "quantized", "awq")

    def test_another_model(self, folder: Path) -> None:
        edit_config(folder, lambda config: config.update(model_type="gemma4"))
        refused(folder, CheckpointMismatch, "'gemma4'", "'diffusion_gemma'")

    def test_dialects_in_disagreement(self, folder: Path) -> None:
        edit_config(folder, lambda config: config["text_config"].update(global_head_dim=32))
        refused(folder, CheckpointMismatch, "global_head_dim", "per_layer_config")

    def test_malformed_config(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "diffusion_gemma",')
        refused(folder, CheckpointMismatch, "config.json is not readable JSON")

    @pytest.mark.parametrize(
        "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
    )
    def test_malformed_index(self, shards: Path, content: str) -> None:
        (shards / SHARD_INDEX).write_text(content)
        refused(shards, CheckpointMismatch, SHARD_INDEX)

    @pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
    def test_index_points_out_of_the_folder(self, shards: Path, name: str) -> None:
        (shards.parent / "model.safetensors").touch()
        (shards / SHARD_INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        refused(shards, CheckpointMismatch, SHARD_INDEX, name)

    def test_a_tensor_in_two_shards(self, shards: Path) -> None:
        first, second = sorted(shards.glob("*.safetensors"))[:2]
        tensors = load_file(second)
        name, tensor = next(iter(load_file(first).items()))
        save_file(tensors | {name: tensor}, second)
        refused(shards, CheckpointMismatch, name, "in two files")


def test_headers_alone_tell_the_same(folder: Path) -> None:
    # Not a byte of any tensor is needed to say what a folder holds.
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    path.write_bytes(content[: 8 + size] + bytes(len(content) - 8 - size))
    assert inspect_checkpoint(folder).parameters == inspect_checkpoint(checkpoint(TAME)).parameters


def test_messages_do_not_drown(folder: Path) -> None:
    def strip(tensors: Tensors) -> None:
        for name in [n for n in tensors if ".layers." in n and "encoder" not in n]:
            del tensors[name]

    edit_tensors(folder, strip)
    error = refused(folder, CheckpointMismatch, "tensors are missing")
    assert len(re.findall("model.decoder", str(error))) <= 3


@functools.cache
def reference_model(folder: Path) -> Any:
    from transformers import DiffusionGemmaForBlockDiffusion

    return DiffusionGemmaForBlockDiffusion.from_pretrained(folder).eval()


def test_what_we_refuse_transformers_would_run_on_garbage(folder: Path) -> None:
    """Why missing encoder scalars are an error here."""

    def drop(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("model.encoder.language_model")]:
            del tensors[name]

    edit_tensors(folder, drop)
    scalars = [
        float(layer.layer_scalar)
        for layer in reference_model(folder).model.encoder.language_model.layers
    ]
    stored = load_file(checkpoint(TAME) / "model.safetensors")
    right = [
        float(stored[f"model.encoder.language_model.layers.{i}.layer_scalar"]) for i in range(3)
    ]
    assert scalars != right
