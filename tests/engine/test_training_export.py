"""What we export is a DiffusionGemma checkpoint, to us and to `transformers`."""

import logging
from pathlib import Path

import pytest
import torch
from tiny_infill import tiny_config, tiny_model
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.utils import logging as transformers_logging

from infilld.engine.checkpoints.loading import inspect_checkpoint, load_model
from infilld.engine.config import SamplerConfig
from infilld.engine.tokenizer import Tokenizer
from infilld.engine.training.export import export_model
from infilld.engine.training.vocabulary import CONTROLS, save_vocabulary, train_vocabulary
from infilld.engine.worker import starter_folder

STARTER = starter_folder()


def reference_logits(folder: Path, prefix: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, dtype=torch.float32).eval()
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        first = model(input_ids=prefix[None], decoder_input_ids=canvas[None], past_key_values=cache)
        second = model(
            decoder_input_ids=canvas[None],
            past_key_values=first.past_key_values,
            self_conditioning_logits=first.logits,
        )
    return torch.cat((first.logits, second.logits))


def our_logits(folder: Path, prefix: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    model = load_model(folder)
    cache = model.new_cache()
    model.encode(prefix, cache)
    first = model.denoise(canvas[None], cache, None)
    return torch.cat((first, model.denoise(canvas[None], cache, first)))


def assert_silent_and_equal(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    transformers_logging.enable_propagation()
    vocab = load_model(folder).config.vocab_tokens
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(vocab, (50,), generator=generator)
    canvas = torch.randint(vocab, (40,), generator=generator)
    with caplog.at_level(logging.INFO, logger="transformers"):
        theirs = reference_logits(folder, prefix, canvas)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert not said, said
    ours = our_logits(folder, prefix, canvas)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_an_exported_random_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(tiny_config(vocab_tokens=300))
    export_model(model, tmp_path)
    assert_silent_and_equal(tmp_path, caplog)
    assert load_model(tmp_path).config == model.config
    sampler = SamplerConfig.from_folder(tmp_path)
    assert sampler.eos_ids == (1,)
    assert sampler.pad_id == 0
    assert inspect_checkpoint(tmp_path).vision_tensors == 16


@pytest.mark.skipif(not (STARTER / "model.safetensors").exists(), reason="no starter model yet")
def test_the_shipped_starter(caplog: pytest.LogCaptureFixture) -> None:
    assert_silent_and_equal(STARTER, caplog)
    assert (STARTER / "model.safetensors").stat().st_size < 40e6
    text = "def f(x):\n    return x + 1  # é\U0001f600\n"
    theirs = AutoTokenizer.from_pretrained(STARTER)
    ours = Tokenizer.from_folder(STARTER)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert ours.decode(ours.encode(text)) == text.encode()


def test_a_vocabulary_of_code(tmp_path: Path) -> None:
    texts = [f"def name_{n}(value):\n        return value * {n}\n" for n in range(200)]
    save_vocabulary(train_vocabulary(texts, 320), tmp_path, 512)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert [tokenizer.control(name) for name in CONTROLS] == list(range(len(CONTROLS)))
    for text in (texts[3], "a\r\n\tb  \U0001f600é\0", "1234"):
        assert tokenizer.decode(tokenizer.encode(text)) == text.encode()
    assert len(tokenizer.encode("1234")) == 4
    assert tokenizer.decode([tokenizer.encode("\n        return")[0]]) == b"\n        "
