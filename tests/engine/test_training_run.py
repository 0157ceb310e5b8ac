"""A whole training run on a toy corpus: it learns, goes on after a stop, and says what is wrong."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_infill import byte_tokenizer

from infilld.engine.checkpoints.loading import load_model
from infilld.engine.errors import RequestError
from infilld.engine.model import DiffusionGemma
from infilld.engine.prompt import Controls
from infilld.engine.training import run
from infilld.engine.training.batches import Batches
from infilld.engine.training.examples import ExampleBuilder, ExampleShape
from infilld.engine.training.recipe import RECIPES, Phase, Recipe, TrainOptions
from infilld.engine.training.trainer import Trainer
from infilld.engine.training.wiring import initialise

SHAPE = ExampleShape(sequences=2, encoder_tokens=96, canvases=3, gap_tokens=24, suffix_tokens=12)
TOY = dataclasses.replace(
    RECIPES["cpu"],
    vocab_tokens=300,
    width=32,
    layers=2,
    heads=2,
    key_heads=1,
    head_size=16,
    full_head_size=16,
    dense_width=32,
    expert_width=16,
    phases=(Phase(until=1.0, shapes=((SHAPE, 1.0),)),),
    warmup_steps=5,
)

READING = dataclasses.replace(
    TOY,
    phases=(Phase(until=1.0, shapes=((dataclasses.replace(SHAPE, canvases=0), 1.0),)),),
)


def source(name: str, functions: int = 40) -> str:
    return "".join(
        f"def {name}_{n}(value):\n    return value + {name}{n % 10}\n\n\n" for n in range(functions)
    )


def trainer(state: Path, recipe: Recipe = TOY) -> Trainer:
    tokenizer = byte_tokenizer()
    controls = Controls.of(tokenizer)
    assert controls is not None
    model = DiffusionGemma(recipe.model_config())
    initialise(model, 0)
    builder = ExampleBuilder([source("a"), source("b")], tokenizer, controls)
    batches = Batches(builder, 0)
    # So many minutes that the clock does not touch the learning rate.
    return Trainer(model, recipe, batches, state, minutes=1e6, seed=0)


def test_twenty_steps_lower_both_losses(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    losses = [made.step() for _ in range(20)]
    for name in ("encoder", "gap"):
        first, last = (
            sum(float(getattr(loss, name)) for loss in part) for part in (losses[:3], losses[-3:])
        )
        assert last < 0.9 * first, name
    assert made.progress.steps == 20
    assert made.progress.encoder_tokens == 20 * 2 * 96


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, half = trainer(tmp_path / "whole"), trainer(tmp_path / "half")
    for made, steps in ((whole, 6), (half, 3)):
        made.state.mkdir()
        made.run(lambda progress: None, max_steps=steps)
    again = trainer(tmp_path / "half")
    assert again.resume()
    again.run(lambda progress: None, max_steps=6)
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, again.model.state_dict()[name]), name
    for name, average in whole.average.items():
        assert torch.equal(average, again.average[name]), name


def test_there_is_nothing_to_resume_in_a_new_folder(tmp_path: Path) -> None:
    assert not trainer(tmp_path).resume()


def test_the_rate_rises_holds_and_falls_to_nothing(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    shares = []
    for steps, done in ((0, 0.0), (100, 0.3), (100, 0.8), (100, 1.0)):
        made.progress.steps, made.progress.elapsed_s = steps, done * made.limit_s
        shares.append(made.rate_share())
    assert shares == pytest.approx([0.2, 1.0, 0.5, 0.0])


def test_sources_become_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "cpu", TOY)
    code = tmp_path / "code"
    code.mkdir()
    for name in map(chr, range(ord("a"), ord("z") + 1)):
        (code / f"{name}.py").write_text(source(name * 3, 15))
    said: list[str] = []
    options = TrainOptions(
        sources=(code,), out=tmp_path / "out", max_steps=2, device="cpu", items=3
    )
    report = run.train(options, said.append)
    assert load_model(options.out).config.vocab_tokens == TOY.vocab_tokens
    assert json.loads((options.out / "evaluation.json").read_text()) == report
    assert 0 <= report["rest_of_line"]["canvas"]["exact_match"] <= 1
    assert "2 steps" in (options.out / "MODEL_CARD.md").read_text()
    assert any("held out" in line for line in said)
    assert (options.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    steps: list[int] = []
    monkeypatch.setattr(run, "measure", lambda *_: report)
    run.train(
        dataclasses.replace(options, max_steps=3),
        said.append,
        lambda progress: steps.append(progress.steps),
    )
    assert "going on after step 2" in said
    assert steps == [3]


def test_a_pause_keeps_what_was_learned_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "cpu", TOY)
    (tmp_path / "a.py").write_text(source("a"))
    said: list[str] = []
    options = TrainOptions(
        sources=(tmp_path / "a.py",),
        out=tmp_path / "out",
        state=tmp_path / "state",
        minutes=1000,
        pause_minutes=0.02,
        device="cpu",
    )
    run.train(options, said.append)
    done = json.loads((options.state_folder / "progress.json").read_text())["steps"]
    assert any("of 1000 min of training; the same command goes on" in line for line in said)
    assert "stopped early, not finished" in (options.out / "MODEL_CARD.md").read_text()
    assert load_model(options.out).config.vocab_tokens == TOY.vocab_tokens
    run.train(options, said.append)
    assert f"going on after step {done}" in said


def test_a_run_whose_minutes_are_spent_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "cpu", TOY)
    (tmp_path / "a.py").write_text(source("a"))
    said: list[str] = []
    options = TrainOptions(
        sources=(tmp_path / "a.py",), out=tmp_path / "out", minutes=1e-6, device="cpu"
    )
    run.train(options)
    run.train(options, said.append)
    assert any("minutes are spent" in line for line in said)
    assert any("not evaluated: none of the 1 files is held out" in line for line in said)


def test_losses_that_are_not_there_are_null_in_json(tmp_path: Path) -> None:
    made = trainer(tmp_path, READING)
    made.run(lambda progress: None, max_steps=1)
    made.save()
    saved = json.loads((tmp_path / "progress.json").read_text(), parse_constant=pytest.fail)
    assert saved["gap_nats"] is None
    assert saved["history"][0][2] is None
    assert saved["encoder_nats"] > 0


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).save()
    with pytest.raises(RequestError, match="another shape") as caught:
        trainer(tmp_path, dataclasses.replace(TOY, width=64)).resume()
    assert "--fresh" in caught.value.remedy


@pytest.mark.parametrize("name", ["minutes", "pause_minutes", "items"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_numbers_that_mean_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(RequestError, match=name):
        TrainOptions(**{name: value})  # type: ignore[arg-type]


def test_minutes_are_fewer_where_a_model_is_there_already() -> None:
    assert TrainOptions().planned_minutes == 60
    assert TrainOptions(base=Path("m")).planned_minutes == 10
    assert TrainOptions(base=Path("m"), minutes=3).planned_minutes == 3


def test_no_source_is_the_caller_s_mistake(tmp_path: Path) -> None:
    for sources in (tmp_path, tmp_path / "absent"):
        options = TrainOptions(sources=(sources,), out=tmp_path / "out", device="cpu")
        with pytest.raises(RequestError, match=str(tmp_path)):
            run.train(options)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot write"):
        run.train(TrainOptions(sources=(tmp_path,), out=tmp_path / "file" / "out", device="cpu"))
