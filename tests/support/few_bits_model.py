"""A small random model whose weights are in few bits, and the same with those weights written out.

Run as a script it computes in Triton's interpreter, in a process of its own, and saves what it
found: the whole engine of a GPU, without one.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infilld.engine.checkpoints.quantizing import Quantization, is_quantized, quantize_rows
from infilld.engine.config import ModelConfig, Rope
from infilld.engine.device_runner import DeviceRunner
from infilld.engine.model import DiffusionGemma
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Ask, Bans, Belief, Pins, Reading
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.dequantize import dequantize

CONFIG = ModelConfig(
    vocab_tokens=200,
    width=64,
    layers=2,
    heads=2,
    dense_width=96,
    # All of them for every token: a rounding must not send one elsewhere.
    experts=4,
    experts_per_token=4,
    expert_width=32,
    sliding_window=8,
    rms_eps=1e-6,
    softcap=30.0,
    canvas_tokens=8,
    max_positions=128,
    layer_kinds=("sliding", "full"),
    key_heads={"sliding": 1, "full": 1},
    head_sizes={"sliding": 16, "full": 32},
    ropes={"sliding": Rope(1e4, 1.0), "full": Rope(1e6, 0.25)},
    eos_ids=(1,),
    pad_id=0,
    bos_id=2,
)


def random_tensors(config: ModelConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Plain weights of sensible size, none of them 1 or equal where they may differ."""
    draw = torch.Generator().manual_seed(seed)
    model = DiffusionGemma(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        values = torch.randn(tensor.shape, generator=draw)
        is_matrix = tensor.ndim >= 2
        tensors[name] = values / tensor.shape[-1] ** 0.5 if is_matrix else 1.0 + 0.2 * values
    return tensors


def few_bits(
    quantization: Quantization, config: ModelConfig = CONFIG
) -> tuple[dict[str, Tensor | QuantizedWeight], DiffusionGemma]:
    """The weights in few bits, and the definition of the model with what they stand for."""
    tensors: dict[str, Tensor | QuantizedWeight] = {}
    written_out: dict[str, Tensor] = {}
    for name, tensor in random_tensors(config).items():
        if is_quantized(name, tensor.shape):
            weight = quantize_rows(tensor, quantization)
            tensors[name] = weight
            written_out[name] = dequantize(weight, impl="reference")
        else:
            tensors[name] = written_out[name] = tensor
    model = DiffusionGemma(config)
    model.load_state_dict(written_out)
    return tensors, model.requires_grad_(False).eval()


def walk(model: Any) -> dict[str, Tensor]:
    """What a model makes of a prompt, canvases and texts, every operation once or more."""
    draw = torch.Generator().manual_seed(1)

    def ids(*shape: int) -> Tensor:
        return torch.randint(CONFIG.vocab_tokens, shape, generator=draw)

    found: dict[str, Tensor] = {}
    cache, other = model.new_cache(4), model.new_cache(4)
    found["prompt"] = model.encode(ids(8), cache)
    found["typed"] = model.encode(ids(3), cache)
    model.encode(ids(2), other)
    canvas, short = ids(2, 7), ids(1, 3)
    pins = Pins(mask=torch.rand(2, 7, generator=draw) < 0.4, tokens=ids(2, 7))
    bans = Bans(
        rows=torch.rand(2, CONFIG.vocab_tokens, generator=draw) < 0.3,
        places=torch.randint(2, (7,), generator=draw),
    )
    ask = Ask(temperature=torch.tensor(0.7), pins=pins, banned=bans, top=4, weighed=ids(2, 7))
    plain = Ask(temperature=torch.tensor(1.0), top=4)
    told = CanvasPass(canvas, cache, Belief.of_known(canvas, pins.mask), ask)
    first, second = model.run([told, CanvasPass(short, other, None, plain)])
    for name, reading in (("told", first), ("untold", second)):
        found |= {f"{name}-{key}": tensor for key, tensor in _parts(reading).items()}
    states = model.read([ids(4), ids(1)], cache)
    found["read"] = torch.cat(states)
    found["weighed"] = model.log_probabilities(states[0], ids(4))
    return found


def _parts(reading: Reading) -> dict[str, Tensor]:
    parts = {
        "argmax": reading.argmax,
        "log_probability": reading.log_probability,
        "entropy": reading.entropy_nats,
    }
    if reading.weighed is not None:
        parts["weighed"] = reading.weighed
    assert isinstance(reading.belief, Belief)
    return parts | {"probabilities": reading.belief.probabilities}


def device_runner(quantization: Quantization, impl: Any, device: str = "cpu") -> DeviceRunner:
    """What runs on a GPU; with `impl="gpu"` and no GPU, in the interpreter."""
    return DeviceRunner(
        CONFIG,
        few_bits(quantization)[0],
        device=torch.device(device),
        dtype=torch.float32,
        impl=impl,
        slots=2,
        context_tokens=48,
        margin_tokens=4,
        belief_tokens=4,
    )


def walk_on_gpu(quantization: Quantization, folder: Path) -> dict[str, Tensor]:
    """`walk` over the GPU's kernels: on a GPU where there is one, else interpreted."""
    if torch.cuda.is_available():
        raise NotImplementedError("a GPU walks in tests/gpu")
    answer = folder / "walk.pt"
    subprocess.run(
        [sys.executable, "-P", __file__, quantization.kind, str(quantization.group), str(answer)],
        check=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    found: dict[str, Tensor] = torch.load(answer)
    return found


if __name__ == "__main__":
    kind, group, target = sys.argv[1:]
    runner = device_runner(Quantization(kind=kind, group=int(group)), "gpu")  # type: ignore[arg-type]
    torch.save(walk(runner), target)
