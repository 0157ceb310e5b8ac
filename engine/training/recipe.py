"""Sizes and numbers of a training run."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from infilld.engine.config import LayerKind, ModelConfig, Rope
from infilld.engine.errors import RequestError, Unsupported
from infilld.engine.training.examples import ExampleShape

SizeName = Literal["cpu", "gpu"]

# Share of the steps beside the canvas's in which the encoder reads alone.
_READING = 0.2

MINUTES, ADAPTING_MINUTES = 60.0, 10.0
# A prompt shorter than this holds no more than a few lines.
_SHORTEST_ENCODER_TOKENS = 64
# A model that is good already moves by a part of the rate it was trained with.
_ADAPTING_RATE = 1 / 3
_ADAPTING_WARMUP_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `infilld train` is told.

    Attributes:
        sources: folders of Python source; empty: the standard library and the permissively
            licensed packages of this environment.
        base: folder of the model to go on from, with its vocabulary and shapes; None: a new
            model. It needs `sources`.
        out: folder of the finished model.
        state: folder of the corpus, vocabulary and checkpoints, so that a run can go on later;
            None: `out` with `.training` appended.
        minutes: of training, over all resumed runs; the learning rate is fitted to it. None: 60,
            or 10 with a `base`.
        pause_minutes: after which this run stops, all its stages together, with a model of what
            was learned so far; the next one goes on. None: it does not.
        size: "cpu" (about 3 M parameters) or "gpu" (about 20 M). With a `base` only the sizes of
            the batches and the learning rate are taken from it.
        fresh: forget an interrupted run instead of going on with it.
        seed: of initialisation, examples and noise.
        device: as for the daemon.
        items: gaps that are filled to evaluate the model.
        max_steps: ends the run early; for tests.

    Raises:
        RequestError: a number that means nothing.
    """

    sources: tuple[Path, ...] = ()
    base: Path | None = None
    out: Path = Path("starter")
    state: Path | None = None
    minutes: float | None = None
    pause_minutes: float | None = None
    size: SizeName = "cpu"
    fresh: bool = False
    seed: int = 0
    device: str = "auto"
    items: int = 200
    max_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for name in ("minutes", "pause_minutes", "items", "max_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise RequestError(f"{name} is {value}", remedy="Give a number above 0.")

    @property
    def planned_minutes(self) -> float:
        """Minutes of training in all."""
        if self.minutes is not None:
            return self.minutes
        return MINUTES if self.base is None else ADAPTING_MINUTES

    @property
    def state_folder(self) -> Path:
        """Where an interrupted run is kept."""
        return self.state or self.out.with_name(self.out.name + ".training")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run.

    Attributes:
        until: where it ends, as a share of the run's time.
        shapes: example shapes with their share of the steps.
        unrolled: share of the steps that take denoising steps before the pass that is scored.
        encoder_weight: of the causal loss beside the canvas's.
    """

    until: float
    shapes: tuple[tuple[ExampleShape, float], ...]
    unrolled: float = 0.0
    encoder_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One size of model and how it is trained.

    Attributes:
        vocab_tokens … canvas_tokens: shape of the model, as in `ModelConfig`.
        head_size, full_head_size: of sliding and of full layers.
        phases: of the run, in order: copying, then reading, then the canvas on what was read.
        learning_rate: peak. warmup_steps: linear rise.
        decay_share: last part of the run in which the rate falls to 0; the canvas learns later
            than the encoder, and most of what it learns it learns then.
        max_steps: denoising steps the model is sampled with, at most.
    """

    vocab_tokens: int
    width: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    full_head_size: int
    dense_width: int
    experts: int
    expert_width: int
    sliding_window: int = 512
    max_positions: int = 1024
    canvas_tokens: int = 128
    phases: tuple[Phase, ...]
    learning_rate: float
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_share: float = 0.4
    clip_norm: float = 1.0
    max_steps: int = 24

    def model_config(self) -> ModelConfig:
        """The shapes of the model."""
        below: list[LayerKind] = ["sliding"] * (self.layers - 1)
        return ModelConfig(
            vocab_tokens=self.vocab_tokens,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            dense_width=self.dense_width,
            experts=self.experts,
            experts_per_token=2,
            expert_width=self.expert_width,
            sliding_window=self.sliding_window,
            rms_eps=1e-6,
            softcap=30.0,
            canvas_tokens=self.canvas_tokens,
            max_positions=self.max_positions,
            layer_kinds=(*below, "full"),
            key_heads={"sliding": self.key_heads, "full": self.key_heads},
            head_sizes={"sliding": self.head_size, "full": self.full_head_size},
            # Slower than the reference's 1e4: half the pairs compare tokens whatever lies between.
            ropes={"sliding": Rope(1e6, 1.0), "full": Rope(1e6, 0.25)},
            eos_ids=(1,),
            pad_id=0,
            bos_id=2,
        )


def _phases(
    encoder: ExampleShape, canvases: tuple[tuple[ExampleShape, float], ...]
) -> tuple[Phase, ...]:
    """Copying first, then reading; the canvas last, more and more on its own drafts.

    The encoder goes on reading whole words by itself: beside canvases its text is cut too often.
    """
    copying, reading = replace(encoder, repeated=0.75), replace(encoder, repeated=0.04)
    mixed = (
        (reading, _READING),
        *((shape, (1 - _READING) * share) for shape, share in canvases),
    )
    return (
        Phase(until=0.03, shapes=((copying, 1.0),)),
        Phase(until=0.27, shapes=((reading, 1.0),)),
        Phase(until=0.7, shapes=mixed, unrolled=0.25, encoder_weight=0.6),
        Phase(until=1.0, shapes=mixed, unrolled=0.45, encoder_weight=0.4),
    )


RECIPES: dict[SizeName, Recipe] = {
    # For hours on two cores: small, because tokens and not parameters are scarce there.
    "cpu": Recipe(
        vocab_tokens=4096,
        width=192,
        layers=4,
        heads=6,
        key_heads=2,
        head_size=32,
        full_head_size=64,
        dense_width=512,
        experts=4,
        expert_width=64,
        max_positions=640,
        phases=_phases(
            ExampleShape(sequences=6, encoder_tokens=512, canvases=0, gap_tokens=24),
            (
                (
                    ExampleShape(
                        sequences=2, encoder_tokens=512, canvases=32, gap_tokens=16, head_tokens=8
                    ),
                    0.4,
                ),
                (ExampleShape(sequences=2, encoder_tokens=512, canvases=20, gap_tokens=24), 0.35),
                (ExampleShape(sequences=2, encoder_tokens=512, canvases=12, gap_tokens=48), 0.2),
                (ExampleShape(sequences=2, encoder_tokens=512, canvases=7, gap_tokens=96), 0.05),
            ),
        ),
        learning_rate=3e-3,
        # With 8 its canvases were no better on the calibration files.
        max_steps=4,
    ),
    "gpu": Recipe(
        vocab_tokens=8192,
        width=384,
        layers=8,
        heads=6,
        key_heads=2,
        head_size=64,
        full_head_size=64,
        dense_width=1024,
        experts=4,
        expert_width=192,
        phases=_phases(
            ExampleShape(sequences=64, encoder_tokens=640, canvases=0, gap_tokens=24),
            (
                (ExampleShape(sequences=64, encoder_tokens=640, canvases=12, gap_tokens=24), 0.6),
                (ExampleShape(sequences=64, encoder_tokens=640, canvases=7, gap_tokens=48), 0.3),
                (ExampleShape(sequences=64, encoder_tokens=640, canvases=3, gap_tokens=112), 0.1),
            ),
        ),
        learning_rate=1.5e-3,
        warmup_steps=200,
    ),
}


def adapting(recipe: Recipe, config: ModelConfig) -> Recipe:
    """How a trained model goes on with other sources, in steps of the size of a recipe's.

    Args:
        recipe: batches and learning rate come from it. config: of the model that goes on.

    Raises:
        Unsupported: the model reads too little for an example.
    """
    shapes = tuple((_fitted(shape, config), share) for shape, share in recipe.phases[-1].shapes)
    return replace(
        recipe,
        phases=(Phase(until=1.0, shapes=shapes, unrolled=0.4, encoder_weight=1.0),),
        learning_rate=_ADAPTING_RATE * recipe.learning_rate,
        warmup_steps=_ADAPTING_WARMUP_STEPS,
        decay_share=1.0,
    )


def _fitted(shape: ExampleShape, config: ModelConfig) -> ExampleShape:
    """The shape, as far as the model's canvas and positions reach."""
    head_tokens = shape.canvas_tokens - shape.gap_tokens
    gap_tokens = min(shape.gap_tokens, config.canvas_tokens - head_tokens)
    encoder_tokens = min(shape.encoder_tokens, config.max_positions - gap_tokens - head_tokens)
    if gap_tokens < 1 or encoder_tokens < _SHORTEST_ENCODER_TOKENS:
        raise Unsupported(
            f"a canvas of {config.canvas_tokens} and {config.max_positions} positions in all are "
            f"too few to train: expected more than {head_tokens}, and {_SHORTEST_ENCODER_TOKENS} "
            "beside the canvas",
            remedy="Start from the starter model, or from one that `infilld train` made.",
        )
    return replace(
        shape,
        gap_tokens=gap_tokens,
        encoder_tokens=encoder_tokens,
        suffix_tokens=min(shape.suffix_tokens, encoder_tokens // 4),
    )
