"""What a checkpoint says about itself, and what the sampler is told. Every default stands once."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infilld.engine.errors import CheckpointMismatch, CheckpointMissing

LayerKind = Literal["sliding", "full"]

# Source: transformers 5.23.0, DiffusionGemmaTextConfig. Its writer may leave out what equals these.
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "attention_bias": False,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
}
_AT_LEAST_ONE = (
    "vocab_tokens",
    "width",
    "layers",
    "heads",
    "dense_width",
    "experts",
    "expert_width",
    "sliding_window",
    "canvas_tokens",
    "max_positions",
)
_MOST_LAYERS = 10_000
# What reading a value of the wrong kind raises.
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
_WHICH_FOLDER = "Give the folder of a checkpoint, with all files of it."
_GLOBAL_HEAD_SIZE = 512
_SLIDING_PER_FULL = 5
_ROPE_DEFAULTS: dict[LayerKind, dict[str, Any]] = {
    "sliding": {"rope_type": "default", "rope_theta": 1e4},
    "full": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer.

    Attributes:
        theta: base of the frequencies.
        rotary_fraction: share of the head that turns. The exponent's denominator is the whole
            head size, and pairs are (i, i + head_size / 2) over the whole head ("proportional").
    """

    theta: float
    rotary_fraction: float


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes of one DiffusionGemma text model.

    Attributes:
        vocab_tokens: V. width: D. heads: H. dense_width: hidden size of the dense MLP.
        experts: E. experts_per_token: how many a token is routed to. expert_width: F.
        sliding_window: W; a sliding layer sees a token and the W - 1 before it.
        canvas_tokens: longest canvas, L.
        max_positions: longest prefix plus canvas.
        layer_kinds: per layer; the last is always full.
        key_heads, head_sizes, ropes: per kind of layer.
    """

    vocab_tokens: int
    width: int
    layers: int
    heads: int
    dense_width: int
    experts: int
    experts_per_token: int
    expert_width: int
    sliding_window: int
    rms_eps: float
    softcap: float
    canvas_tokens: int
    max_positions: int
    layer_kinds: tuple[LayerKind, ...]
    key_heads: Mapping[LayerKind, int]
    head_sizes: Mapping[LayerKind, int]
    ropes: Mapping[LayerKind, Rope]
    eos_ids: tuple[int, ...]
    pad_id: int
    bos_id: int

    def __post_init__(self) -> None:
        """Refuse shapes that cannot be run."""
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise CheckpointMismatch(f"config.json: {name} is {getattr(self, name)}")
        for name in ("rms_eps", "softcap"):
            if not 0 < getattr(self, name) < math.inf:
                raise CheckpointMismatch(f"config.json: {name} is {getattr(self, name)}")
        for token in (*self.eos_ids, self.pad_id, self.bos_id):
            if not 0 <= token < self.vocab_tokens:
                raise CheckpointMismatch(
                    f"config.json: token id {token} is outside the {self.vocab_tokens} of "
                    "the vocabulary"
                )
        if not 1 <= self.experts_per_token <= self.experts:
            raise CheckpointMismatch(
                f"config.json: {self.experts_per_token} experts a token, {self.experts} experts"
            )
        for kind in self.kinds:
            if self.key_heads[kind] < 1 or self.head_sizes[kind] < 1:
                raise CheckpointMismatch(
                    f"config.json: {kind} layers have {self.key_heads[kind]} key heads of size "
                    f"{self.head_sizes[kind]}"
                )
            if self.heads % self.key_heads[kind]:
                raise CheckpointMismatch(
                    f"config.json: {self.heads} query heads do not divide into "
                    f"{self.key_heads[kind]} key heads of {kind} layers"
                )
            if self.head_sizes[kind] % 2:
                raise CheckpointMismatch(
                    f"config.json: head size {self.head_sizes[kind]} of {kind} layers is odd"
                )

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Kinds of layer that occur, sorted."""
        return tuple(sorted(set(self.layer_kinds)))

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `config.json`.

        Raises:
            CheckpointMissing: no such folder or file.
            CheckpointMismatch: malformed, or not a DiffusionGemma that this engine can run.
        """
        return cls.from_dict(read_json(folder, "config.json"))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read both dialects of the configuration (per-layer overrides, global head fields)."""
        try:
            return cls._read(config)
        except _MALFORMED as error:
            raise CheckpointMismatch(f"config.json: malformed value: {error!r}") from None

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> "ModelConfig":
        if config.get("model_type") != "diffusion_gemma":
            raise CheckpointMismatch(
                f"config.json: model_type is {config.get('model_type')!r}, "
                "expected 'diffusion_gemma'",
                remedy="Point infilld at a DiffusionGemma checkpoint folder.",
            )
        given = config.get("text_config") or {}
        text = _TEXT_DEFAULTS | {key: value for key, value in given.items() if value is not None}
        _refuse_unsupported(text, config)
        for name in ("num_experts", "top_k_experts", "moe_intermediate_size"):
            if text.get(name) is None:
                raise CheckpointMismatch(f"config.json: text_config.{name} is missing")
        kinds = _layer_kinds(text)
        heads, sizes = _full_layers(text, kinds)
        eos = config.get("eos_token_id", text["eos_token_id"])
        return cls(
            vocab_tokens=_whole(text["vocab_size"]),
            width=_whole(text["hidden_size"]),
            layers=_whole(text["num_hidden_layers"]),
            heads=_whole(text["num_attention_heads"]),
            dense_width=_whole(text["intermediate_size"]),
            experts=_whole(text["num_experts"]),
            experts_per_token=_whole(text["top_k_experts"]),
            expert_width=_whole(text["moe_intermediate_size"]),
            sliding_window=_whole(text["sliding_window"]),
            rms_eps=float(text["rms_norm_eps"]),
            softcap=float(text["final_logit_softcapping"]),
            canvas_tokens=_whole(config.get("canvas_length") or 256),
            max_positions=_whole(text["max_position_embeddings"]),
            layer_kinds=kinds,
            key_heads={"sliding": _whole(text["num_key_value_heads"]), "full": heads},
            head_sizes={"sliding": _whole(text["head_dim"]), "full": sizes},
            ropes={kind: _rope(text, kind) for kind in ("sliding", "full")},
            eos_ids=_ids(eos),
            pad_id=_whole(text["pad_token_id"]),
            bos_id=_whole(text["bos_token_id"]),
        )


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a canvas is denoised. Defaults: Google's generation_config.json of the 26B model.

    Attributes:
        max_steps: N; the temperature schedule is stretched over it: another N, another sampler.
        t_min, t_max: temperature after the last and before the first step.
        entropy_budget_nats: summed entropy of the positions accepted in one step.
        stability_passes: k; stop needs k + 1 passes with equal argmax. None: never stop early.
        mean_entropy_nats: stop also needs a mean entropy below this. None: never stop early.
        eos_ids: any of these ends the text. Empty: nothing does.
        pad_id: replaces what follows an eos. None: nothing is replaced.
        max_new_tokens: default of `generate`.
    """

    max_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    entropy_budget_nats: float = 0.1
    stability_passes: int | None = 1
    mean_entropy_nats: float | None = 0.005
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        """Refuse values that make no schedule."""
        if self.max_steps < 1 or self.max_new_tokens < 1:
            raise CheckpointMismatch(
                f"{self.max_steps=}, {self.max_new_tokens=}: expected 1 or more"
            )
        if self.stability_passes is not None and self.stability_passes < 0:
            raise CheckpointMismatch(f"{self.stability_passes=}: expected 0 or more")
        if not 0 < self.t_min <= self.t_max < math.inf:
            raise CheckpointMismatch(f"{self.t_min=}, {self.t_max=}: expected 0 < t_min <= t_max")
        if not self.entropy_budget_nats >= 0:  # NaN is refused too
            raise CheckpointMismatch(f"{self.entropy_budget_nats=}: expected 0 or more")

    @classmethod
    def from_folder(cls, folder: Path) -> "SamplerConfig":
        """Read `generation_config.json`; eos and pad come from there only, as in `transformers`.

        A file that is absent, or null in a field, leaves the default.
        """
        if not (folder / "generation_config.json").exists():
            return cls()
        found = read_json(folder, "generation_config.json")
        try:
            return cls._read(found)
        except _MALFORMED as error:
            raise CheckpointMismatch(
                f"generation_config.json: malformed value: {error!r}"
            ) from None

    @classmethod
    def _read(cls, found: Mapping[str, Any]) -> "SamplerConfig":
        sampler = found.get("sampler_config") or {}
        rule = sampler.get("_cls_name", "EntropyBoundSamplerConfig")
        if rule != "EntropyBoundSamplerConfig":
            raise CheckpointMismatch(
                f"generation_config.json: sampler {rule!r} is unknown, "
                "expected 'EntropyBoundSamplerConfig'"
            )
        named: dict[str, tuple[Callable[[Any], Any], Any]] = {
            "max_steps": (_whole, found.get("max_denoising_steps")),
            "t_min": (float, found.get("t_min")),
            "t_max": (float, found.get("t_max")),
            "entropy_budget_nats": (float, sampler.get("entropy_bound")),
            "stability_passes": (_whole, found.get("stability_threshold")),
            "mean_entropy_nats": (float, found.get("confidence_threshold")),
            "max_new_tokens": (_whole, found.get("max_new_tokens")),
            "pad_id": (_whole, found.get("pad_token_id")),
        }
        present: dict[str, Any] = {
            key: kind(value) for key, (kind, value) in named.items() if value is not None
        }
        return cls(eos_ids=_ids(found.get("eos_token_id")), **present)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in `folder/name`.

    Raises:
        CheckpointMissing: no such folder or file.
        CheckpointMismatch: not JSON, or not an object.
    """
    path = folder / name
    if not folder.is_dir():
        raise CheckpointMissing(f"no model folder at {folder}", remedy=_WHICH_FOLDER)
    if not path.is_file():
        raise CheckpointMissing(f"{folder} holds no {name}", remedy=_WHICH_FOLDER)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointMismatch(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointMismatch(f"{path} holds {type(content).__name__}, expected an object")
    return content


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(_whole(v) for v in value) if isinstance(value, list) else (_whole(value),)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is not a whole number")
    if abs(value) >= 2**31:
        raise ValueError(f"{value} is too large")
    return value


def _refuse_unsupported(text: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    expected = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "use_bidirectional_attention": (None, "vision"),
    }
    for name, allowed in expected.items():
        if text.get(name) not in allowed:
            raise CheckpointMismatch(
                f"config.json: text_config.{name} is {text.get(name)!r}, expected {allowed[0]!r}"
            )
    if not config.get("tie_word_embeddings", True):
        raise CheckpointMismatch(
            "config.json: tie_word_embeddings is false; this engine runs the tied model only"
        )


def _layer_kinds(text: Mapping[str, Any]) -> tuple[LayerKind, ...]:
    layers = _whole(text["num_hidden_layers"])
    if not 1 <= layers <= _MOST_LAYERS:
        raise CheckpointMismatch(f"config.json: num_hidden_layers is {layers}")
    named = text.get("layer_types")
    if named is None:
        period = _SLIDING_PER_FULL + 1
        kinds: list[LayerKind] = ["sliding" if (i + 1) % period else "full" for i in range(layers)]
    else:
        if len(named) != layers:
            raise CheckpointMismatch(f"config.json: {len(named)} layer_types for {layers} layers")
        if unknown := set(named) - {"sliding_attention", "full_attention"}:
            raise CheckpointMismatch(f"config.json: unknown layer_types {sorted(unknown)}")
        kinds = ["full" if name == "full_attention" else "sliding" for name in named]
    # The reference forces this too: the last layer must see the whole prefix.
    kinds[-1] = "full"
    return tuple(kinds)


def _full_layers(text: Mapping[str, Any], kinds: tuple[LayerKind, ...]) -> tuple[int, int]:
    """Key heads and head size of full layers, from whichever dialect says so."""
    heads, size = text["num_key_value_heads"], _GLOBAL_HEAD_SIZE
    dialects: list[tuple[int, int]] = []
    own_heads, own_size = text.get("num_global_key_value_heads"), text.get("global_head_dim")
    if own_heads is not None or own_size is not None:
        dialects.append(
            (
                _whole(heads if own_heads is None else own_heads),
                _whole(size if own_size is None else own_size),
            )
        )
    overrides = text.get("per_layer_config")
    if overrides is not None:
        # With ten layers or more the reference pads the numbers: "05".
        overrides = {int(key): values for key, values in overrides.items()}
        full = {i for i, kind in enumerate(kinds) if kind == "full"}
        if extra := set(overrides) - full:
            raise CheckpointMismatch(
                f"config.json: per_layer_config overrides sliding layers {sorted(extra)}"
            )
        found = {
            (
                _whole(overrides.get(i, {}).get("num_key_value_heads", heads)),
                _whole(overrides.get(i, {}).get("head_dim", text["head_dim"])),
            )
            for i in full
        }
        if len(found) > 1:
            raise CheckpointMismatch(f"config.json: full layers differ in shape: {sorted(found)}")
        dialects += found
    if len(set(dialects)) > 1:
        raise CheckpointMismatch(
            "config.json: global_head_dim / num_global_key_value_heads say "
            f"(key heads, head size) {dialects[0]}, per_layer_config says {dialects[1]}"
        )
    return dialects[0] if dialects else (_whole(heads), size)


def _rope(text: Mapping[str, Any], kind: LayerKind) -> Rope:
    named = (text.get("rope_parameters") or {}).get(f"{kind}_attention") or _ROPE_DEFAULTS[kind]
    style = named.get("rope_type", "default")
    fraction = float(named.get("partial_rotary_factor", 1.0))
    if style not in ("default", "proportional") or (style == "default" and fraction != 1.0):
        raise CheckpointMismatch(
            f"config.json: rotary embedding {style!r} with fraction {fraction} is not supported"
        )
    return Rope(theta=float(named["rope_theta"]), rotary_fraction=fraction)
