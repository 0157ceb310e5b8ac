"""Sizes and numbers of a training run."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from infilld.engine.config import LayerKind, ModelConfig, Rope
from infilld.engine.training.examples import ExampleShape

SizeName = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What `infilld train` is told.

    Attributes:
        sources: folders of Python source; empty: the standard library and the permissively
            licensed packages of this environment.
        out: folder of the finished model.
        state: folder of the corpus, vocabulary and checkpoints, so that a run can go on later;
            None: `out` with `.training` appended.
        minutes: of training, over all resumed runs; the learning rate is fitted to it.
        size: "cpu" (about 2 M parameters) or "gpu" (about 20 M).
        fresh: forget an interrupted run instead of going on with it.
        seed: of initialisation, examples and noise.
        device: as for the daemon.
        max_steps: ends the run early; for tests.
    """

    sources: tuple[Path, ...] = ()
    out: Path = Path("starter")
    state: Path | None = None
    minutes: float = 60.0
    size: SizeName = "cpu"
    fresh: bool = False
    seed: int = 0
    device: str = "auto"
    max_steps: int | None = None

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
    """Copying first, then reading; the canvas last, more and more on its own drafts."""
    return (
        Phase(until=0.03, shapes=((replace(encoder, repeated=0.75), 1.0),)),
        Phase(until=0.27, shapes=((replace(encoder, repeated=0.04), 1.0),)),
        Phase(until=0.6, shapes=canvases, unrolled=0.25, encoder_weight=0.7),
        Phase(until=1.0, shapes=canvases, unrolled=0.5, encoder_weight=0.5),
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
