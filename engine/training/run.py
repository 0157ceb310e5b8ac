"""From sources to a model folder: corpus, vocabulary, training, export, evaluation, card.

Every stage leaves its result in the state folder and is skipped when it is there, so that an
interrupted run goes on where it was.
"""

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infilld.engine.errors import RequestError
from infilld.engine.infill import Infiller
from infilld.engine.model import DiffusionGemma
from infilld.engine.prompt import Controls
from infilld.engine.training import corpus as corpora
from infilld.engine.training.batches import Batches, workers_for
from infilld.engine.training.card import write_card
from infilld.engine.training.evaluate import evaluate
from infilld.engine.training.examples import ExampleBuilder
from infilld.engine.training.export import export_model
from infilld.engine.training.recipe import RECIPES, Recipe, TrainOptions
from infilld.engine.training.trainer import Progress, Trainer
from infilld.engine.training.vocabulary import load_vocabulary, save_vocabulary, train_vocabulary
from infilld.engine.training.wiring import initialise
from infilld.engine.worker import load_infiller, pick_device

Say = Callable[[str], None]

# A vocabulary is as good from a part of the corpus, and sooner done.
_VOCABULARY_FILES = 2000
# A package 10 times as large is taken 5.6 times as often: no one style shall rule.
_SIZE_DAMPING = 0.25
_EVALUATED_ITEMS = 200
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def train(options: TrainOptions, say: Say = lambda line: None) -> dict[str, Any]:
    """Make a model folder from Python sources, or go on making it.

    Args:
        options: see `TrainOptions`.
        say: gets one line for each thing that happened.

    Returns:
        The evaluation, as in evaluation.json of the model folder.

    Raises:
        RequestError: no usable source, or a folder that cannot be written.
    """
    state = _prepared(options)
    corpus = _corpus(options, state, say)
    recipe = RECIPES[options.size]
    _vocabulary(recipe, corpus, state, options.seed, say)
    trainer = _trainer(options, recipe, corpus, state, say)
    try:
        trainer.run(lambda progress: say(describe(progress, options)), max_steps=options.max_steps)
    finally:
        trainer.batches.close()
    export(trainer.averaged(), options.out, state)
    say(f"wrote {options.out}")
    return assess(options, corpus, trainer.progress, say)


def export(model: DiffusionGemma, out: Path, state: Path) -> None:
    """Write model and vocabulary into the model folder."""
    export_model(model, out)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(state / name, out / name)


def assess(
    options: TrainOptions, corpus: corpora.Corpus, progress: Progress, say: Say
) -> dict[str, Any]:
    """Evaluate the exported folder on the held-out files; write evaluation.json and the card."""
    report: dict[str, Any] = {}
    if corpus.held_out:
        say(f"evaluating on {len(corpus.held_out)} held-out files")
        engine: Infiller = load_infiller(options.out, options.device)
        report = evaluate(engine, [file.text for file in corpus.held_out], items=_EVALUATED_ITEMS)
        path = options.out / "evaluation.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_card(options, corpus, progress, report)
    return report


def describe(progress: Progress, options: TrainOptions) -> str:
    """One line on where a run is."""
    done = progress.elapsed_s / 60
    return (
        f"{done:6.1f} of {options.minutes:g} min  step {progress.steps:6d}  "
        f"encoder {progress.encoder_nats:.3f}  gap {progress.gap_nats:.3f} nats  "
        f"{progress.encoder_tokens / progress.elapsed_s:,.0f} tokens/s"
    )


def _prepared(options: TrainOptions) -> Path:
    state = options.state_folder
    if options.fresh and state.exists():
        shutil.rmtree(state)
    for folder in (state, options.out):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder) from error
        if not os.access(folder, os.W_OK):
            raise _unwritable(folder)
    return state


def _unwritable(folder: Path) -> RequestError:
    return RequestError(f"cannot write to {folder}", remedy="Choose another folder with --out.")


def _corpus(options: TrainOptions, state: Path, say: Say) -> corpora.Corpus:
    folder = state / "corpus"
    if (folder / "packages.json").exists():
        return corpora.load(folder)
    try:
        corpus = (
            corpora.collect_folders(options.sources)
            if options.sources
            else corpora.collect_installed()
        )
    except FileNotFoundError as error:
        raise RequestError(str(error), remedy="Name folders that hold .py files.") from None
    corpora.save(corpus, folder)
    chars = sum(len(file.text) for file in corpus.training)
    say(
        f"corpus: {len(corpus.training)} files, {chars / 1e6:.1f} M characters; "
        f"{len(corpus.held_out)} files held out"
    )
    return corpus


def _vocabulary(recipe: Recipe, corpus: corpora.Corpus, state: Path, seed: int, say: Say) -> None:
    if all((state / name).exists() for name in _TOKENIZER_FILES):
        return
    texts = [file.text for file in corpus.training]
    chosen = random.Random(seed).sample(texts, min(len(texts), _VOCABULARY_FILES))
    tokenizer = train_vocabulary(chosen, recipe.vocab_tokens)
    save_vocabulary(tokenizer, state, recipe.max_positions)
    say(f"vocabulary: {tokenizer.get_vocab_size()} tokens")


def _trainer(
    options: TrainOptions, recipe: Recipe, corpus: corpora.Corpus, state: Path, say: Say
) -> Trainer:
    tokenizer = load_vocabulary(state)
    controls = Controls.of(tokenizer)
    assert controls is not None
    model = DiffusionGemma(recipe.model_config())
    initialise(model, options.seed)
    model.to(pick_device(options.device))
    texts = [file.text for file in corpus.training]
    builder = ExampleBuilder(texts, tokenizer, controls, _weights(corpus))
    workers = workers_for(model.device.type)
    batches = Batches(builder, options.seed, workers=workers)
    trainer = Trainer(model, recipe, batches, state, minutes=options.minutes, seed=options.seed)
    if trainer.resume():
        say(f"going on after step {trainer.progress.steps}")
    parameters = sum(p.numel() for p in model.parameters())
    say(f"model: {parameters / 1e6:.2f} M parameters on {model.device}")
    return trainer


def _weights(corpus: corpora.Corpus) -> list[float]:
    """How often each training file is taken: by length, but large packages less."""
    chars: Counter[str] = Counter()
    for file in corpus.training:
        chars[_project(file)] += len(file.text)
    return [len(file.text) * chars[_project(file)] ** -_SIZE_DAMPING for file in corpus.training]


def _project(file: corpora.SourceFile) -> str:
    return file.package.partition("/")[0]
