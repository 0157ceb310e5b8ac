"""From sources to a model folder: corpus, vocabulary, training, export, evaluation, card.

Every stage leaves its result in the state folder and is skipped when it is there, so that an
interrupted run goes on where it was.
"""

import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infilld.engine.errors import RequestError
from infilld.engine.evaluation.calibrate import calibrate
from infilld.engine.infill import Infiller
from infilld.engine.model import DiffusionGemma
from infilld.engine.prompt import Controls
from infilld.engine.ranking import CALIBRATION
from infilld.engine.training import corpus as corpora
from infilld.engine.training.base import TOKENIZER_FILES, Base, claim
from infilld.engine.training.batches import Batches, workers_for
from infilld.engine.training.card import write_card
from infilld.engine.training.evaluate import evaluate
from infilld.engine.training.examples import ExampleBuilder
from infilld.engine.training.export import export_model
from infilld.engine.training.plot import plot_losses
from infilld.engine.training.recipe import RECIPES, Recipe, TrainOptions, adapting
from infilld.engine.training.report import compared, to_json
from infilld.engine.training.trainer import Progress, Trainer
from infilld.engine.training.vocabulary import load_vocabulary, save_vocabulary, train_vocabulary
from infilld.engine.training.wiring import initialise
from infilld.engine.worker import load_infiller, pick_device

Say = Callable[[str], None]
Show = Callable[[Progress], None]

EVALUATION, PLOT = "evaluation.json", "loss.png"

# A vocabulary is as good from a part of the corpus, and sooner done.
_VOCABULARY_FILES = 2000
# A package 10 times as large is taken 5.6 times as often: no one style shall rule.
_SIZE_DAMPING = 0.25
# One's own sources are few, and without a held-out file nothing tells whether training helped.
_OWN_HELD_OUT_SHARE = 0.1
# More gaps would hardly move so few weights.
_CALIBRATION_ITEMS = 300
_EVALUATION_SEED = 0


def train(
    options: TrainOptions, say: Say = lambda line: None, show: Show | None = None
) -> dict[str, Any]:
    """Make a model folder from Python sources, or go on making it.

    Args:
        options: see `TrainOptions`.
        say: gets one line for each thing that happened.
        show: gets the progress after every step; None: `say` gets a line on it now and then.

    Returns:
        The evaluation, as in evaluation.json of the model folder; with a base that of the base, of
        the new model, and the change. Empty where no file is held out.

    Raises:
        RequestError: no usable source, a folder that cannot be written or holds another run, or a
            base that cannot be trained.
        ModelError: a base that cannot be read, or no such device.
    """
    pause_at = math.inf
    if options.pause_minutes is not None:
        pause_at = time.monotonic() + 60 * options.pause_minutes
    device = pick_device(options.device)
    base = Base.of(options)
    state = _prepared(options)
    claim(state, base, options.sources)
    corpus = _corpus(options, state, say)
    recipe = RECIPES[options.size]
    if base is None:
        _vocabulary(recipe, corpus, state, options.seed, say)
        model = DiffusionGemma(recipe.model_config())
        initialise(model, options.seed)
        model.to(device)
    else:
        recipe = adapting(recipe, base.config)
        base.copy_vocabulary(state)
        model = base.model(device)
    trainer = _trainer(model, options, recipe, corpus, state, say)
    try:
        trainer.run(
            lambda progress: None if show else say(describe(progress, options)),
            show=show or (lambda progress: None),
            max_steps=options.max_steps,
            pause_at=pause_at,
        )
    finally:
        trainer.batches.close()
    generation = {"max_denoising_steps": recipe.max_steps}
    if base is not None:
        generation = base.generation()
    export(trainer.averaged(), options.out, state, generation)
    say(f"wrote {options.out}")
    if base is None:
        fit_confidence(options, corpus, say)
    else:
        base.copy_calibration(options.out)
    plot(trainer.progress, options.out, say)
    if not trainer.is_done:
        minutes = trainer.progress.elapsed_s / 60
        say(
            f"stopped after {minutes:.1f} of {options.planned_minutes:g} min of training; "
            "the same command goes on"
        )
    return assess(options, base, corpus, trainer.progress, say)


def export(
    model: DiffusionGemma, out: Path, state: Path, generation: dict[str, Any] | None = None
) -> None:
    """Write model and vocabulary into the model folder; `generation` as for `export_model`."""
    export_model(model, out, generation)
    for name in TOKENIZER_FILES:
        if (state / name).exists():
            shutil.copyfile(state / name, out / name)


def fit_confidence(options: TrainOptions, corpus: corpora.Corpus, say: Say) -> None:
    """Calibrate the exported model on the files kept for it, and write what was found beside it."""
    (options.out / CALIBRATION).unlink(missing_ok=True)
    if not corpus.calibration:
        say("confidence is not calibrated: no file was kept for it")
        return
    say(f"calibrating confidence on {len(corpus.calibration)} files")
    engine = load_infiller(options.out, options.device)
    items = min(options.items, _CALIBRATION_ITEMS)
    found = calibrate(engine, corpus.calibration, items=items, seed=_EVALUATION_SEED)
    found.save(options.out)


def plot(progress: Progress, out: Path, say: Say) -> None:
    """Draw the losses into the model folder, where there is what draws them."""
    try:
        plot_losses(progress.history, out / PLOT)
    except ImportError:
        say(f"no {PLOT}: matplotlib is not installed; pip install 'infilld[train]' brings it")


def assess(
    options: TrainOptions,
    base: Base | None,
    corpus: corpora.Corpus,
    progress: Progress,
    say: Say,
) -> dict[str, Any]:
    """Evaluate the exported folder on the held-out files; write evaluation.json and the card."""
    report: dict[str, Any] = {}
    path = options.out / EVALUATION
    texts = _unseen(corpus)
    if texts:
        files = f"{len(texts)} held-out files"
        if not corpus.held_out:
            files += ", those kept for calibration: no others are there"
        if base is not None:
            say(f"evaluating the model before, on {files}")
            before = measure(base.folder, options, texts)
        say(f"evaluating on {files}")
        report = measure(options.out, options, texts)
        if base is not None:
            report = compared(before, report)
        path.write_text(to_json(report), encoding="utf-8")
    else:
        say(
            f"not evaluated: none of the {len(corpus.training)} files is held out. Name more "
            "folders, with 40 files or more in all, and train with --fresh"
        )
        path.unlink(missing_ok=True)
    write_card(options, base, corpus, progress, report)
    return report


def _unseen(corpus: corpora.Corpus) -> list[str]:
    """Texts to judge a model on.

    A bare machine has none of the packages that are held out for that; what is kept from training
    for calibration is as new to the model. Where all files would be kept, all are trained on: those
    judge nothing.
    """
    seen = set(corpus.training)
    parts = (corpus.held_out, corpus.calibration)
    unseen = ([file.text for file in part if file not in seen] for part in parts)
    return next((texts for texts in unseen if texts), [])


def measure(folder: Path, options: TrainOptions, texts: list[str]) -> dict[str, Any]:
    """The evaluation of a model folder; the same items for every model and run."""
    engine: Infiller = load_infiller(folder, options.device)
    return evaluate(engine, texts, items=options.items, seed=_EVALUATION_SEED)


def describe(progress: Progress, options: TrainOptions) -> str:
    """One line on where a run is."""
    done = progress.elapsed_s / 60
    return (
        f"{done:6.1f} of {options.planned_minutes:g} min  step {progress.steps:6d}  "
        f"{progress.losses}  "
        f"{progress.tokens_per_s:,.0f} tokens/s"
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
        if options.base is not None:
            say("reading your sources")
            corpus = corpora.collect_folders(options.sources, _OWN_HELD_OUT_SHARE)
        elif options.sources:
            say("reading the sources")
            corpus = corpora.collect_folders(options.sources)
        else:
            say("reading the standard library and the installed packages")
            corpus = corpora.collect_installed()
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
    if all((state / name).exists() for name in TOKENIZER_FILES):
        return
    say("making the vocabulary")
    texts = [file.text for file in corpus.training]
    chosen = random.Random(seed).sample(texts, min(len(texts), _VOCABULARY_FILES))
    tokenizer = train_vocabulary(chosen, recipe.vocab_tokens)
    save_vocabulary(tokenizer, state, recipe.max_positions)
    say(f"vocabulary: {tokenizer.get_vocab_size()} tokens")


def _trainer(
    model: DiffusionGemma,
    options: TrainOptions,
    recipe: Recipe,
    corpus: corpora.Corpus,
    state: Path,
    say: Say,
) -> Trainer:
    tokenizer = load_vocabulary(state)
    controls = Controls.of(tokenizer)
    assert controls is not None
    texts = [file.text for file in corpus.training]
    builder = ExampleBuilder(texts, tokenizer, controls, _weights(corpus))
    workers = workers_for(model.device.type)
    batches = Batches(builder, options.seed, workers=workers)
    minutes = options.planned_minutes
    trainer = Trainer(model, recipe, batches, state, minutes=minutes, seed=options.seed)
    if trainer.resume():
        say(f"going on after step {trainer.progress.steps}")
        if trainer.is_done:
            say(f"its {minutes:g} minutes are spent: --minutes adds some, --fresh starts over")
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
