"""GGUF files give the numbers that the `gguf` package reads out of them, or are refused by name."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from quantized import loaded_bytes
from tiny_gguf import Type, Written, config_json, write_gguf
from torch import Tensor

from infilld.engine.checkpoints.gguf import gguf_in, gguf_sampler, inspect_gguf, read_gguf
from infilld.engine.checkpoints.gguf_blocks import FORMS
from infilld.engine.checkpoints.gguf_file import GgufFile
from infilld.engine.checkpoints.loading import read_weights
from infilld.engine.checkpoints.quantizing import is_quantized
from infilld.engine.checkpoints.sources import config_of, folder_of, sampler_of, template_of
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing
from infilld.engine.loading import load_infiller, starter_folder
from infilld.engine.request import InfillRequest, Span
from infilld.kernels._weights import QuantizedWeight

BLOCKS = [Type.__members__[name] for name in FORMS]
PLAIN = (Type.F32, Type.F16, Type.BF16)


# Where no block of 256 is needed.
NARROW = config_json(
    hidden_size=32,
    intermediate_size=32,
    moe_intermediate_size=32,
    head_dim=16,
    global_head_dim=32,
)


def only_few_bits(kind: Type) -> Callable[[str, tuple[int, ...]], Type]:
    """Everything that may be in few bits in one type, the rest in float32."""
    return lambda name, shape: kind if is_quantized(name, shape) else Type.F32


def represented(weight: QuantizedWeight) -> Tensor:
    """The numbers of a weight in few bits, in float32 as the definition says."""
    codes = weight.codes
    if weight.kind == "int4":
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    wide = codes.float()
    if weight.kind == "int4" and weight.biases is None:
        wide -= 8
    grouped = wide.reshape(*weight.scales.shape, weight.group) * weight.scales.float()[..., None]
    if weight.biases is not None:
        grouped += weight.biases.float()[..., None]
    return grouped.flatten(-2)


class TestNumbers:
    @pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
    def test_every_type_is_exact_with_wide_scales(self, kind: Type, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, only_few_bits(kind))
        weights = read_gguf(written.path, scales="float32")
        assert weights.config == written.config
        assert weights.tensors.keys() == written.numbers.keys()
        form = FORMS[kind.name]
        for name, tensor in weights.tensors.items():
            truth = torch.from_numpy(written.numbers[name])
            if is_quantized(name, truth.shape):
                assert isinstance(tensor, QuantizedWeight)
                assert (tensor.kind, tensor.group) == (form.kind, form.group)
                assert (tensor.biases is not None) == form.has_biases
                assert tensor.scales.dtype == torch.float32
                assert torch.equal(represented(tensor), truth), name
            else:
                assert isinstance(tensor, Tensor)
                assert torch.equal(tensor, truth), name

    @pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
    def test_narrow_scales_are_off_by_what_is_said(self, kind: Type, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, only_few_bits(kind), seed=1)
        exact = read_gguf(written.path, scales="float32").tensors
        weights = read_gguf(written.path)
        said = any("rounded to float16" in note for note in weights.notes)
        assert said != FORMS[kind.name].is_exact
        for name, tensor in weights.tensors.items():
            if not isinstance(tensor, QuantizedWeight):
                continue
            wide = exact[name]
            assert isinstance(wide, QuantizedWeight)
            assert torch.equal(tensor.codes, wide.codes)
            for part in ("scales", "biases"):
                rounded, truth = getattr(tensor, part), getattr(wide, part)
                if truth is None:
                    assert rounded is None
                    continue
                assert rounded.dtype == torch.float16
                allowed = torch.clamp(2**-11 * truth.abs(), min=2**-25)
                off = (rounded.float() - truth).abs()
                assert bool((off <= allowed).all()), name
                assert said or not off.any()

    @pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
    def test_plain_types_stay_plain(self, kind: Type, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, lambda name, shape: kind)
        weights = read_gguf(written.path)
        assert weights.notes == ()
        assert weights.format == f"GGUF {kind.name}"
        for name, tensor in weights.tensors.items():
            assert isinstance(tensor, Tensor)
            assert torch.equal(tensor, torch.from_numpy(written.numbers[name])), name

    def test_a_quantized_embedding_is_made_plain(self, tmp_path: Path) -> None:
        def storage(name: str, shape: tuple[int, ...]) -> Type:
            return Type.Q6_K if name == "embed_tokens.weight" else Type.F32

        written = write_gguf(tmp_path, storage)
        weights = read_gguf(written.path, dtype=torch.bfloat16)
        embedding = weights.tensors["embed_tokens.weight"]
        assert isinstance(embedding, Tensor)
        truth = torch.from_numpy(written.numbers["embed_tokens.weight"])
        assert torch.equal(embedding, truth.to(torch.bfloat16))
        assert any("Q6_K of embedding" in note for note in weights.notes)

    def test_experts_apart_are_joined_gate_first(self, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, only_few_bits(Type.Q4_K), apart=True)
        weights = read_gguf(written.path, scales="float32")
        for layer in range(2):
            name = f"layers.{layer}.experts.gate_up_proj"
            joined = weights.tensors[name]
            assert isinstance(joined, QuantizedWeight)
            assert torch.equal(represented(joined), torch.from_numpy(written.numbers[name]))

    def test_pieces_do_not_show(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written = write_gguf(tmp_path, only_few_bits(Type.Q5_K))
        whole = read_gguf(written.path).tensors
        # Seven blocks at a time, which divides no tensor of it.
        monkeypatch.setattr("infilld.engine.checkpoints.gguf._CPU_CHUNK", 7 * 256)
        for name, tensor in read_gguf(written.path).tensors.items():
            other = whole[name]
            if isinstance(tensor, QuantizedWeight) and isinstance(other, QuantizedWeight):
                assert all(
                    torch.equal(tensor.parts[part], other.parts[part]) for part in tensor.parts
                )
            else:
                assert isinstance(tensor, Tensor)
                assert isinstance(other, Tensor)
                assert torch.equal(tensor, other)


class TestSummary:
    def test_it_tells_what_loading_takes(self, tmp_path: Path) -> None:
        def storage(name: str, shape: tuple[int, ...]) -> Type:
            if "down_proj" in name and is_quantized(name, shape):
                return Type.Q8_0
            return only_few_bits(Type.Q4_K)(name, shape)

        written = write_gguf(tmp_path, storage)
        summary = inspect_gguf(written.path)
        weights = read_gguf(written.path, dtype=torch.bfloat16)
        assert summary.config == weights.config
        assert loaded_bytes(summary, torch.bfloat16) == weights.nbytes
        assert summary.parameters == sum(each.size for each in written.numbers.values())
        assert summary.format == weights.format == "GGUF Q4_K"
        assert summary.notes == weights.notes
        assert summary.dtypes == ("F32", "Q4_K", "Q8_0")
        experts = {line.storage: line for line in summary.parts if line.part == "experts"}
        assert experts["Q4_K"].bits_per_weight == 4.5
        assert experts["Q8_0"].bits_per_weight == 8.5
        assert [experts["Q4_K"].kind, experts["Q8_0"].kind] == ["int4", "int8"]

    def test_a_missing_tokenizer_is_said(self, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, lambda name, shape: Type.F32)
        (tmp_path / "tokenizer.json").unlink()
        assert any("tokenizer.json" in note for note in inspect_gguf(written.path).notes)
        with pytest.raises(CheckpointMissing, match=r"tokenizer\.json is not beside") as caught:
            read_gguf(written.path)
        assert "Copy tokenizer.json" in caught.value.remedy


class TestMetadata:
    def test_small_floats_come_as_they_were_meant(self, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, lambda name, shape: Type.F32)
        config = inspect_gguf(written.path).config
        assert config.rms_eps == 1e-6
        assert config.ropes["full"].theta == 1e6
        assert config.ropes["full"].rotary_fraction == 0.25

    def test_the_sampler_is_the_files(self, tmp_path: Path) -> None:
        def metadata(writer: gguf.GGUFWriter) -> None:
            writer.add_uint32("diffusion.eb_max_steps", 24)
            writer.add_float32("diffusion.eb_t_min", 0.3)
            writer.add_float32("diffusion.eb_entropy_bound", 0.2)

        sampler = gguf_sampler(write_gguf(tmp_path, _f32, config=NARROW, metadata=metadata).path)
        assert (sampler.max_steps, sampler.t_min, sampler.t_max) == (24, 0.3, 0.8)
        assert sampler.entropy_budget_nats == 0.2
        # <eos>, <|tool_response> and <turn|> of the file's own tokens.
        assert sampler.eos_ids == (1, 5, 7)
        assert sampler.pad_id == 0

    def test_what_is_no_weight_comes_from_the_file(self, tmp_path: Path) -> None:
        def metadata(writer: gguf.GGUFWriter) -> None:
            writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
            writer.add_uint32("diffusion.eb_max_steps", 24)

        written = write_gguf(tmp_path, _f32, config=NARROW, metadata=metadata)
        for source in (written.path, tmp_path):
            assert folder_of(source) == tmp_path
            assert config_of(source) == written.config
            assert sampler_of(source).max_steps == 24
            template = template_of(source)
            assert template is not None
            assert template.render([{"role": "user", "content": "x"}]) == "<bos>x<eos>"

    def test_files_beside_it_win(self, tmp_path: Path) -> None:
        def metadata(writer: gguf.GGUFWriter) -> None:
            writer.add_chat_template("inside")
            writer.add_uint32("diffusion.eb_max_steps", 24)

        path = write_gguf(tmp_path, _f32, config=NARROW, metadata=metadata).path
        (tmp_path / "generation_config.json").write_text('{"max_denoising_steps": 12}')
        (tmp_path / "chat_template.jinja").write_text("beside")
        assert sampler_of(path).max_steps == 12
        template = template_of(path)
        assert template is not None
        assert template.render([]) == "beside"

    def test_a_file_without_a_template(self, tmp_path: Path) -> None:
        assert template_of(write_gguf(tmp_path, _f32, config=NARROW).path) is None

    def test_a_folder_with_one_file(self, tmp_path: Path) -> None:
        assert gguf_in(tmp_path) is None
        written = write_gguf(tmp_path, _f32, config=NARROW)
        (tmp_path / "mmproj-model.gguf").write_bytes(b"pictures")
        assert gguf_in(tmp_path) == gguf_in(written.path) == written.path
        (tmp_path / "model.safetensors").write_bytes(b"")
        assert gguf_in(tmp_path) is None
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "other.gguf").write_bytes(b"GGUF")
        with pytest.raises(CheckpointMismatch, match="holds 2 GGUF files"):
            gguf_in(tmp_path)


def _f32(name: str, shape: tuple[int, ...]) -> Type:
    return Type.F32


def _refused(path: Path, words: str) -> None:
    with pytest.raises((CheckpointMismatch, CheckpointMissing), match=words) as caught:
        inspect_gguf(path)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


class TestRefused:
    def test_another_architecture(self, tmp_path: Path) -> None:
        _refused(
            write_gguf(tmp_path, _f32, config=NARROW, architecture="gemma4").path,
            "architecture is 'gemma4'",
        )

    def test_a_part_of_a_split_file(self, tmp_path: Path) -> None:
        written = write_gguf(
            tmp_path,
            _f32,
            config=NARROW,
            metadata=lambda writer: writer.add_uint16("split.count", 3),
        )
        _refused(written.path, "one of 3 parts")

    @pytest.mark.parametrize(
        "name", ["blk.1.enc_layer_output_scale.weight", "blk.0.ffn_down_exps.weight"]
    )
    def test_a_missing_tensor(self, tmp_path: Path, name: str) -> None:
        written = write_gguf(tmp_path, _f32, config=NARROW, skip=lambda each: each == name)
        _refused(written.path, f"1 tensors are missing: {name}")

    def test_a_tensor_too_many(self, tmp_path: Path) -> None:
        def metadata(writer: gguf.GGUFWriter) -> None:
            writer.add_tensor("blk.1.attn_v.weight", np.zeros((32, 32), np.float32))

        _refused(
            write_gguf(tmp_path, _f32, config=NARROW, metadata=metadata).path,
            "blk.1.attn_v.weight is not",
        )

    def test_a_head_of_its_own(self, tmp_path: Path) -> None:
        def metadata(writer: gguf.GGUFWriter) -> None:
            writer.add_tensor("output.weight", np.ones((64, 32), np.float32))

        written = write_gguf(tmp_path, _f32, config=NARROW, metadata=metadata)
        with pytest.raises(CheckpointMismatch, match="differs from the embedding"):
            read_gguf(written.path)

    def test_a_type_that_is_not_read(self, tmp_path: Path) -> None:
        def metadata(writer: gguf.GGUFWriter) -> None:
            raw = np.zeros((4, 84), np.uint8)
            writer.add_tensor("blk.0.odd.weight", raw, raw_dtype=Type.Q2_K)

        written = write_gguf(tmp_path, _f32, config=NARROW, metadata=metadata)
        _refused(written.path, "blk.0.odd.weight is stored as Q2_K")

    def test_shapes_that_contradict_the_metadata(self, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, _f32, config=NARROW)
        raw = written.path.read_bytes()
        key = b"diffusion-gemma.expert_feed_forward_length" + struct.pack("<I", 4)
        changed = raw.replace(key + struct.pack("<I", 32), key + struct.pack("<I", 16))
        assert changed != raw
        written.path.write_bytes(changed)
        _refused(written.path, r"ffn_gate_up_exps.weight is \[3, 64, 32\], the metadata makes")

    @pytest.mark.parametrize("key", ["block_count", "attention.head_count_kv", "context_length"])
    def test_metadata_that_is_missing(self, tmp_path: Path, key: str) -> None:
        written = write_gguf(tmp_path, _f32, config=NARROW)
        raw = written.path.read_bytes()
        name = f"diffusion-gemma.{key}".encode()
        assert raw.count(name) == 1 or key == "attention.head_count_kv"
        written.path.write_bytes(raw.replace(name, name[:-1] + b"X"))
        _refused(written.path, f"lacks '{key}'")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "cannot be read"),
            (b"PK\x03\x04" + bytes(64), "is not a GGUF file"),
            (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
            (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
            (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1), "counts"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 1), "cut off in its header"),
            (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62), "cut off in its header"),
            (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"a", 99), "unknown type 99"),
        ],
        ids=["empty", "zip", "old", "big-endian", "counts", "no-entry", "string", "type"],
    )
    def test_damaged_headers(self, tmp_path: Path, content: bytes, words: str) -> None:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        _refused(path, words)

    def test_every_cut_is_noticed(self, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, _f32, config=NARROW)
        raw = written.path.read_bytes()
        header = raw.index(b"blk.1.post_ffw_norm")
        for end in [*range(4, header, 97), len(raw) // 2, len(raw) - 64]:
            written.path.write_bytes(raw[:end])
            with pytest.raises((CheckpointMissing, CheckpointMismatch)):
                inspect_gguf(written.path)

    def test_a_scale_that_is_no_number(self, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, only_few_bits(Type.Q8_0), config=NARROW)
        found = inspect_gguf(written.path)
        assert found.format == "GGUF Q8_0"
        raw = bytearray(written.path.read_bytes())
        tensor = GgufFile(written.path).tensors["blk.1.attn_q.weight"]
        raw[tensor.start : tensor.start + 2] = np.float16("inf").tobytes()
        written.path.write_bytes(bytes(raw))
        with pytest.raises(CheckpointMismatch, match=r"attn_q.weight has a scale that is not"):
            read_gguf(written.path)


def test_a_model_of_full_layers_only(tmp_path: Path) -> None:
    config = config_json(layer_types=["full_attention", "full_attention"])
    written: Written = write_gguf(tmp_path, _f32, config=config)
    read = read_gguf(written.path).config
    assert read.layer_kinds == ("full", "full")
    assert (read.key_heads["full"], read.head_sizes["full"]) == (1, 128)


STARTER = starter_folder()
REQUEST = InfillRequest(
    text="def add(a, b):\n    return \n", spans=(Span(26, 26),), seed=1, boldness=1.0
)


@pytest.fixture
def starter(tmp_path: Path) -> Callable[[Callable[[str, tuple[int, ...]], Type]], Path]:
    """Writes the starter as a GGUF file, with its small files beside it."""

    def write(storage: Callable[[str, tuple[int, ...]], Type]) -> Path:
        config = json.loads((STARTER / "config.json").read_text())
        text = config["text_config"]
        # A GGUF says both for each layer.
        own = text.pop("per_layer_config")
        text["global_head_dim"] = own[str(text["num_hidden_layers"] - 1)]["head_dim"]
        text["num_global_key_value_heads"] = text["num_key_value_heads"]
        numbers = {
            name: tensor.numpy()
            for name, tensor in read_weights(STARTER).tensors.items()
            if isinstance(tensor, Tensor)
        }
        path = write_gguf(tmp_path, storage, config=config, given_numbers=numbers).path
        for name in ("tokenizer.json", "generation_config.json", "calibration.json"):
            shutil.copyfile(STARTER / name, tmp_path / name)
        return path

    return write


@pytest.mark.skipif(
    not (STARTER / "config.json").is_file(), reason="this checkout has no starter model yet"
)
class TestStarter:
    def test_it_is_the_same_model(
        self, starter: Callable[[Callable[[str, tuple[int, ...]], Type]], Path]
    ) -> None:
        path = starter(lambda name, shape: Type.BF16)
        ours, original = (load_infiller(each, "cpu") for each in (path, STARTER))
        assert ours.model.config == original.model.config
        assert ours.tokenizer.vocab_tokens == original.tokenizer.vocab_tokens
        answer = original.infill(REQUEST)
        assert answer.alternatives
        assert ours.infill(REQUEST).alternatives == answer.alternatives

    def test_in_few_bits_it_fills(
        self, starter: Callable[[Callable[[str, tuple[int, ...]], Type]], Path]
    ) -> None:
        def storage(name: str, shape: tuple[int, ...]) -> Type:
            return Type.Q8_0 if len(shape) > 1 else Type.F32

        path = starter(storage)
        tensors = read_weights(path).tensors
        assert isinstance(tensors["layers.0.experts.down_proj"], QuantizedWeight)
        assert load_infiller(path, "cpu").infill(REQUEST).alternatives
