"""Weights in few bits give what the weights they stand for give, through the whole engine."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from few_bits import random_weight
from few_bits_model import CONFIG, device_runner, few_bits, walk, walk_on_gpu
from torch import Tensor

from infilld.engine.checkpoints.quantizing import Quantization
from infilld.engine.runner import Runner
from infilld.engine.stack import joined_rows
from infilld.kernels._weights import QuantizedWeight
from infilld.kernels.dequantize import dequantize

INT4 = Quantization(kind="int4", group=32)
INT8 = Quantization(kind="int8", group=16)
KINDS = pytest.mark.parametrize("quantization", [INT4, INT8], ids=["int4", "int8"])
CLOSE: dict[str, Any] = {"atol": 2e-4, "rtol": 2e-4}


def expected(quantization: Quantization) -> dict[str, Tensor]:
    """What the definition says, its beliefs cut to as many tokens."""
    model = few_bits(quantization)[1]
    return walk(model)


def alike(found: dict[str, Tensor], truth: dict[str, Tensor], **close: Any) -> None:
    assert found.keys() == truth.keys()
    for name, values in found.items():
        if values.dtype == torch.int64:
            assert torch.equal(values, truth[name]), name
        else:
            said = partial(str.format, f"{name}: {{}}")
            torch.testing.assert_close(values, truth[name], msg=said, **close)


@KINDS
def test_on_a_cpu(quantization: Quantization) -> None:
    runner = Runner(
        CONFIG,
        few_bits(quantization)[0],
        device=torch.device("cpu"),
        dtype=torch.float32,
        impl="reference",
        belief_tokens=4,
    )
    alike(walk(runner), expected(quantization), **CLOSE)
    written_out = few_bits(quantization)[1]
    assert runner.parameter_count == written_out.parameter_count + 2 * CONFIG.layers
    assert runner.nbytes < 0.75 * written_out.nbytes


@KINDS
def test_in_slots_and_buckets(quantization: Quantization) -> None:
    alike(walk(device_runner(quantization, "reference")), expected(quantization), **CLOSE)


@pytest.mark.slow
def test_over_the_kernels_of_a_gpu(tmp_path: Path) -> None:
    """Every kernel of a pass, in Triton's interpreter, against the definition."""
    if torch.cuda.is_available():
        pytest.skip("on a GPU, tests/gpu does this")
    found, truth = walk_on_gpu(INT4, tmp_path), expected(INT4)
    # The kernels' products are of weights rounded to bfloat16, which may decide between two tokens
    # that are about as probable: their probabilities agree.
    floats = [name for name, values in truth.items() if values.dtype != torch.int64]
    close = {"atol": 0.05, "rtol": 0.05}
    alike({name: found[name] for name in floats}, {name: truth[name] for name in floats}, **close)
    same = torch.cat([(found[n] == truth[n]).flatten() for n in truth if n not in floats])
    assert same.float().mean() > 0.9


def test_what_differs_in_form_is_not_joined() -> None:
    tensors, _ = few_bits(INT4)
    eight, _ = few_bits(INT8)
    name = "layers.0.self_attn.{}_proj.weight"
    q, k = tensors[name.format("q")], tensors[name.format("k")]
    assert isinstance(q, QuantizedWeight)
    (joined,) = joined_rows([q, k])
    assert joined.shape[0] == q.shape[0] + k.shape[0]
    apart = joined_rows([q, eight[name.format("k")]])
    assert len(apart) == 2
    assert len(joined_rows([q, torch.zeros(4, CONFIG.width)])) == 2


def test_rows_keep_the_factors_of_their_weights() -> None:
    parts = [random_weight((rows, 32), kind="nvfp4", group=16, seed=rows) for rows in (3, 5)]
    (joined,) = joined_rows(parts)
    assert isinstance(joined, QuantizedWeight)
    assert joined.row_factor is not None
    expected = torch.cat([dequantize(part, impl="reference") for part in parts])
    assert torch.equal(dequantize(joined, impl="reference"), expected)
