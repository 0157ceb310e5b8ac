"""The model that a run goes on from: whether it will do, and whose run a state folder holds."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infilld.engine.checkpoints.loading import inspect_checkpoint, load_model
from infilld.engine.checkpoints.weights import PLAIN, CheckpointSummary
from infilld.engine.config import ModelConfig, read_json
from infilld.engine.errors import CheckpointMismatch, RequestError, Unsupported
from infilld.engine.model import DiffusionGemma
from infilld.engine.prompt import Controls
from infilld.engine.ranking import CALIBRATION, Calibration
from infilld.engine.tokenizer import Tokenizer
from infilld.engine.training.recipe import TrainOptions

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# Weights, gradients, momentum, average and the copies of a checkpoint are float32 all: some 24
# bytes for each parameter.
_MOST_PARAMETERS = 1_000_000_000
# What `head_loss` can take.
_LARGEST_SOFTCAP = 60.0
_RECORD = "base.json"
_STARTER_REMEDY = "Start from the starter model, or from one that `infilld train` made."


@dataclass(frozen=True)
class Base:
    """A model folder that a run goes on from.

    Attributes:
        folder: of the checkpoint. config: its shapes. sha256: of its tensors' files, together.
    """

    folder: Path
    config: ModelConfig
    sha256: str

    @classmethod
    def of(cls, options: TrainOptions) -> "Base | None":
        """The base of a run; None where it has none.

        Raises:
            RequestError: no folders to learn from, the folder is also where the new model goes,
                or the model cannot be trained.
            ModelError: the folder is no checkpoint that can be read.
        """
        folder = options.base
        if folder is None:
            return None
        if not options.sources:
            raise RequestError(
                "going on from a model needs folders to learn from, none is named",
                remedy="Name the folders of your code: infilld train --from starter FOLDER.",
            )
        if folder.resolve() == options.out.resolve():
            raise RequestError(
                f"{folder} is the model to start from and the folder of the finished model",
                remedy="Choose another folder with --out.",
            )
        found = inspect_checkpoint(folder)
        _refuse_untrainable(folder, found)
        return cls(folder, found.config, _digest(found.files))

    def model(self, device: torch.device) -> DiffusionGemma:
        """The weights, to be trained."""
        return load_model(self.folder, device=device, dtype=torch.float32).requires_grad_(True)

    def generation(self) -> dict[str, Any]:
        """Its generation configuration: the new model is sampled like it."""
        name = "generation_config.json"
        return read_json(self.folder, name) if (self.folder / name).exists() else {}

    def copy_calibration(self, out: Path) -> None:
        """Give its calibration to the new model: too few of a folder's files could fit one."""
        found = Calibration.from_folder(self.folder)
        (out / CALIBRATION).unlink(missing_ok=True)
        if found is not None:
            shutil.copyfile(self.folder / CALIBRATION, out / CALIBRATION)

    def copy_vocabulary(self, state: Path) -> None:
        """Put its tokenizer where a run keeps its own."""
        for name in TOKENIZER_FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, state / name)


def claim(state: Path, base: Base | None, sources: tuple[Path, ...]) -> None:
    """Make sure that a state folder holds this run, or none; note whose it is.

    Raises:
        RequestError: an interrupted run from another model, or on other folders.
    """
    path = state / _RECORD
    wanted = None if base is None else _record(base, sources)
    is_used = any(state.iterdir())
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if is_used and _key(found) != _key(wanted):
        raise RequestError(
            f"{state} holds {_told(found)}, this one is {_told(wanted)}",
            remedy="Choose another state folder with --state, or forget that run with --fresh.",
        )
    if wanted is not None:
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _record(base: Base, sources: tuple[Path, ...]) -> dict[str, Any]:
    return {
        "base": str(base.folder),
        "sha256": base.sha256,
        "sources": [os.path.abspath(source) for source in sources],
    }


def _key(record: dict[str, Any] | None) -> tuple[str, list[str]] | None:
    """What makes a run the same; a model may have moved."""
    return None if record is None else (record["sha256"], record["sources"])


def _told(record: dict[str, Any] | None) -> str:
    if record is None:
        return "a run with a new model"
    return (
        f"a run from {record['base']} ({record['sha256'][:12]}) on {', '.join(record['sources'])}"
    )


def _refuse_untrainable(folder: Path, found: CheckpointSummary) -> None:
    config = found.config
    if found.format != PLAIN:
        raise CheckpointMismatch(
            f"{folder}: a quantized checkpoint ({found.format}), training takes plain tensors",
            remedy="Use the unquantized checkpoint.",
        )
    if found.parameters > _MOST_PARAMETERS:
        raise Unsupported(
            f"{folder} has {found.parameters / 1e9:.1f} B parameters, training takes up to "
            f"{_MOST_PARAMETERS / 1e9:.0f} B",
            remedy=_STARTER_REMEDY,
        )
    tokenizer = Tokenizer.from_folder(folder, config.vocab_tokens)
    if Controls.of(tokenizer) is None:
        raise Unsupported(
            f"{folder} was not trained to infill: its vocabulary has no filler token",
            remedy=_STARTER_REMEDY,
        )
    if config.softcap > _LARGEST_SOFTCAP:
        raise Unsupported(
            f"{folder}: logits are capped at {config.softcap:g}, training takes up to "
            f"{_LARGEST_SOFTCAP:g}",
            remedy=_STARTER_REMEDY,
        )


def _digest(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
