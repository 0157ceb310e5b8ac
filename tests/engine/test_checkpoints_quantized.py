"""Quantized checkpoints are read number for number, and faulty ones are refused by name."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import (
    E2M1,
    EXPERTS,
    EXPERTS_ATTENTION,
    EXPERTS_ONLY,
    LINEAR,
    MODELOPT,
    SHAPES,
    compress,
    compressed_config,
    compressed_scheme,
    decompress,
    from_nvfp4,
    joined,
    loaded_bytes,
    plain_tensors,
    replaced,
    split_experts,
    write_checkpoint,
    write_compressed,
    write_mlx,
    write_modelopt,
)
from safetensors.torch import load_file, save_file
from tiny_gguf import Type, write_gguf
from tiny_model import edit_config
from torch import Tensor

from infilld.engine.checkpoints import loading, stacking
from infilld.engine.checkpoints.files import Entry, Reader
from infilld.engine.checkpoints.loading import inspect_checkpoint, load_model, read_weights
from infilld.engine.checkpoints.weights import Weights, part_of
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing, ModelError
from infilld.kernels._weights import QuantizedWeight

Truth = dict[str, Tensor]
Tensors = dict[str, Tensor]

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT4_ZEROS = INT4 | {"symmetric": False}
INT8_GROUPS = INT4 | {"num_bits": 8}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INT8_ZEROS = INT8 | {"symmetric": False}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
NVFP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "symmetric": True,
    "scale_dtype": "torch.float8_e4m3fn",
}
DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def values(weight: Tensor | QuantizedWeight) -> Tensor:
    """What it stands for, by the definition of `QuantizedWeight`, in float32."""
    if isinstance(weight, Tensor):
        return weight.float()
    if weight.kind in ("int4", "nvfp4"):
        nibbles = torch.stack((weight.codes & 15, weight.codes >> 4), dim=-1).flatten(-2)
        if weight.kind == "nvfp4":
            codes = E2M1[nibbles.long()]
        else:
            codes = nibbles.float() - (0 if weight.biases is not None else 8)
    else:
        codes = weight.codes.float()
    scaled = codes * weight.scales.float().repeat_interleave(weight.group, -1)
    if weight.biases is not None:
        scaled = scaled + weight.biases.float().repeat_interleave(weight.group, -1)
    if weight.factor is None:
        return scaled
    rows = weight.factor[..., None] if weight.row_factor is None else weight.row_factor
    return scaled * rows[..., None]


def assert_exact(weights: Weights, truth: Truth) -> None:
    assert weights.tensors.keys() == truth.keys() == SHAPES.keys()
    for name, tensor in weights.tensors.items():
        assert tuple(tensor.shape) == SHAPES[name], name
        assert torch.equal(values(tensor), truth[name]), name


def assert_in_few_bits(weights: Weights, parts: set[str], kind: str) -> None:
    """Exactly these parts are, and as this kind."""
    found = {
        part_of(name): tensor.kind
        for name, tensor in weights.tensors.items()
        if isinstance(tensor, QuantizedWeight)
    }
    assert found == dict.fromkeys(parts, kind)


def assert_summary_agrees(folder: Path, weights: Weights, *, ignored: int = 0) -> None:
    found = inspect_checkpoint(folder)
    assert found.format == weights.format
    assert found.vision_tensors == weights.vision_tensors == 1
    assert set(found.notes) <= set(weights.notes)
    stored = load_file(folder / "model.safetensors")
    vision = stored["model.encoder.vision_tower.x.weight"].nbytes
    assert found.text_bytes == sum(t.nbytes for t in stored.values()) - vision - ignored
    assert found.text_bytes == sum(part.stored_bytes for part in found.parts)
    assert found.parameters == sum(part.parameters for part in found.parts)
    assert found.parameters == sum(torch.Size(shape).numel() for shape in SHAPES.values())
    # Headers do not say whether gate and up share their factor.
    few_bits = [t for t in weights.tensors.values() if isinstance(t, QuantizedWeight)]
    apart = [t.row_factor for t in few_bits if t.row_factor is not None]
    unforeseen = sum(factors.nbytes - 4 * len(factors) for factors in apart)
    assert loaded_bytes(found, torch.float32) == weights.nbytes - unforeseen
    in_few_bits = {part.part: part.kind for part in found.parts if part.kind}
    assert in_few_bits == {
        part_of(name): tensor.kind
        for name, tensor in weights.tensors.items()
        if isinstance(tensor, QuantizedWeight)
    }


class TestCompressedTensors:
    @pytest.mark.parametrize(
        ("packing", "args", "kind"),
        [
            ("pack-quantized", INT4, "int4"),
            ("pack-quantized", INT4_ZEROS, "int4"),
            ("pack-quantized", INT4 | {"strategy": "channel", "group_size": None}, "int4"),
            ("pack-quantized", INT4_ZEROS | {"strategy": "channel", "group_size": None}, "int4"),
            ("pack-quantized", INT8_GROUPS, "int8"),
            ("pack-quantized", INT8_GROUPS | {"symmetric": False}, "int8"),
            ("int-quantized", INT8, "int8"),
            ("int-quantized", INT8_ZEROS, "int8"),
            ("int-quantized", INT8_GROUPS, "int8"),
            ("naive-quantized", INT8, "int8"),
            ("float-quantized", FP8, "fp8"),
            ("float-quantized", FP8 | {"strategy": "tensor"}, "fp8"),
        ],
        ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
    )
    def test_number_for_number(
        self, packing: str, args: dict[str, Any], kind: str, tmp_path: Path
    ) -> None:
        scheme = compressed_scheme(packing, **args)
        truth = write_compressed(tmp_path, scheme, scale_dtype=torch.bfloat16)
        weights = read_weights(tmp_path)
        assert_exact(weights, truth)
        assert_in_few_bits(weights, {"attention", "dense MLP", "experts"}, kind)
        assert weights.format == f"compressed-tensors {kind}"
        assert weights.notes == ()
        assert_summary_agrees(tmp_path, weights)

    def test_experts_and_attention_in_int4(self, tmp_path: Path) -> None:
        # As the AWQ checkpoints are: the rest is float16, and so are the scales.
        scheme = compressed_scheme("pack-quantized", **INT4)
        half = torch.float16
        truth = write_compressed(
            tmp_path, scheme, EXPERTS_ATTENTION, scale_dtype=half, plain_dtype=half
        )
        weights = read_weights(tmp_path)
        assert_exact(weights, truth)
        assert_in_few_bits(weights, {"attention", "experts"}, "int4")
        experts = weights.tensors["layers.1.experts.gate_up_proj"]
        assert isinstance(experts, QuantizedWeight)
        assert experts.scales.dtype == half
        assert experts.group == 32
        parts = {(p.part, p.storage): p for p in inspect_checkpoint(tmp_path).parts}
        stored = parts["experts", "int4, groups of 32"]
        # 4 bits, 16 of a scale of 32 numbers, and a weight_shape now and then.
        assert 4.5 < stored.bits_per_weight < 4.6
        assert stored.held_bytes == stored.parameters * 4.5 / 8
        assert ("dense MLP", "F16") in parts

    def test_nvfp4_is_off_by_the_reciprocal_alone(self, tmp_path: Path) -> None:
        scheme = compressed_scheme("nvfp4-pack-quantized", **NVFP4)
        truth = write_compressed(tmp_path, scheme, ("experts", "mlp"))
        weights = read_weights(tmp_path)
        assert_in_few_bits(weights, {"dense MLP", "experts"}, "nvfp4")
        assert_summary_agrees(tmp_path, weights)
        stored = load_file(tmp_path / "model.safetensors")
        for layer in range(2):
            weight = weights.tensors[f"layers.{layer}.mlp.up_proj.weight"]
            assert isinstance(weight, QuantizedWeight)
            assert weight.factor is not None
            scale = stored[f"model.decoder.layers.{layer}.mlp.up_proj.weight_global_scale"]
            assert weight.factor == 1 / scale
        # Experts whose gate and up have factors of their own are another test's.
        for name in SHAPES:
            if "gate_up" not in name:
                # Three roundings of float32 here or there.
                torch.testing.assert_close(
                    values(weights.tensors[name]), truth[name], rtol=2**-22, atol=0
                )

    def test_nvfp4_divides_by_a_power_of_two_exactly(self, tmp_path: Path) -> None:
        scheme = compressed_scheme("nvfp4-pack-quantized", **NVFP4)
        plain = split_experts(plain_tensors())
        truth = dict(plain)

        def quantize(module: str, matrix: Tensor) -> Tensors:
            stored = compress(scheme, matrix, torch.bfloat16)
            stored["weight_global_scale"] = torch.tensor([2.0**12])
            truth[f"{module}.weight"] = decompress(scheme, stored)
            return stored | {"input_global_scale": torch.tensor(3.0)}

        written = replaced(plain, EXPERTS_ONLY, quantize)
        config = compressed_config(scheme, kv_cache_scheme={"num_bits": 8})
        write_checkpoint(tmp_path, written, quantization_config=config)
        weights = read_weights(tmp_path)
        assert_exact(weights, joined(truth))
        counted = 2 * EXPERTS * 3
        assert weights.notes[0].startswith("keys and values are not quantized")
        assert weights.notes[1].startswith(f"{counted} scales of activations")
        assert_summary_agrees(tmp_path, weights, ignored=4 * counted)

    def test_two_groups(self, tmp_path: Path) -> None:
        int4, fp8 = (
            compressed_scheme("pack-quantized", **INT4),
            compressed_scheme("float-quantized", **FP8),
        )
        plain = split_experts(plain_tensors())
        truth = dict(plain)

        def quantize(module: str, matrix: Tensor) -> Tensors:
            scheme = fp8 if ".self_attn." in module else int4
            stored = compress(scheme, matrix, torch.bfloat16)
            truth[f"{module}.weight"] = decompress(scheme, stored)
            return stored

        config = compressed_config(int4, format="mixed-precision")
        attention = fp8.model_dump(mode="json", exclude_none=True)
        attention["targets"] = [r"re:.*self_attn\.[qkvo]_proj$"]
        config["config_groups"]["group_1"] = attention | {"input_activations": DYNAMIC}
        write_checkpoint(tmp_path, replaced(plain, LINEAR, quantize), quantization_config=config)
        weights = read_weights(tmp_path)
        assert_exact(weights, joined(truth))
        assert weights.format == "compressed-tensors fp8, int4"
        assert weights.notes == (
            "activations are not quantized, though the checkpoint asks for it",
        )
        kinds = {p.part: p.kind for p in inspect_checkpoint(tmp_path).parts if p.kind}
        assert kinds == {"attention": "fp8", "dense MLP": "int4", "experts": "int4"}


class TestModelOpt:
    def test_number_for_number(self, tmp_path: Path) -> None:
        truth = write_modelopt(tmp_path)
        weights = read_weights(tmp_path)
        assert_exact(weights, truth)
        assert_in_few_bits(weights, {"experts"}, "nvfp4")
        assert weights.format == "ModelOpt nvfp4"
        counted = 2 * EXPERTS * 3
        assert [note[:30] for note in weights.notes] == [
            "activations are not quantized,",
            "keys and values are not quanti",
            f"{counted} scales of activations, whic"[:30],
        ]
        assert_summary_agrees(tmp_path, weights, ignored=4 * counted)

    def test_announced_in_a_file_of_its_own(self, tmp_path: Path) -> None:
        truth = write_modelopt(tmp_path)
        edit_config(tmp_path, lambda config: config.pop("quantization_config"))
        own = {
            "producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16},
        }
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(own))
        assert_exact(read_weights(tmp_path), truth)

    def test_fp8_for_a_whole_weight(self, tmp_path: Path) -> None:
        plain = split_experts(plain_tensors())
        truth = dict(plain)

        def quantize(module: str, matrix: Tensor) -> Tensors:
            scale = matrix.float().abs().max() / 448
            codes = (matrix.float() / scale).to(torch.float8_e4m3fn)
            truth[f"{module}.weight"] = codes.float() * scale
            return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(1.0)}

        config = MODELOPT | {"quant_algo": "FP8"}
        write_checkpoint(tmp_path, replaced(plain, LINEAR, quantize), quantization_config=config)
        weights = read_weights(tmp_path)
        assert_exact(weights, joined(truth))
        assert_in_few_bits(weights, {"attention", "dense MLP", "experts"}, "fp8")

    def test_gate_and_up_may_have_factors_of_their_own(self, tmp_path: Path) -> None:
        def factor_of(module: str) -> float | None:
            if ".1." in module and module.endswith("up_proj"):
                return 1.3e-4
            return None if module.endswith("down_proj") else 1.7e-4

        truth = write_modelopt(tmp_path, factor_of)
        weights = read_weights(tmp_path)
        assert_exact(weights, truth)
        held = [t for n, t in weights.tensors.items() if n.endswith("gate_up_proj")]
        assert all(isinstance(t, QuantizedWeight) and t.row_factor is not None for t in held)
        down = [t for n, t in weights.tensors.items() if n.endswith("experts.down_proj")]
        assert all(isinstance(t, QuantizedWeight) and t.row_factor is None for t in down)


class TestMlx:
    @pytest.mark.parametrize("group", [32, 64])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
    def test_four_bits_and_eight(self, group: int, dtype: torch.dtype, tmp_path: Path) -> None:
        truth = write_mlx(tmp_path, group=group, dtype=dtype)
        weights = read_weights(tmp_path)
        assert_exact(weights, truth)
        assert weights.format == "MLX int4, int8"
        kinds = {
            part_of(name): (t.kind, t.group, t.biases is not None)
            for name, t in weights.tensors.items()
            if isinstance(t, QuantizedWeight)
        }
        assert kinds == {
            "attention": ("int8", group, True),
            "dense MLP": ("int8", group, True),
            "experts": ("int4", group, True),
        }
        assert [note.split(" (")[0] for note in weights.notes] == [
            "1 weights of the embedding",
            "2 weights of the router",
            "3 weights of the self-conditioning",
        ]
        assert_summary_agrees(tmp_path, weights)

    @pytest.mark.parametrize("bits", [2, 3, 5, 6])
    def test_other_widths(self, bits: int, tmp_path: Path) -> None:
        truth = write_mlx(tmp_path, group=64, bits_of=lambda module: bits, bits=bits)
        weights = read_weights(tmp_path)
        assert_exact(weights, truth)
        kind = "int4" if bits < 4 else "int8"
        assert_in_few_bits(weights, {"attention", "dense MLP", "experts"}, kind)
        assert_summary_agrees(tmp_path, weights)

    def test_nvfp4(self, tmp_path: Path) -> None:
        truth = write_mlx(tmp_path, group=16, bits_of=lambda module: 4, mode="nvfp4")
        weights = read_weights(tmp_path)
        assert_exact(weights, truth)
        assert_in_few_bits(weights, {"attention", "dense MLP", "experts"}, "nvfp4")
        assert_summary_agrees(tmp_path, weights)

    def test_gate_and_up_apart(self, tmp_path: Path) -> None:
        truth = write_mlx(tmp_path)

        def split(tensors: Tensors) -> None:
            for name in [name for name in tensors if ".experts.gate_up_proj." in name]:
                block, _, role = name.rpartition("gate_up_proj.")
                gate, up = tensors.pop(name).view(torch.uint8).chunk(2, dim=1)
                whole = torch.uint32 if role == "weight" else torch.bfloat16
                tensors[f"{block}switch_glu.gate_proj.{role}"] = gate.contiguous().view(whole)
                tensors[f"{block}switch_glu.up_proj.{role}"] = up.contiguous().view(whole)

        edit_tensors(tmp_path, split)
        assert_exact(read_weights(tmp_path), truth)


class TestReading:
    def test_every_tensor_is_read_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_modelopt(tmp_path)
        read: Counter[str] = Counter()
        original = Reader.tensor

        def counted(self: Reader, entry: Entry) -> Tensor:
            read[entry.name] += 1
            return original(self, entry)

        monkeypatch.setattr(Reader, "tensor", counted)
        read_weights(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        unread = {name for name in stored if "vision" in name or name.endswith("input_scale")}
        assert read == Counter(stored.keys() - unread)

    def test_plain_experts_one_by_one(self, tmp_path: Path) -> None:
        plain = split_experts(plain_tensors())
        write_checkpoint(tmp_path, plain)
        weights = read_weights(tmp_path)
        assert_exact(weights, joined(plain))
        assert weights.format == "plain"
        assert load_model(tmp_path).layers[1].get_submodule("experts") is not None
        assert_summary_agrees(tmp_path, weights)

    def test_plain_tensors_are_cast_and_rounding_is_noted(self, tmp_path: Path) -> None:
        scheme = compressed_scheme("pack-quantized", **INT4)
        half = torch.float16
        truth = write_compressed(tmp_path, scheme, scale_dtype=half, plain_dtype=half)
        weights = read_weights(tmp_path, dtype=torch.bfloat16)
        plain = {n: t for n, t in weights.tensors.items() if isinstance(t, Tensor)}
        assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
        for name, tensor in plain.items():
            assert torch.equal(tensor, truth[name].bfloat16()), name
        scalars = len(weights.tensors["encoder_scalars"].shape) and 2
        assert weights.notes == (f"{len(plain) - 1 + scalars} F16 tensors are rounded to bfloat16",)
        attention = weights.tensors["layers.0.self_attn.q_proj.weight"]
        assert torch.equal(values(attention), truth["layers.0.self_attn.q_proj.weight"])

    def test_widening_is_no_rounding(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, plain_tensors(torch.bfloat16))
        assert read_weights(tmp_path, dtype=torch.float32).notes == ()
        assert read_weights(tmp_path, dtype=torch.float16).notes != ()

    def test_an_embedding_in_few_bits_is_made_plain_in_blocks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        truth = write_mlx(tmp_path)
        # Blocks of 5 of the 96 rows: the last is shorter.
        monkeypatch.setattr(stacking, "BLOCK_NUMBERS", 5 * 64)
        assert_exact(read_weights(tmp_path), truth)

    def test_a_tied_head_is_compared_in_blocks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = plain_tensors()
        embedding = plain["model.decoder.embed_tokens.weight"]
        write_checkpoint(tmp_path, plain | {"lm_head.weight": embedding.clone()})
        monkeypatch.setattr(loading, "BLOCK_NUMBERS", 5 * 64)
        read_weights(tmp_path)
        other = embedding.clone()
        other[-1, -1] += 1
        write_checkpoint(tmp_path, plain | {"lm_head.weight": other})
        with pytest.raises(CheckpointMismatch, match="lm_head"):
            read_weights(tmp_path)

    def test_training_and_parity_want_plain_tensors(self, tmp_path: Path) -> None:
        write_modelopt(tmp_path)
        with pytest.raises(CheckpointMismatch, match="ModelOpt nvfp4") as caught:
            load_model(tmp_path)
        assert caught.value.remedy == "Use the unquantized checkpoint."


class TestGguf:
    def test_named_or_alone_in_a_folder(self, tmp_path: Path) -> None:
        written = write_gguf(tmp_path, lambda name, shape: Type.F32)
        for source in (tmp_path, written.path):
            weights = read_weights(source)
            assert weights.format == inspect_checkpoint(source).format
            assert weights.config == written.config
            assert torch.equal(
                weights.tensors["norm.weight"], torch.from_numpy(written.numbers["norm.weight"])
            )

    def test_safetensors_go_first(self, tmp_path: Path) -> None:
        write_gguf(tmp_path, lambda name, shape: Type.F32)
        write_checkpoint(tmp_path, plain_tensors())
        assert read_weights(tmp_path).format == "plain"
        assert inspect_checkpoint(tmp_path).format == "plain"

    def test_no_such_file(self, tmp_path: Path) -> None:
        refused(tmp_path / "model.gguf", "model.gguf", kind=CheckpointMissing)


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder: Path, *parts: str, kind: type[ModelError] = CheckpointMismatch) -> None:
    """Both readers refuse it, by name, with a remedy."""
    with pytest.raises(kind) as caught:
        read_weights(folder)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def refused_by_header(folder: Path, *parts: str) -> None:
    refused(folder, *parts)
    with pytest.raises(CheckpointMismatch):
        inspect_checkpoint(folder)


Q = "model.decoder.layers.0.self_attn.q_proj"
GATE = "model.decoder.layers.1.experts.2.gate_proj"


@pytest.fixture
def int4(tmp_path: Path) -> Path:
    write_compressed(tmp_path, compressed_scheme("pack-quantized", **INT4))
    return tmp_path


class TestRefused:
    @pytest.mark.parametrize(
        "method", ["gptq", "awq", "bitsandbytes", "auto-round", "fp8", "torchao", None]
    )
    def test_methods_by_name(self, method: str | None, tmp_path: Path) -> None:
        config = {"quant_method": method, "bits": 4}
        write_checkpoint(tmp_path, plain_tensors(), quantization_config=config)
        refused_by_header(tmp_path, repr(method))
        with pytest.raises(CheckpointMismatch) as caught:
            inspect_checkpoint(tmp_path)
        for supported in ("compressed-tensors", "ModelOpt", "MLX", "GGUF"):
            assert supported in caught.value.remedy

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"transform_config": {"u": 1}}, "rotated"),
            ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
            ({"config_groups": []}, "malformed"),
            ({"config_groups": {"g": {"targets": ["Linear"], "weights": {}}}}, "malformed"),
            ({"config_groups": {}}, "no group"),
        ],
    )
    def test_variants_of_compressed_tensors(
        self, change: dict[str, Any], named: str, int4: Path
    ) -> None:
        edit_config(int4, lambda config: config["quantization_config"].update(change))
        refused_by_header(int4, named)

    @pytest.mark.parametrize(
        "change",
        [
            {"num_bits": 3},
            {"strategy": "block", "block_structure": [128, 128]},
            {"type": "float", "group_size": 32},
        ],
    )
    def test_weights_of_compressed_tensors(self, change: dict[str, Any], int4: Path) -> None:
        edit_config(
            int4,
            lambda config: config["quantization_config"]["config_groups"]["group_0"][
                "weights"
            ].update(change),
        )
        refused_by_header(int4, "pack-quantized")

    def test_variants_of_modelopt(self, tmp_path: Path) -> None:
        write_modelopt(tmp_path)
        for change in ({"quant_algo": "NVFP4_AWQ"}, {"quant_algo": None}, {"group_size": 32}):
            edit_config(tmp_path, lambda c, d=change: c.update(quantization_config=MODELOPT | d))
            refused_by_header(tmp_path, "ModelOpt")

    def test_variants_of_mlx(self, tmp_path: Path) -> None:
        write_mlx(tmp_path)
        edit_config(tmp_path, lambda c: c["quantization_config"].update(mode="mxfp4"))
        refused_by_header(tmp_path, "MLX mxfp4")

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale is missing"),
            (lambda t: t.pop(f"{Q}.weight_packed"), f"{Q}.weight_packed is missing"),
            (
                lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"][:, :1].clone()}),
                f"{Q}.weight_scale is BF16 [128, 1]",
            ),
            (
                lambda t: t.update({f"{Q}.weight_scale": t[f"{Q}.weight_scale"].to(torch.int8)}),
                f"{Q}.weight_scale is I8",
            ),
            (
                lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"][1:].clone()}),
                f"{Q}.weight_packed is I32 [127, 8]",
            ),
            (lambda t: t.update({f"{Q}.weight": torch.ones(128, 64)}), f"{Q}.weight"),
            (
                lambda t: t.update({f"{Q}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}),
                f"{Q}.weight_g_idx",
            ),
            (
                lambda t: [t.pop(name) for name in list(t) if name.startswith(GATE)],
                f"1 tensors are missing: {GATE}",
            ),
            (
                lambda t: t.update({GATE.replace(".2.", ".3.") + ".weight_scale": torch.ones(3)}),
                "experts.3.gate_proj.weight_scale is not part",
            ),
            (
                lambda t: t.update(
                    {"model.decoder.layers.1.experts.gate_up_proj": torch.ones(3, 256, 64)}
                ),
                "another form",
            ),
            (
                lambda t: t.update(
                    {"model.decoder.layers.0.input_layernorm.weight_scale": torch.ones(1)}
                ),
                "input_layernorm.weight_scale is not part",
            ),
            (
                lambda t: t.update({f"{GATE}.weight_scale": t[f"{GATE}.weight_scale"].float()}),
                "stored in two ways",
            ),
        ],
        ids=[
            "no-scale",
            "no-codes",
            "another-group",
            "scale-of-integers",
            "fewer-rows",
            "plain-besides",
            "order-of-activations",
            "no-expert",
            "expert-too-many",
            "all-experts-besides",
            "norm",
            "other-scales-in-the-stack",
        ],
    )
    def test_faults_in_the_header(
        self, change: Callable[[Tensors], Any], named: str, int4: Path
    ) -> None:
        edit_tensors(int4, change)
        refused_by_header(int4, named)

    def test_a_shape_that_is_told_wrong(self, int4: Path) -> None:
        edit_tensors(int4, lambda t: t.update({f"{Q}.weight_shape": torch.tensor([128, 60])}))
        refused(int4, Q, "[128, 60]", "[128, 64]")

    @pytest.mark.parametrize("kept", [0.1, 0.999])
    def test_cut_off(self, kept: float, int4: Path) -> None:
        path = int4 / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
        refused(int4, "cut off", kind=CheckpointMissing)

    def test_groups_that_do_not_divide(self, int4: Path) -> None:
        def use_other_groups(config: dict[str, Any]) -> None:
            group = config["quantization_config"]["config_groups"]["group_0"]
            group["weights"]["group_size"] = 48

        edit_config(int4, use_other_groups)
        refused_by_header(int4, "columns, which do not divide", "groups of 48")

    @pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_factor_that_is_none(self, factor: float, tmp_path: Path) -> None:
        write_modelopt(tmp_path)
        edit_tensors(tmp_path, lambda t: t.update({f"{GATE}.weight_scale_2": torch.tensor(factor)}))
        refused(tmp_path, GATE, "weight_scale_2", "above 0")

    @pytest.mark.parametrize("value", [float("nan"), -1.0])
    def test_scales_of_nvfp4_that_are_none(self, value: float, tmp_path: Path) -> None:
        write_modelopt(tmp_path)

        def spoil(tensors: Tensors) -> None:
            tensors[f"{GATE}.weight_scale"][-1, -1] = value

        edit_tensors(tmp_path, spoil)
        refused(tmp_path, GATE, "scales")

    @pytest.mark.parametrize("name", [Q, GATE])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_scales_that_are_none(self, value: float, name: str, int4: Path) -> None:
        def spoil(tensors: Tensors) -> None:
            tensors[f"{name}.weight_scale"][-1, -1] = value

        edit_tensors(int4, spoil)
        refused(int4, name, "scales")

    def test_biases_that_are_none(self, tmp_path: Path) -> None:
        write_mlx(tmp_path)

        def spoil(tensors: Tensors) -> None:
            tensors[f"{Q}.biases"][0, 0] = torch.inf

        edit_tensors(tmp_path, spoil)
        refused(tmp_path, Q, "scales")

    def test_a_scale_for_activations_that_matters(self, tmp_path: Path) -> None:
        write_modelopt(tmp_path)
        edit_tensors(tmp_path, lambda t: t.update({f"{GATE}.pre_quant_scale": torch.ones(64)}))
        refused_by_header(tmp_path, f"{GATE}.pre_quant_scale")

    def test_mlx_without_biases(self, tmp_path: Path) -> None:
        write_mlx(tmp_path)
        edit_tensors(tmp_path, lambda t: t.pop(f"{Q}.biases"))
        refused_by_header(tmp_path, f"{Q}.biases is missing")

    def test_mlx_without_an_override(self, tmp_path: Path) -> None:
        write_mlx(tmp_path)
        edit_config(tmp_path, lambda config: config["quantization_config"].pop(Q))
        refused_by_header(tmp_path, f"{Q}.weight is U32 [128, 16]", "[128, 8]", "4 bit")

    def test_codes_that_nothing_announces(self, tmp_path: Path) -> None:
        write_modelopt(tmp_path)
        edit_config(tmp_path, lambda config: config.pop("quantization_config"))
        refused_by_header(tmp_path, "model.decoder.layers.")


def test_the_definition_here_is_that_of_nvfp4() -> None:
    codes = torch.tensor([[0x10, 0x7F, 0, 0, 0, 0, 0, 0x80]], dtype=torch.uint8)
    scales = torch.ones(1, 1).to(torch.float8_e4m3fn)
    # The low nibble comes first: 0 and 0.5, then -6 and 6.
    found = from_nvfp4(codes, scales, torch.tensor(2.0))
    assert found[0, :4].tolist() == [0.0, 1.0, -12.0, 12.0]
    assert not found[0, 4:].any()
