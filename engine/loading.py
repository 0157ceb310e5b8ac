"""From a checkpoint folder to an engine on a device, and the memory back afterwards."""

import gc
import logging
import math
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch

from infilld.engine.checkpoints.loading import inspect_checkpoint, read_weights
from infilld.engine.checkpoints.sources import config_of, folder_of, sampler_of, template_of
from infilld.engine.checkpoints.streaming import read_quantized
from infilld.engine.config import ModelConfig
from infilld.engine.device_runner import DeviceRunner
from infilld.engine.errors import CheckpointMismatch, NotEnoughMemory, UnsupportedDevice
from infilld.engine.infill import Infiller
from infilld.engine.layout import layout_of
from infilld.engine.memory import KeyValues, budget_of, free_bytes, refuse_too_large
from infilld.engine.placement import GPU_DTYPE, NO_LIMITS, Limits, place_on_gpu
from infilld.engine.prompt import Controls, PromptLayout
from infilld.engine.ranking import Calibration
from infilld.engine.runner import Runner
from infilld.engine.tokenizer import Tokenizer
from infilld.kernels._launch import KernelUnavailable, require_triton
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.dequantize import dequantize

_CACHE_DTYPES: dict[KeyValues, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
# Of free memory, for weights in few bits that a CPU writes out.
_SHARE_WRITTEN_OUT = 0.5
log = logging.getLogger(__name__)


def starter_folder() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("infilld.engine") / "starter"))


def load_infiller(folder: Path, device: str = "auto", limits: Limits = NO_LIMITS) -> Infiller:
    """The engine over a checkpoint folder.

    Args:
        folder: checkpoint with tokenizer.json, or a GGUF file with one beside it.
        device: as for `Worker`. limits: what may be used of a GPU.

    Raises:
        ModelError: the folder or the device will not do.
    """
    chosen = pick_device(device)
    # Before the weights: what cannot be used is refused in a moment, not after minutes.
    beside = folder_of(folder)
    tokenizer = Tokenizer.from_folder(beside, config_of(folder).vocab_tokens)
    try:
        runner = _on_gpu(folder, chosen, limits) if chosen.type == "cuda" else _on_cpu(folder)
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"{folder} does not fit on {chosen}: {error}") from None
    return Infiller(
        runner,
        tokenizer,
        sampler_of(folder),
        calibration=Calibration.from_folder(beside),
        layout=_layout(tokenizer, folder),
    )


def refuse_unfit(folder: Path, device: str) -> None:
    """Look at all of a checkpoint but its weights, which takes a moment.

    Raises:
        ModelError: as `load_infiller`, as far as that can be told; not whether it fits a GPU,
            which is in use.
    """
    chosen = pick_device(device)
    tokenizer = Tokenizer.from_folder(folder_of(folder), config_of(folder).vocab_tokens)
    summary = inspect_checkpoint(folder)
    sampler_of(folder)
    _layout(tokenizer, folder)
    if chosen.type == "cuda":
        _refuse_without_kernels(summary.config)


def _on_cpu(folder: Path) -> Runner:
    # Weights are laid out for the product that is fastest here without changing it: `PackedWeight`.
    device, dtype = torch.device("cpu"), torch.float32
    weights = read_weights(folder, device=device, dtype=dtype)
    tensors = dict(weights.tensors)
    few_bits = {name: t for name, t in tensors.items() if isinstance(t, QuantizedWeight)}
    written_out = sum(math.prod(weight.shape) * dtype.itemsize for weight in few_bits.values())
    free = free_bytes(device)
    has_room = free is None or written_out < _SHARE_WRITTEN_OUT * free
    if has_room:
        # A CPU has no product of few bits: they would be written out again in every pass.
        for name, weight in few_bits.items():
            tensors[name] = dequantize(weight, impl="reference")
    impl: Literal["cpu", "reference"] = "cpu" if has_room else "reference"
    return Runner(weights.config, tensors, device=device, dtype=dtype, impl=impl)


def _on_gpu(folder: Path, device: torch.device, limits: Limits) -> DeviceRunner:
    use_device(device)
    summary = inspect_checkpoint(folder)
    _refuse_without_kernels(summary.config)
    placement = place_on_gpu(summary, limits, budget_of(device, limits.memory_bytes))
    plan = placement.plan
    log.info("%s\n%s", folder, plan.table())
    refuse_too_large(plan)
    # Into the host's memory: each weight then goes to the device as the tiles it becomes there.
    host = torch.device("cpu")
    if placement.quantization is None:
        weights = read_weights(folder, device=host, dtype=GPU_DTYPE)
    else:
        weights = read_quantized(
            folder,
            placement.quantization,
            device=host,
            dtype=GPU_DTYPE,
            computed_on=device,
            progress=_Told(folder),
        )
    runner = DeviceRunner(
        weights.config,
        dict(weights.tensors),
        device=device,
        dtype=GPU_DTYPE,
        impl="gpu",
        slots=plan.slots,
        context_tokens=plan.context_tokens,
        cache_dtype=_CACHE_DTYPES[plan.key_values],
    )
    del weights
    runner.warm_up()
    return runner


class _Told:
    """Tells the log how far the quantizing of a checkpoint is, a tenth at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._tenths = folder, 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // max(1, total)
        if tenths > self._tenths:
            self._tenths = tenths
            log.info("%s: %d %% quantized", self._folder, 10 * tenths)


def _layout(tokenizer: Tokenizer, folder: Path) -> PromptLayout:
    """The layout of a checkpoint; a template is read, and its library loaded, only if needed."""
    if Controls.of(tokenizer) is not None:
        return layout_of(tokenizer, None)
    return layout_of(tokenizer, template_of(folder))


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


def use_device(device: torch.device) -> None:
    """Make a GPU this thread's own: streams, events and kernels are those of the current one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def free_memory() -> None:
    """Give back what was held by an engine that nobody refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        # Does nothing where CUDA was never used.
        torch.cuda.empty_cache()
