"""From a checkpoint folder to an engine on a device, and the memory back afterwards."""

import gc
from importlib.resources import files
from pathlib import Path

import torch

from infilld.engine.checkpoints.loading import load_model
from infilld.engine.config import ModelConfig, SamplerConfig
from infilld.engine.errors import CheckpointMismatch, NotEnoughMemory, UnsupportedDevice
from infilld.engine.infill import Infiller
from infilld.engine.layout import layout_of
from infilld.engine.prompt import Controls, PromptLayout
from infilld.engine.ranking import Calibration
from infilld.engine.tokenizer import Tokenizer
from infilld.kernels._launch import KernelUnavailable, require_triton


def starter_folder() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("infilld.engine") / "starter"))


def load_infiller(folder: Path, device: str = "auto") -> Infiller:
    """The engine over a checkpoint folder.

    Args:
        folder: checkpoint with tokenizer.json.
        device: as for `Worker`.

    Raises:
        ModelError: the folder or the device will not do.
    """
    chosen = pick_device(device)
    # Before the weights: what cannot be used is refused in a moment, not after minutes.
    tokenizer = Tokenizer.from_folder(folder, ModelConfig.from_folder(folder).vocab_tokens)
    # bfloat16 products are 4 to 5 times as fast as float32 only on CPUs that have them, and a
    # starter-sized model is bound by launches, not products: float32 is exact everywhere.
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    try:
        model = load_model(folder, device=chosen, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"{folder} does not fit on {chosen}: {error}") from None
    if chosen.type == "cuda":
        _refuse_without_kernels(model.config)
    return Infiller(
        model,
        tokenizer,
        SamplerConfig.from_folder(folder),
        calibration=Calibration.from_folder(folder),
        layout=_layout(tokenizer, folder),
    )


def _layout(tokenizer: Tokenizer, folder: Path) -> PromptLayout:
    """The layout of a checkpoint; a template is read, and its library loaded, only if needed."""
    if Controls.of(tokenizer) is not None:
        return layout_of(tokenizer, None)
    from infilld.engine.chat import ChatTemplate

    return layout_of(tokenizer, ChatTemplate.from_folder(folder))


def _refuse_without_kernels(config: ModelConfig) -> None:
    """Say at load, not at the first request, that the GPU's kernels cannot run."""
    try:
        require_triton("accept")
    except KernelUnavailable as error:
        raise UnsupportedDevice(f"CUDA without kernels: {error}") from None
    from infilld.kernels.gpu.accept import LARGEST_CANVAS_TOKENS

    if config.canvas_tokens > LARGEST_CANVAS_TOKENS:
        raise CheckpointMismatch(
            f"config.json: a canvas of {config.canvas_tokens} positions, "
            f"the GPU's kernels take {LARGEST_CANVAS_TOKENS}"
        )


def pick_device(wish: str) -> torch.device:
    """The device a wish stands for.

    Raises:
        UnsupportedDevice: no such device on this machine.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError:
        raise UnsupportedDevice(f"{wish!r} is not a device") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UnsupportedDevice(f"no {device.type} device that torch can use")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UnsupportedDevice(f"{wish}: this machine has {torch.cuda.device_count()}")
    return device


def free_memory() -> None:
    """Give back what was held by an engine that nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        # Does nothing where CUDA was never used.
        torch.cuda.empty_cache()
