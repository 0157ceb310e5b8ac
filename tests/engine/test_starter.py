"""The model that ships inside the package: whole, small, described, and able to fill a gap."""

import json
from pathlib import Path

import pytest
import torch

from infilld.engine import loading
from infilld.engine.checkpoints.loading import inspect_checkpoint
from infilld.engine.checkpoints.quantizing import Quantization
from infilld.engine.checkpoints.streaming import quantize_folder
from infilld.engine.config import ModelConfig, SamplerConfig
from infilld.engine.infill import Infiller
from infilld.engine.request import InfillRequest, Span
from infilld.engine.training.corpus import HELD_OUT
from infilld.engine.worker import load_infiller, starter_folder

STARTER = starter_folder()
TEXT = "import os\n\n\ndef size_of(path):\n    return os.path.\n\n\nprint(size_of('a'))\n"
GAP = TEXT.index("path.\n") + len("path.")


@pytest.fixture(scope="module")
def starter() -> Infiller:
    return load_infiller(STARTER, "cpu")


def fill(engine: Infiller, seed: int) -> str:
    request = InfillRequest(text=TEXT, spans=(Span(GAP, GAP),), seed=seed)
    result = engine.infill(request)
    return result.alternatives[0].spans[0].text if result.alternatives else ""


def test_it_is_small_and_complete() -> None:
    found = inspect_checkpoint(STARTER)
    assert found.dtypes == ("BF16",)
    assert found.vision_tensors == 16
    assert sum(path.stat().st_size for path in STARTER.iterdir() if path.is_file()) < 40e6


def test_its_settings_are_filled_in() -> None:
    config, sampler = ModelConfig.from_folder(STARTER), SamplerConfig.from_folder(STARTER)
    assert sampler.eos_ids == config.eos_ids == (1,)
    assert sampler.pad_id == config.pad_id == 0
    assert config.bos_id == 2
    assert config.canvas_tokens >= 64 + 16


def test_it_fills_a_gap_the_same_way_twice(starter: Infiller) -> None:
    first = fill(starter, seed=5)
    assert first == fill(starter, seed=5)
    assert "\0" not in first
    assert "<|" not in first


def test_its_card_says_what_was_measured_and_what_was_held_out() -> None:
    card = (STARTER / "MODEL_CARD.md").read_text(encoding="utf-8")
    report = json.loads((STARTER / "evaluation.json").read_text(encoding="utf-8"))
    assert f"{report['encoder_nats']:.3f} nats" in card
    assert f"{100 * report['rest_of_line']['canvas']['exact_match']:.1f} %" in card
    held_out = card.partition("### Held out")[2]
    assert all(f"/{name} |" in held_out for name in HELD_OUT)


def test_in_few_bits_it_is_written_out_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU multiplies plain weights; without room for them it takes more time, not more memory."""
    quantize_folder(STARTER, tmp_path / "int8", Quantization(kind="int8", group=16))
    roomy = load_infiller(tmp_path / "int8", "cpu")
    monkeypatch.setattr(loading, "free_bytes", lambda device: 1_000_000)
    tight = load_infiller(tmp_path / "int8", "cpu")
    assert tight.model.nbytes < 0.6 * roomy.model.nbytes
    prompt = torch.arange(20)
    states = [each.model.encode(prompt, each.model.new_cache()) for each in (roomy, tight)]
    torch.testing.assert_close(states[0], states[1], atol=1e-3, rtol=1e-3)
    text = "def area(w, h):\n    return w * h\n\n\ndef volume(w, h, d):\n    return \n"
    end = len(text) - 1
    request = InfillRequest(text=text, spans=(Span(end, end),), seed=5, boldness=1.0)
    texts = [each.infill(request).alternatives[0].spans[0].text for each in (roomy, tight)]
    assert texts[0] == texts[1]
