"""Weights of no meaning in the shapes of the 26B model, made on the device when they are taken.

Nothing is downloaded, and no more than one weight exists twice: the peak of memory is that of
loading a checkpoint, too.
"""

import math
from collections.abc import Iterator, MutableMapping
from typing import Literal

import torch
from torch import Tensor

from infilld.engine.checkpoints.quantizing import is_quantized
from infilld.engine.checkpoints.weights import (
    CheckpointSummary,
    StoredPart,
    expected_shapes,
    part_of,
    tabulate,
)
from infilld.engine.config import LayerKind, ModelConfig, Rope
from infilld.engine.memory import WeightBytes
from infilld.kernels._weights import NVFP4_GROUP, QuantizedWeight

Form = Literal["int4", "int4-affine", "nvfp4", "plain"]
FORMS: tuple[Form, ...] = ("int4", "int4-affine", "nvfp4", "plain")
GROUP = 32
# Of codes drawn evenly: -8 to 7; 0 to 15 around their middle; the values of E2M1.
_INT4_DEVIATION, _NVFP4_DEVIATION = 4.61, 2.93
# Logits of 262,144 tokens in a spread that leaves some of them likely.
_HEAD_GAIN = 4.0


def config_26b() -> ModelConfig:
    """Shapes of the released 26B model, as several audits of its files give them."""
    kinds: tuple[LayerKind, ...] = ("sliding",) * 5 + ("full",)
    return ModelConfig(
        vocab_tokens=262_144,
        width=2816,
        layers=30,
        heads=16,
        dense_width=2112,
        experts=128,
        experts_per_token=8,
        expert_width=704,
        sliding_window=1024,
        rms_eps=1e-6,
        softcap=30.0,
        canvas_tokens=256,
        max_positions=262_144,
        layer_kinds=kinds * 5,
        key_heads={"sliding": 8, "full": 2},
        head_sizes={"sliding": 256, "full": 512},
        ropes={"sliding": Rope(1e4, 1.0), "full": Rope(1e6, 0.25)},
        eos_ids=(1, 106, 50),
        pad_id=0,
        bos_id=2,
    )


def config_small() -> ModelConfig:
    """The same in small: both kinds of layer, few experts, groups that divide nothing evenly."""
    kinds: tuple[LayerKind, ...] = ("sliding", "full")
    return ModelConfig(
        vocab_tokens=640,
        width=64,
        layers=2,
        heads=4,
        dense_width=96,
        experts=8,
        experts_per_token=2,
        expert_width=32,
        sliding_window=24,
        rms_eps=1e-6,
        softcap=30.0,
        canvas_tokens=32,
        max_positions=1024,
        layer_kinds=kinds,
        key_heads={"sliding": 2, "full": 1},
        head_sizes={"sliding": 16, "full": 32},
        ropes={"sliding": Rope(1e4, 1.0), "full": Rope(1e6, 0.25)},
        eos_ids=(1,),
        pad_id=0,
        bos_id=2,
    )


class RandomWeights(MutableMapping[str, Tensor | QuantizedWeight]):
    """All weights of a model by name; each is made when it is asked for.

    Args:
        config: shapes. form: of what a quantized checkpoint keeps in few bits.
        device: where they are made; "meta" makes shapes alone. seed: of every number.
    """

    def __init__(
        self, config: ModelConfig, form: Form, device: torch.device | str, seed: int = 0
    ) -> None:
        self._form, self._device = form, torch.device(device)
        self._is_meta = self._device.type == "meta"
        self._shapes = expected_shapes(config)
        self._generator = None
        if not self._is_meta:
            self._generator = torch.Generator(self._device).manual_seed(seed)

    def __getitem__(self, name: str) -> Tensor | QuantizedWeight:
        """A weight, made anew."""
        shape = self._shapes[name]
        if self._form != "plain" and is_quantized(name, shape):
            return self._packed(shape)
        return self._plain(name, shape)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a weight; nothing is made."""
        return name in self._shapes

    def __setitem__(self, name: str, value: Tensor | QuantizedWeight) -> None:
        raise TypeError("random weights are only taken")

    def __delitem__(self, name: str) -> None:
        del self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._shapes))

    def __len__(self) -> int:
        return len(self._shapes)

    def _plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        if self._is_meta:
            return made
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # Without a scale of their products queries and keys decide how sharp attention is.
            return made.fill_(shape[-1] ** -0.25)
        if name == "norm.weight":
            return made.fill_(_HEAD_GAIN)
        if len(shape) == 1:
            return made.fill_(1.0)
        if name.endswith("router.proj.weight"):
            return made.normal_(0, 1, generator=self._generator)
        return made.normal_(0, shape[-1] ** -0.5, generator=self._generator)

    def _packed(self, shape: tuple[int, ...]) -> QuantizedWeight:
        *leading, columns = shape
        group = NVFP4_GROUP if self._form == "nvfp4" else math.gcd(GROUP, columns)
        groups = (*leading, columns // group)
        codes = self._bytes((*leading, columns // 2))
        size = columns**-0.5
        if self._form == "nvfp4":
            return QuantizedWeight(
                kind="nvfp4",
                codes=codes,
                scales=self._scales(groups, 1.0).to(torch.float8_e4m3fn),
                factor=torch.full(shape[:-2], size / _NVFP4_DEVIATION, device=self._device),
                group=group,
            )
        scales = self._scales(groups, size / _INT4_DEVIATION)
        return QuantizedWeight(
            kind="int4",
            codes=codes,
            scales=scales,
            biases=scales * -7.5 if self._form == "int4-affine" else None,
            group=group,
        )

    def _bytes(self, shape: tuple[int, ...]) -> Tensor:
        made = torch.empty(shape, dtype=torch.uint8, device=self._device)
        if not self._is_meta:
            made.random_(0, 256, generator=self._generator)
        return made

    def _scales(self, shape: tuple[int, ...], size: float) -> Tensor:
        """Scales between 0.75 and 1.25 of a size."""
        made = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        if not self._is_meta:
            made.uniform_(0.75 * size, 1.25 * size, generator=self._generator)
        return made


def weight_bytes(config: ModelConfig, form: Form) -> WeightBytes:
    """What the memory plan of these weights is made of, as a checkpoint's headers would say it."""
    lines = []
    for name, weight in RandomWeights(config, form, "meta").items():
        is_plain = isinstance(weight, Tensor)
        lines.append(
            StoredPart(
                part=part_of(name),
                storage="BF16" if is_plain else form,
                kind=None if isinstance(weight, Tensor) else weight.kind,
                parameters=math.prod(weight.shape),
                stored_bytes=weight.nbytes,
                held_bytes=None if is_plain else weight.nbytes,
            )
        )
    summary = CheckpointSummary(
        config=config,
        files=(),
        parameters=sum(line.parameters for line in lines),
        text_bytes=sum(line.stored_bytes for line in lines),
        vision_tensors=0,
        dtypes=(),
        format=form,
        parts=tabulate(lines),
    )
    return WeightBytes.of(summary, torch.bfloat16)
