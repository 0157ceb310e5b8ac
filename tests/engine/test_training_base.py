"""Going on from a model: its shapes and words stay, its own sources are learned, both compared."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_infill import tiny_config, tiny_model

from infilld.engine.checkpoints.loading import load_model
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing, RequestError, Unsupported
from infilld.engine.training import base as bases
from infilld.engine.training import run
from infilld.engine.training.base import Base, claim
from infilld.engine.training.examples import ExampleShape
from infilld.engine.training.export import export_model
from infilld.engine.training.recipe import RECIPES, Phase, TrainOptions, adapting
from infilld.engine.training.vocabulary import save_vocabulary, train_vocabulary
from infilld.engine.worker import starter_folder

VOCAB_TOKENS = 300
SHAPE = ExampleShape(sequences=2, encoder_tokens=96, canvases=2, gap_tokens=24, suffix_tokens=12)
QUICK = dataclasses.replace(
    RECIPES["cpu"], phases=(Phase(until=1.0, shapes=((SHAPE, 1.0),), unrolled=0.5),)
)


def source(name: str) -> str:
    return "".join(
        f"def {name}_{n}(value):\n    return value + {name}{n % 10}\n\n\n" for n in range(15)
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model folder whose shapes are no recipe's."""
    folder = tmp_path / "small"
    words = train_vocabulary([source("a")], VOCAB_TOKENS)
    config = tiny_config(words.get_vocab_size())
    export_model(tiny_model(config), folder, {"max_denoising_steps": 7})
    save_vocabulary(words, folder, config.max_positions)
    return folder


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    for name in map(chr, range(ord("a"), ord("z") + 1)):
        (folder / f"{name}.py").write_text(source(name * 3))
    return folder


def options(base: Path, code: Path, **fields: object) -> TrainOptions:
    known = {"out": code.parent / "out", "max_steps": 2, "device": "cpu", "items": 2}
    return TrainOptions(base=base, sources=(code,), **{**known, **fields})  # type: ignore[arg-type]


def test_a_model_goes_on_and_is_compared_with_what_it_was(
    small: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "cpu", QUICK)
    asked, said = options(small, code), []
    report = run.train(asked, said.append)
    old, new = load_model(small), load_model(asked.out)
    assert new.config == old.config
    moved = old.embed_tokens.weight - new.embed_tokens.weight
    assert 0 < moved.abs().max() < 0.1
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (asked.out / name).read_bytes() == (small / name).read_bytes()
    generation = json.loads((asked.out / "generation_config.json").read_text())
    assert generation["max_denoising_steps"] == 7

    assert set(report) == {"before", "after", "change"}
    assert json.loads((asked.out / "evaluation.json").read_text()) == report
    for side in ("before", "after"):
        assert (report[side]["items"], report[side]["seed"]) == (2, 0)
    nats = [report[side]["encoder_nats"] for side in ("before", "after", "change")]
    assert nats[2] == pytest.approx(nats[1] - nats[0], abs=1e-4)
    card = (asked.out / "MODEL_CARD.md").read_text()
    assert "--from small" in card
    digest = Base.of(asked)
    assert digest is not None
    assert digest.sha256 in card
    assert f"| encoder_nats | {nats[0]:.4f} | {nats[1]:.4f} | {nats[2]:+.4f} |" in card
    assert str(code) not in card
    assert any("before" in line for line in said)

    monkeypatch.setattr(run, "measure", lambda *_: report["after"])
    run.train(dataclasses.replace(asked, max_steps=3), said.append)
    assert "going on after step 2" in said


def test_where_no_file_is_held_out_that_is_said_with_a_remedy(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "cpu", QUICK)
    few = tmp_path / "few"
    few.mkdir()
    (few / "b.py").write_text(source("b"))
    said: list[str] = []
    assert run.train(options(small, few, max_steps=1), said.append) == {}
    (told,) = (line for line in said if "not evaluated" in line)
    assert "folders" in told
    assert "no file was held out" in (tmp_path / "out" / "MODEL_CARD.md").read_text()


def test_adapting_uses_the_last_phase_at_a_third_of_the_rate() -> None:
    config = RECIPES["cpu"].model_config()
    made = adapting(RECIPES["cpu"], config)
    (phase,) = made.phases
    assert phase.shapes == RECIPES["cpu"].phases[-1].shapes
    assert (phase.encoder_weight, phase.unrolled) == (1.0, 0.4)
    assert made.learning_rate == pytest.approx(RECIPES["cpu"].learning_rate / 3)
    assert made.decay_share == 1


@pytest.mark.parametrize(("canvas", "positions"), [(32, 600), (64, 200), (256, 4096), (48, 112)])
def test_adapting_fits_the_model(canvas: int, positions: int) -> None:
    config = dataclasses.replace(
        RECIPES["cpu"].model_config(), canvas_tokens=canvas, max_positions=positions
    )
    for shape, _ in adapting(RECIPES["gpu"], config).phases[0].shapes:
        assert shape.canvas_tokens <= canvas
        assert shape.encoder_tokens + shape.canvas_tokens <= positions
        assert shape.suffix_tokens + 3 < shape.encoder_tokens


@pytest.mark.parametrize(("canvas", "positions"), [(16, 600), (64, 80)])
def test_a_model_that_reads_too_little_is_refused(canvas: int, positions: int) -> None:
    config = dataclasses.replace(
        RECIPES["cpu"].model_config(), canvas_tokens=canvas, max_positions=positions
    )
    with pytest.raises(Unsupported, match="too few to train") as caught:
        adapting(RECIPES["gpu"], config)
    assert caught.value.remedy


class TestBadBases:
    """What cannot be gone on from is refused before anything is done, with a remedy."""

    def test_folders_are_needed(self, small: Path) -> None:
        with pytest.raises(RequestError, match="none is named") as caught:
            Base.of(TrainOptions(base=small))
        assert "--from starter" in caught.value.remedy

    def test_no_folder(self, tmp_path: Path, code: Path) -> None:
        with pytest.raises(CheckpointMissing, match="absent"):
            run.train(options(tmp_path / "absent", code))
        assert not (tmp_path / "out").exists()

    def test_the_model_itself_is_not_overwritten(self, small: Path, code: Path) -> None:
        with pytest.raises(RequestError, match="to start from") as caught:
            Base.of(options(small, code, out=code / ".." / "small"))
        assert "--out" in caught.value.remedy

    def test_a_vocabulary_without_fillers(self, small: Path, code: Path) -> None:
        path = small / "tokenizer.json"
        words = path.read_text()
        for mark in ("fim_suffix", "fim_prefix", "filler"):
            words = words.replace(mark, mark + "s")
        path.write_text(words)
        with pytest.raises(Unsupported, match="no filler token") as caught:
            Base.of(options(small, code))
        assert "starter" in caught.value.remedy

    def test_a_quantized_checkpoint(self, small: Path, code: Path) -> None:
        config = json.loads((small / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
        (small / "config.json").write_text(json.dumps(config))
        tensors = load_file(small / "model.safetensors")
        query = "model.decoder.layers.0.self_attn.q_proj"
        tensors[f"{query}.weight"] = tensors[f"{query}.weight"].to(torch.float8_e4m3fn)
        tensors[f"{query}.weight_scale"] = torch.ones(())
        save_file(tensors, small / "model.safetensors")
        with pytest.raises(CheckpointMismatch, match="ModelOpt fp8") as caught:
            Base.of(options(small, code))
        assert "unquantized" in caught.value.remedy

    def test_one_that_is_too_large(
        self, small: Path, code: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bases, "_MOST_PARAMETERS", 1000)
        with pytest.raises(Unsupported, match="B parameters") as caught:
            Base.of(options(small, code))
        assert "starter" in caught.value.remedy

    def test_logits_that_would_overflow(self, small: Path, code: Path) -> None:
        config = json.loads((small / "config.json").read_text())
        config["text_config"]["final_logit_softcapping"] = 100.0
        (small / "config.json").write_text(json.dumps(config))
        with pytest.raises(Unsupported, match="capped at 100"):
            Base.of(options(small, code))


class TestState:
    """A state folder belongs to one model and one set of folders."""

    def base(self, sha256: str = "a" * 64) -> Base:
        return Base(Path("m"), RECIPES["cpu"].model_config(), sha256)

    def test_the_same_run_goes_on_even_if_the_model_has_moved(self, tmp_path: Path) -> None:
        claim(tmp_path, self.base(), (Path("src"),))
        claim(tmp_path, dataclasses.replace(self.base(), folder=Path("n")), (Path("src"),))

    def test_another_model_s_run_is_refused(self, tmp_path: Path) -> None:
        claim(tmp_path, self.base(), (Path("src"),))
        for other, sources in (
            (self.base("b" * 64), (Path("src"),)),
            (self.base(), (Path("lib"),)),
            (None, (Path("src"),)),
        ):
            with pytest.raises(RequestError, match="holds a run from m") as caught:
                claim(tmp_path, other, sources)
            assert "--fresh" in caught.value.remedy

    def test_a_new_model_s_run_is_refused_too(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoint.pt").write_text("")
        claim(tmp_path, None, ())
        with pytest.raises(RequestError, match="holds a run with a new model"):
            claim(tmp_path, self.base(), (Path("src"),))


@pytest.mark.slow
def test_the_starter_can_go_on(code: Path, tmp_path: Path) -> None:
    # Its own folder is no place for a test to write to.
    shutil.copytree(starter_folder(), tmp_path / "starter")
    base = Base.of(options(tmp_path / "starter", code))
    assert base is not None
    model = base.model(torch.device("cpu"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert adapting(RECIPES["cpu"], base.config).phases[0].shapes
