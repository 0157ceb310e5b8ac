"""The training loop: steps, a schedule fitted to the clock, checkpoints, going on after a stop."""

import copy
import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from infilld.engine.errors import ModelError, RequestError
from infilld.engine.model import DiffusionGemma
from infilld.engine.training.batches import Batches
from infilld.engine.training.joint import Losses
from infilld.engine.training.muon import optimizers_of
from infilld.engine.training.recipe import Phase, Recipe
from infilld.engine.training.report import to_json
from infilld.engine.training.side_by_side import SideBySide

CHECKPOINT = "checkpoint.pt"
_CHECKPOINT_S = 180.0
_REPORT_S = 15.0
_SMOOTHING = 0.98
_AVERAGE_DECAY = 0.995


@dataclass
class Progress:
    """How far a run is; kept in its checkpoint.

    Attributes:
        steps: done. elapsed_s: spent in steps, over all runs.
        encoder_tokens, canvas_tokens: seen.
        encoder_nats, gap_nats: smoothed losses.
        history: `(elapsed_s, encoder_nats, gap_nats)` at every report.
    """

    steps: int = 0
    elapsed_s: float = 0.0
    encoder_tokens: int = 0
    canvas_tokens: int = 0
    encoder_nats: float = math.nan
    gap_nats: float = math.nan
    history: list[list[float]] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Encoder tokens a second."""
        return self.encoder_tokens / self.elapsed_s if self.steps else 0.0

    @property
    def losses(self) -> str:
        """The losses for people; "-" where nothing was scored yet."""
        shown = ("-" if math.isnan(n) else f"{n:.3f}" for n in (self.encoder_nats, self.gap_nats))
        return "encoder {}  gap {} nats".format(*shown)

    def observe(self, losses: Losses, seconds: float, encoder: int, canvas: int) -> None:
        """Count one step."""
        self.steps += 1
        self.elapsed_s += seconds
        self.encoder_tokens += encoder
        self.canvas_tokens += canvas
        for name in ("encoder", "gap"):
            if (loss := getattr(losses, name)) is None:
                continue
            found, key = float(loss), f"{name}_nats"
            if not math.isfinite(found):
                raise ModelError(
                    f"step {self.steps}: the {name} loss is {found}",
                    remedy="Train again with a lower learning rate, or another seed.",
                )
            old = getattr(self, key)
            smooth = found if math.isnan(old) else _SMOOTHING * old + (1 - _SMOOTHING) * found
            setattr(self, key, smooth)


class Trainer:
    """Trains a model until its minutes are spent.

    Args:
        model: initialised, on its device. recipe: numbers. batches: to train on.
        state: folder of the checkpoint. minutes: over all runs. seed: of noise.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        recipe: Recipe,
        batches: Batches,
        state: Path,
        *,
        minutes: float,
        seed: int,
    ) -> None:
        self.model, self.recipe, self.batches = model.train(), recipe, batches
        self.state, self.limit_s = state, 60 * minutes
        self.progress = Progress()
        self._seed = seed
        self._parts = SideBySide(model)
        self.average = {name: tensor.clone() for name, tensor in _parameters(model)}
        self._optimizers = optimizers_of(model, recipe.learning_rate, recipe.weight_decay)

    def resume(self) -> bool:
        """Go on from the checkpoint of the state folder; False when there is none.

        Raises:
            RequestError: it belongs to a model of another shape.
        """
        path = self.state / CHECKPOINT
        if not path.exists():
            return False
        saved = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tensor.shape for name, tensor in saved["model"].items()}
        if shapes != {name: tensor.shape for name, tensor in self.model.state_dict().items()}:
            raise RequestError(
                f"{path} is the checkpoint of a model of another shape",
                remedy="Choose another state folder with --state, or forget it with --fresh.",
            )
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name, tensor in self.average.items():
            tensor.copy_(saved["average"][name])
        self.progress = Progress(**saved["progress"])
        return True

    def save(self) -> None:
        """Write the checkpoint; an interruption leaves the old one whole."""
        path = self.state / CHECKPOINT
        fresh = path.with_suffix(".new")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
                "average": self.average,
                "progress": asdict(self.progress),
            },
            fresh,
        )
        os.replace(fresh, path)
        told = to_json(asdict(self.progress), indent=None)
        (self.state / "progress.json").write_text(told, encoding="utf-8")

    def averaged(self) -> DiffusionGemma:
        """A copy of the model with the averaged weights: better than the last ones."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average, strict=False)
        return model.eval()

    def run(
        self,
        report: Callable[[Progress], None],
        *,
        show: Callable[[Progress], None] = lambda progress: None,
        max_steps: int | None = None,
        pause_at: float = math.inf,
    ) -> Progress:
        """Train until the minutes are spent; an interrupt saves and is raised again.

        Args:
            report: called every quarter of a minute and at the end. show: called after every step.
            max_steps: ends the run early.
            pause_at: `time.monotonic()` reading at which it ends early too.
        """
        saved = reported = now = time.monotonic()
        try:
            while not self.is_done and now < pause_at:
                if max_steps is not None and self.progress.steps >= max_steps:
                    break
                self.step()
                show(self.progress)
                now = time.monotonic()
                if now - reported >= _REPORT_S:
                    reported = now
                    self._note()
                    report(self.progress)
                if now - saved >= _CHECKPOINT_S:
                    saved = now
                    self.save()
        finally:
            self.save()
        self._note()
        report(self.progress)
        return self.progress

    @property
    def is_done(self) -> bool:
        """Whether the minutes are spent."""
        return self.progress.elapsed_s >= self.limit_s

    def step(self) -> Losses:
        """One optimiser step on one batch."""
        started = time.monotonic()
        phase = self.phase()
        batch = self.batches.take(self.progress.steps, phase.shapes).to(self.model.device)
        rate = self.recipe.learning_rate * self.rate_share()
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        rng = random.Random(f"{self._seed}/{self.progress.steps}/noise")
        losses = self._parts.losses(
            batch,
            seed=rng.getrandbits(48),
            unrolled_steps=_unrolled_steps(phase, rng.random()),
            encoder_weight=phase.encoder_weight,
        )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._follow()
        seconds = time.monotonic() - started
        canvas = int(batch.gap.sum())
        self.progress.observe(losses, seconds, batch.encoder.numel(), canvas)
        return losses

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average; a young one moves faster."""
        share = max(1 - _AVERAGE_DECAY, 1 / (1 + 0.1 * self.progress.steps))
        torch._foreach_lerp_(
            list(self.average.values()), [p.data for _, p in _parameters(self.model)], share
        )

    def rate_share(self) -> float:
        """Share of the peak learning rate now: rise, hold, then fall to 0 by the clock."""
        rise = min(1.0, (self.progress.steps + 1) / self.recipe.warmup_steps)
        left = 1.0 - self.progress.elapsed_s / self.limit_s
        return rise * max(0.0, min(1.0, left / self.recipe.decay_share))

    def phase(self) -> Phase:
        """The phase the run is in, by the clock."""
        done = self.progress.elapsed_s / self.limit_s
        phases = self.recipe.phases
        return next((phase for phase in phases if done < phase.until), phases[-1])

    def _note(self) -> None:
        p = self.progress
        p.history.append([p.elapsed_s, p.encoder_nats, p.gap_nats])


def _unrolled_steps(phase: Phase, chance: float) -> int:
    """None, one or two denoising steps before the pass that is scored."""
    share = phase.unrolled
    return 0 if chance >= share else 2 if chance < 0.3 * share else 1


def _parameters(model: DiffusionGemma) -> list[tuple[str, Tensor]]:
    return [(name, parameter.data) for name, parameter in model.named_parameters()]
