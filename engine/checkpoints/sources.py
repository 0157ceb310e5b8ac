"""What of a checkpoint is no weight, for folders and for GGUF files."""

from pathlib import Path
from typing import TYPE_CHECKING

from infilld.engine.checkpoints.files import refuse_pickles
from infilld.engine.checkpoints.gguf import gguf_config, gguf_in, gguf_sampler, gguf_template
from infilld.engine.config import ModelConfig, SamplerConfig

if TYPE_CHECKING:
    from infilld.engine.chat import ChatTemplate


def folder_of(source: Path) -> Path:
    """The folder where tokenizer.json and what else is no weight is expected."""
    return source.parent if source.is_file() else source


def config_of(source: Path) -> ModelConfig:
    """Shapes, from config.json or from a GGUF file's metadata.

    Raises:
        CheckpointMissing, CheckpointMismatch: they cannot be read, or the weights are pickled.
    """
    path = gguf_in(source)
    if path is None:
        refuse_pickles(source)
    return ModelConfig.from_folder(source) if path is None else gguf_config(path)


def sampler_of(source: Path) -> SamplerConfig:
    """How a canvas is denoised; generation_config.json wins over a GGUF file's metadata.

    Raises:
        CheckpointMissing, CheckpointMismatch: it cannot be read.
    """
    path, folder = gguf_in(source), folder_of(source)
    if path is None or (folder / "generation_config.json").exists():
        return SamplerConfig.from_folder(folder)
    return gguf_sampler(path)


def template_of(source: Path) -> "ChatTemplate | None":
    """The chat template; a file in the folder wins over a GGUF file's metadata.

    Raises:
        CheckpointMissing, CheckpointMismatch: it cannot be read.
    """
    # Loads a library that nothing else here needs.
    from infilld.engine.chat import ChatTemplate

    path, found = gguf_in(source), ChatTemplate.from_folder(folder_of(source))
    return gguf_template(path) if found is None and path is not None else found
