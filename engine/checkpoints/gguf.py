"""GGUF files of the architecture `diffusion-gemma`, as llama.cpp's converter writes them.

The converter changes no number but for the quantization: queries and keys are not permuted (their
pairs stand half a head apart, as in the original), and nothing is added to norm weights. By 1 and
1e30 `rope_freqs` says which pairs of a full layer turn. The tokenizer is not read from the file;
it is expected beside it, as tokenizer.json.

Source: ggml-org/llama.cpp, pull request 24423 (conversion of this architecture), and the tensor
names of gguf-py's GEMMA4.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from infilld.engine.checkpoints.gguf_blocks import FORMS, Form, packed, values
from infilld.engine.checkpoints.gguf_file import GgufFile, StoredTensor, Strings, iterate
from infilld.engine.checkpoints.quantizing import is_quantized
from infilld.engine.checkpoints.weights import (
    CheckpointSummary,
    StoredPart,
    Weights,
    expected_shapes,
    part_of,
    tabulate,
)
from infilld.engine.config import ModelConfig, SamplerConfig
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing
from infilld.kernels._weights import CODE_DTYPES, QuantizedWeight

if TYPE_CHECKING:
    from infilld.engine.chat import ChatTemplate

_ARCHITECTURE = "diffusion-gemma"
_GLOBAL = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "self_conditioning.pre_norm.weight": "self_cond_pre_norm.weight",
    "self_conditioning.gate_proj.weight": "self_cond_gate.weight",
    "self_conditioning.up_proj.weight": "self_cond_up.weight",
    "self_conditioning.down_proj.weight": "self_cond_down.weight",
}
_IN_LAYER = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
    "post_feedforward_layernorm_1.weight": "post_ffw_norm_1.weight",
    "pre_feedforward_layernorm_2.weight": "pre_ffw_norm_2.weight",
    "post_feedforward_layernorm_2.weight": "post_ffw_norm_2.weight",
    "layer_scalar": "layer_output_scale.weight",
}
_FUSED, _SEPARATE = "ffn_gate_up_exps.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight")
_ENCODER_SCALAR = "enc_layer_output_scale.weight"
_ROPE_FREQUENCIES, _HEAD = "rope_freqs.weight", "output.weight"
_TEMPLATE_KEYS = ("chat_template", "ggml.tokens")
# A pair divided by this, or by more, does not turn.
_STILL = 1e29
# End a turn in the chat form of the model, beside the end of the text.
_TURN_ENDS = frozenset(("<turn|>", "<|tool_response>"))
_PLAIN: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Numbers decoded at once: bounds what is held beside the file and the result.
_CPU_CHUNK, _GPU_CHUNK = 1 << 22, 1 << 26
_NO_TOKENIZER = "tokenizer.json is not beside the GGUF file"
ScaleType = Literal["float16", "float32"]
_SCALE_TYPES = {"float16": torch.float16, "float32": torch.float32}


def gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder, or the file itself; None where there is none.

    Beside safetensors files it is not meant.

    Raises:
        CheckpointMismatch: several files, of which nobody says which one is meant.
    """
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    if any(folder.glob("*.safetensors*")):
        return None
    found = [path for path in sorted(folder.glob("*.gguf")) if not path.name.startswith("mmproj")]
    if len(found) > 1:
        raise CheckpointMismatch(
            f"{folder} holds {len(found)} GGUF files: {', '.join(path.name for path in found)}",
            remedy="Name the file itself; files split into parts must be merged first.",
        )
    return found[0] if found else None


def read_gguf(
    path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    scales: ScaleType = "float16",
) -> Weights:
    """The weights of a GGUF file; those of attention, dense MLP and experts stay in few bits.

    Everything else is made plain: the head must be, which is the embedding, and the rest is small.

    Args:
        path: of the file.
        device: where the weights go; blocks are decoded there.
        dtype: of plain weights.
        scales: type of scales and biases. float16 rounds those of larger blocks, see `gguf_blocks`;
            float32 is exact, and takes a bit more for each number of a K block: 2 GB in the 26B
            model as Q4_K_M, which needs 20 GB without.

    Raises:
        CheckpointMissing: file or tokenizer is absent, or the file is cut off.
        CheckpointMismatch: another architecture or type, or tensors and metadata disagree.
    """
    file = GgufFile(path)
    if not (path.parent / "tokenizer.json").is_file():
        raise CheckpointMissing(
            f"{path.parent}: {_NO_TOKENIZER}",
            remedy="Copy tokenizer.json of the original model into the folder of the GGUF file.",
        )
    model = _Model(file)
    target, held = torch.device(device), _SCALE_TYPES[scales]
    tensors: dict[str, Tensor | QuantizedWeight] = {}
    for name, sources in model.sources.items():
        parts = [
            _few_bits(file, source, FORMS[source.storage], target, held)
            if model.stays(name)
            else _plain(file, source, target, dtype)
            for source in sources
        ]
        tensors[name] = _joined(name, parts)
    model.refuse_untied(tensors["embed_tokens.weight"], dtype)
    return Weights(
        config=model.config,
        tensors=tensors,
        format=model.format,
        notes=model.notes(held),
    )


def inspect_gguf(path: Path, *, scales: ScaleType = "float16") -> CheckpointSummary:
    """What a GGUF file holds, from its header alone.

    Raises:
        CheckpointMissing, CheckpointMismatch: as `read_gguf`, but for a tokenizer that is absent:
            the notes say so.
    """
    file = GgufFile(path)
    model, held = _Model(file), _SCALE_TYPES[scales]
    lines = [
        StoredPart(
            part=part_of(name),
            storage=source.storage,
            kind=FORMS[source.storage].kind if model.stays(name) else None,
            parameters=math.prod(source.shape),
            stored_bytes=source.nbytes,
            held_bytes=_held_bytes(source, held) if model.stays(name) else None,
        )
        for name, sources in model.sources.items()
        for source in sources
    ]
    notes = model.notes(held)
    if not (path.parent / "tokenizer.json").is_file():
        notes = (*notes, _NO_TOKENIZER)
    return CheckpointSummary(
        config=model.config,
        files=(path,),
        parameters=sum(line.parameters for line in lines),
        text_bytes=sum(line.stored_bytes for line in lines),
        vision_tensors=0,
        dtypes=tuple(sorted({line.storage for line in lines})),
        format=model.format,
        parts=tabulate(lines),
        notes=notes,
    )


def gguf_config(path: Path) -> ModelConfig:
    """Shapes, as the file's metadata says them.

    Raises:
        CheckpointMissing, CheckpointMismatch: as `read_gguf`.
    """
    return _config(GgufFile(path))


def gguf_template(path: Path) -> "ChatTemplate | None":
    """The chat template in the file; None where there is none.

    Raises:
        CheckpointMissing, CheckpointMismatch: the file or the template cannot be read.
    """
    file = GgufFile(path)
    source, tokens = (file.metadata.get(f"tokenizer.{key}") for key in _TEMPLATE_KEYS)
    if not isinstance(source, str):
        return None
    named = {
        f"{name}_token": number
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        for number in _whole_numbers(file, f"tokenizer.ggml.{key}_token_id")
    }
    texts = file.texts(tokens, set(named.values())) if isinstance(tokens, Strings) else {}
    # Loads a library that nothing else here needs.
    from infilld.engine.chat import ChatTemplate

    return ChatTemplate(
        source, {name: texts[number] for name, number in named.items() if number in texts}
    )


def gguf_sampler(path: Path) -> SamplerConfig:
    """How a canvas is denoised, as the file's metadata says it.

    Ends of a text are its end-of-sequence token and the two that end a turn.

    Raises:
        CheckpointMissing, CheckpointMismatch: the file or a value cannot be read.
    """
    file = GgufFile(path)
    told, tokens = file.metadata, file.metadata.get("tokenizer.ggml.tokens")
    ends = set(_whole_numbers(file, "tokenizer.ggml.eos_token_id"))
    if isinstance(tokens, Strings):
        ends |= set(file.places(tokens, _TURN_ENDS).values())
    named = {
        "max_steps": "eb_max_steps",
        "t_min": "eb_t_min",
        "t_max": "eb_t_max",
        "entropy_budget_nats": "eb_entropy_bound",
        "stability_passes": "eb_stability_threshold",
        "mean_entropy_nats": "eb_confidence_threshold",
    }
    given = {
        field: _number(told[f"diffusion.{key}"])
        for field, key in named.items()
        if f"diffusion.{key}" in told
    }
    pad = _whole_numbers(file, "tokenizer.ggml.padding_token_id")
    return SamplerConfig(eos_ids=tuple(sorted(ends)), pad_id=pad[0] if pad else None, **given)


class _Model:
    """The tensors of a file, sorted by what the engine calls them.

    Attributes:
        config: shapes. format: of the file.
        sources: for each internal name the tensors it is made of, to be joined along the rows.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.config = _config(file)
        self._shapes = expected_shapes(self.config)
        self.sources: dict[str, tuple[StoredTensor, ...]] = {}
        left = dict(file.tensors)
        left.pop(_ROPE_FREQUENCIES, None)
        self._head = left.pop(_HEAD, None)
        missing = []
        for name, shape in self._shapes.items():
            names = self._names(name)
            taken = [left.pop(each) for each in names if each in left]
            if len(taken) < len(names):
                missing += [each for each in names if each not in file.tensors]
                continue
            self._refuse_misfit(name, shape, taken)
            self.sources[name] = tuple(taken)
        if missing:
            raise CheckpointMismatch(
                f"{file.path}: {len(missing)} tensors are missing: {', '.join(missing[:3])}",
                remedy="Use a file that was converted from the whole model.",
            )
        if left:
            raise CheckpointMismatch(
                f"{file.path}: tensor {min(left)} is not part of the model its metadata describes"
            )
        sizes: dict[str, int] = {}
        for source in file.tensors.values():
            sizes[source.storage] = sizes.get(source.storage, 0) + math.prod(source.shape)
        self.format = f"GGUF {max(sizes, key=lambda storage: sizes[storage])}"

    def stays(self, name: str) -> bool:
        """Whether a tensor stays in few bits."""
        return (
            is_quantized(name, self._shapes[name]) and self.sources[name][0].storage not in _PLAIN
        )

    def notes(self, held: torch.dtype) -> tuple[str, ...]:
        """What is not exactly what the file says."""
        storages: dict[bool, set[str]] = {True: set(), False: set()}
        for name, sources in self.sources.items():
            storages[self.stays(name)] |= {source.storage for source in sources}
        said = []
        rounded = sorted(each for each in storages[True] if not FORMS[each].is_exact)
        if rounded and held == torch.float16:
            said.append(f"scales of {', '.join(rounded)} rounded to float16, 2^-11 of their size")
        if made_plain := sorted(storages[False] - set(_PLAIN)):
            said.append(f"{', '.join(made_plain)} of embedding and small parts made plain")
        return tuple(said)

    def refuse_untied(self, embedding: Tensor | QuantizedWeight, dtype: torch.dtype) -> None:
        """Raise CheckpointMismatch where the head is another matrix than the embedding."""
        if self._head is None:
            return
        assert isinstance(embedding, Tensor)
        own = _plain(self._file, self._head, embedding.device, dtype)
        if own.shape != embedding.shape or not torch.equal(own, embedding):
            raise CheckpointMismatch(
                f"{self._file.path}: {_HEAD} differs from the embedding; "
                "this engine runs the tied model only"
            )

    def _names(self, name: str) -> tuple[str, ...]:
        """Names in the file; of gate and up projections of the experts as they are there."""
        if name == "encoder_scalars":
            return tuple(f"blk.{i}.{_ENCODER_SCALAR}" for i in range(self.config.layers))
        if name in _GLOBAL:
            return (_GLOBAL[name],)
        _, layer, inside = name.split(".", 2)
        fused = f"blk.{layer}.{_IN_LAYER[inside]}"
        if _IN_LAYER[inside] == _FUSED and fused not in self._file.tensors:
            apart = tuple(f"blk.{layer}.{each}" for each in _SEPARATE)
            if any(each in self._file.tensors for each in apart):
                return apart
        return (fused,)

    def _refuse_misfit(self, name: str, shape: tuple[int, ...], taken: list[StoredTensor]) -> None:
        axis = max(0, len(shape) - 2)
        whole = list(taken[0].shape)
        if len(whole) == len(shape):
            whole[axis] = sum(each.shape[axis] for each in taken if len(each.shape) == len(shape))
        if tuple(whole) != shape:
            raise CheckpointMismatch(
                f"{self._file.path}: {taken[0].name} is {list(taken[0].shape)}, "
                f"the metadata makes {name} {list(shape)}"
            )
        if len({each.storage for each in taken}) > 1 and is_quantized(name, shape):
            raise CheckpointMismatch(
                f"{self._file.path}: {' and '.join(each.name for each in taken)} are stored "
                "differently, and are one weight here"
            )


def _config(file: GgufFile) -> ModelConfig:
    """The configuration that the metadata stands for, checked as config.json is."""
    told = file.metadata
    architecture = told.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise CheckpointMismatch(
            f"{file.path}: architecture is {architecture!r}, expected {_ARCHITECTURE!r}",
            remedy="Use a GGUF of DiffusionGemma.",
        )
    if told.get("split.count", 1) > 1:
        raise CheckpointMismatch(
            f"{file.path} is one of {told['split.count']} parts",
            remedy="Merge the parts with: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    try:
        return ModelConfig.from_dict(_as_config_json(file))
    except KeyError as error:
        raise CheckpointMismatch(f"{file.path} lacks {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointMismatch(f"{file.path}: malformed metadata: {error}") from None
    except CheckpointMismatch as error:
        told_of = str(error).removeprefix("config.json: ")
        raise CheckpointMismatch(f"{file.path}: metadata: {told_of}") from None


def _as_config_json(file: GgufFile) -> dict[str, Any]:
    told = {key.removeprefix(f"{_ARCHITECTURE}."): value for key, value in file.metadata.items()}
    sliding = [bool(each) for each in told["attention.sliding_window_pattern"]]
    layers = int(told["block_count"])
    key_heads = _for_each_layer(told["attention.head_count_kv"], layers)
    sizes = {True: "attention.key_length_swa", False: "attention.key_length"}
    turning = {True: "rope.dimension_count_swa", False: "rope.dimension_count"}
    for is_sliding, key in sizes.items():
        size = told[key]
        for other in (key.replace("key", "value"), turning[is_sliding]):
            if told.get(other, size) != size:
                raise CheckpointMismatch(f"{other} is {told[other]}, {key} is {size}")
    # A file may come without the tensor; the model is known to turn a quarter.
    fraction = _rotary_fraction(file, told[sizes[False]])
    return {
        "model_type": "diffusion_gemma",
        "canvas_length": told["diffusion.canvas_length"],
        "eos_token_id": told["tokenizer.ggml.eos_token_id"],
        "text_config": {
            "vocab_size": file.tensors[_GLOBAL["embed_tokens.weight"]].shape[0],
            "hidden_size": told["embedding_length"],
            "intermediate_size": _for_each_layer(told["feed_forward_length"], layers, one=True)[0],
            "num_hidden_layers": layers,
            "layer_types": ["sliding_attention" if each else "full_attention" for each in sliding],
            "num_attention_heads": _for_each_layer(told["attention.head_count"], layers, one=True)[
                0
            ],
            "num_key_value_heads": _of_kind(key_heads, sliding, is_sliding=True),
            "num_global_key_value_heads": _of_kind(key_heads, sliding, is_sliding=False),
            "head_dim": told[sizes[True]],
            "global_head_dim": told[sizes[False]],
            "rope_parameters": {
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": _number(told["rope.freq_base_swa"]),
                },
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": _number(told["rope.freq_base"]),
                    "partial_rotary_factor": fraction,
                },
            },
            "sliding_window": told["attention.sliding_window"],
            "rms_norm_eps": _number(told["attention.layer_norm_rms_epsilon"]),
            "final_logit_softcapping": _number(told["final_logit_softcapping"]),
            "max_position_embeddings": told["context_length"],
            "num_experts": told["expert_count"],
            "top_k_experts": told["expert_used_count"],
            "moe_intermediate_size": told["expert_feed_forward_length"],
            "bos_token_id": told["tokenizer.ggml.bos_token_id"],
            "eos_token_id": told["tokenizer.ggml.eos_token_id"],
            "pad_token_id": told.get("tokenizer.ggml.padding_token_id", 0),
        },
    }


def _rotary_fraction(file: GgufFile, head_size: int) -> float:
    """Share of a full layer's head that turns."""
    source = file.tensors.get(_ROPE_FREQUENCIES)
    if source is None:
        raise CheckpointMismatch(f"{_ROPE_FREQUENCIES} is missing: nobody says which pairs turn")
    factors = _plain(file, source, torch.device("cpu"), torch.float32).flatten()
    turning = int((factors == 1).sum())
    is_plain = bool((factors[:turning] == 1).all()) and bool((factors[turning:] >= _STILL).all())
    if len(factors) != head_size // 2 or not is_plain:
        raise CheckpointMismatch(
            f"{_ROPE_FREQUENCIES} is not {head_size // 2} numbers, 1 and then 1e30"
        )
    return 2 * turning / head_size


def _for_each_layer(value: Any, layers: int, *, one: bool = False) -> list[int]:
    """A number that is given once or for each layer; with `one` it must be the same."""
    listed = [int(each) for each in value] if isinstance(value, np.ndarray) else [value] * layers
    if len(listed) != layers or (one and len(set(listed)) > 1):
        raise CheckpointMismatch(f"{listed[:6]}... for {layers} layers")
    return listed


def _of_kind(numbers: list[int], sliding: list[bool], *, is_sliding: bool) -> int:
    """The number that all layers of a kind have; of the other kind's where there is none."""
    if len(numbers) != len(sliding):
        raise CheckpointMismatch(f"{len(sliding)} layers in sliding_window_pattern")
    of_kind = {number for number, each in zip(numbers, sliding, strict=True) if each == is_sliding}
    if len(of_kind) > 1:
        raise CheckpointMismatch(f"layers of a kind have {sorted(of_kind)} key heads")
    return min(of_kind) if of_kind else numbers[0]


def _number(value: Any) -> Any:
    """A float as it was meant: 1e-06 is stored in float32, and would come as 9.99999997e-07."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _whole_numbers(file: GgufFile, key: str) -> list[int]:
    value = file.metadata.get(key)
    return [value] if isinstance(value, int) else []


def _chunks(source: StoredTensor, device: torch.device) -> list[tuple[int, int]]:
    numbers = _GPU_CHUNK if device.type == "cuda" else _CPU_CHUNK
    return list(iterate(source.blocks, max(1, numbers // source.block_numbers)))


def _plain(
    file: GgufFile, source: StoredTensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    made = torch.empty(math.prod(source.shape), device=device, dtype=dtype)
    for first, last in _chunks(source, device):
        raw = torch.from_numpy(file.blocks(source, first, last)).to(device)
        kind = _PLAIN.get(source.storage)
        numbers = values(FORMS[source.storage], raw) if kind is None else raw.view(kind)
        size = source.block_numbers
        made[first * size : last * size] = numbers.flatten()
    return made.view(source.shape)


def _few_bits(
    file: GgufFile, source: StoredTensor, form: Form, device: torch.device, held: torch.dtype
) -> QuantizedWeight:
    size, groups = source.block_numbers, source.block_numbers // form.group
    code_bytes = size // 2 if form.kind == "int4" else size
    codes = torch.empty(source.blocks, code_bytes, device=device, dtype=CODE_DTYPES[form.kind])
    scales = torch.empty(source.blocks, groups, device=device, dtype=held)
    biases = torch.empty_like(scales) if form.has_biases else None
    for first, last in _chunks(source, device):
        raw = torch.from_numpy(file.blocks(source, first, last)).to(device)
        code, scale, bias = form.decode(raw)
        codes[first:last] = packed(code) if form.kind == "int4" else code
        scales[first:last] = scale
        if biases is not None and bias is not None:
            biases[first:last] = bias
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointMismatch(f"{file.path}: {source.name} has a scale that is not finite")
    *rows, columns = source.shape
    return QuantizedWeight(
        kind=form.kind,
        codes=codes.view(*rows, -1),
        scales=scales.view(*rows, columns // form.group),
        biases=None if biases is None else biases.view(*rows, columns // form.group),
        group=form.group,
    )


def _held_bytes(source: StoredTensor, held: torch.dtype) -> int:
    form, count = FORMS[source.storage], math.prod(source.shape)
    codes = count // 2 if form.kind == "int4" else count
    return codes + count // form.group * held.itemsize * (2 if form.has_biases else 1)


def _joined(name: str, parts: list[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight:
    """Parts below one another: experts' gate and up projections, encoder scalars."""
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(part, Tensor) for part in parts):
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return torch.cat(tensors, dim=max(0, tensors[0].ndim - 2))
    weights = [part for part in parts if isinstance(part, QuantizedWeight)]
    assert len(weights) == len(parts), name
    together: Mapping[str, Tensor] = {
        key: torch.cat([weight.parts[key] for weight in weights], dim=-2)
        for key in weights[0].parts
    }
    return QuantizedWeight(kind=weights[0].kind, group=weights[0].group, **together)
