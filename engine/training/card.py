"""The model card: data, compute and measured quality, written from the records of the run."""

import math
import platform
from pathlib import Path
from typing import Any

import torch

from infilld.engine.checkpoints.loading import inspect_checkpoint
from infilld.engine.training.base import Base
from infilld.engine.training.corpus import Corpus, Package
from infilld.engine.training.recipe import TrainOptions
from infilld.engine.training.report import is_comparison, rows
from infilld.engine.training.trainer import Progress
from infilld.engine.worker import pick_device

CARD = "MODEL_CARD.md"


def write_card(
    options: TrainOptions,
    base: Base | None,
    corpus: Corpus,
    progress: Progress,
    report: dict[str, Any],
) -> Path:
    """Write MODEL_CARD.md into the model folder; returns its path."""
    path = options.out / CARD
    sections = [_head(base), _shape(options), _compute(options, base, progress)]
    if is_comparison(report):
        sections += [_change(report), _quality(report["after"])]
    else:
        sections += [_quality(report)]
    sections += [_data(corpus) if not options.sources else _own_data(options, corpus)]
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _head(base: Base | None) -> str:
    if base is not None:
        return f"""# A small infilling model for Python, adapted

Made by `infilld train --from {base.folder.name}`: weights, vocabulary and shapes are those of the
model `{base.folder.name}`, sha256 of its tensors `{base.sha256}`; its card and its licence apply.
What it learned since, and from which sources, stands below. `infilld models use DIR` loads it."""
    return """# A small infilling model for Python

Made by `infilld train` in the layout of DiffusionGemma: a block-diffusion model whose prompt is
read causally and whose canvas is refined by bidirectional passes. It is small; "Quality"
below tells how often it is right. It knows no natural language and follows no instructions. It
exists so that a fresh machine has something to run; for work, load a larger checkpoint.

infilld uses it when no other model is configured. `transformers` opens it with
`DiffusionGemmaForBlockDiffusion` and `AutoTokenizer`. Prompt:
`<bos><|fim_suffix|>` suffix `<|fim_prefix|>` prefix; canvas: the gap, `<|filler|>` where it needs
no text, then up to 16 tokens of the suffix, `<eos>` where the text ends. The vision tower holds
zeros: the public class insists on one. Licence: Apache-2.0, as the project."""


def _compute(options: TrainOptions, base: Base | None, progress: Progress) -> str:
    minutes, planned = progress.elapsed_s / 60, options.planned_minutes
    unfinished = "" if minutes >= planned else f" of {planned:g}: stopped early, not finished"
    given = "" if base is None else f"--from {base.folder.name} FOLDER "
    source = "the same folders" if options.sources else "the packages below"
    return f"""## Compute
| | |
|---|---|
| size | {options.size} recipe (`engine/training/recipe.py`) |
| training | {progress.steps:,} steps, {minutes:.0f} minutes{unfinished} |
| encoder tokens seen | {progress.encoder_tokens:,} |
| gap positions seen | {progress.canvas_tokens:,} |
| last encoder loss, smoothed | {_nats(progress.encoder_nats)} |
| last gap loss, smoothed, all noise, fillers too | {_nats(progress.gap_nats)} |
| machine | {platform.machine()}, device {pick_device(options.device)}, \
{torch.get_num_threads()} threads |
| seed | {options.seed} |

`infilld train {given}--size {options.size} --minutes {planned:g} --out DIR` makes it again from
{source}; the clock decides the number of steps, so not bit for bit."""


def _nats(loss: float) -> str:
    return "not trained yet" if math.isnan(loss) else f"{loss:.3f} nats a token"


def _shape(options: TrainOptions) -> str:
    found = inspect_checkpoint(options.out)
    config = found.config
    return f"""## Shape
| | |
|---|---|
| parameters | {found.parameters:,}, {", ".join(found.dtypes)} |
| vocabulary | {config.vocab_tokens:,} tokens, byte-level BPE, digits alone |
| layers | {config.layers}, the last with full attention, the others {config.sliding_window} wide |
| width | {config.width}; {config.heads} heads; dense MLP {config.dense_width} |
| experts | {config.experts} of {config.expert_width}, {config.experts_per_token} for each token |
| canvas | {config.canvas_tokens} tokens; prompt and canvas {config.max_positions} |"""


def _quality(report: dict[str, Any]) -> str:
    if not report:
        return "## Quality\nNot measured: no file was held out."
    canvas = report["rest_of_line"]["canvas"]
    causal = report["rest_of_line"]["causal_greedy_prefix_only"]
    rows = "\n".join(
        f"| {name} | {ours} | {theirs} |"
        for name, ours, theirs in (
            ("exact match", _percent(canvas["exact_match"]), _percent(causal["exact_match"])),
            (
                "edit similarity",
                f"{canvas['edit_similarity']:.3f}",
                f"{causal['edit_similarity']:.3f}",
            ),
            ("file still parses", _percent(canvas["parse_rate"]), _percent(causal["parse_rate"])),
            ("median time, ms", canvas["median_ms"], causal["median_ms"]),
        )
    )
    return f"""## Quality
Measured on {report["held_out_files"]} held-out files: {report["items"]} cuts at random characters,
the rest of the line missing, chosen by seed {report["seed"]}. The same items for both columns.

| rest of line | canvas, suffix pinned, length found | same weights causally, prefix only |
|---|---|---|
{rows}

Cross-entropy on held-out text: encoder {report["encoder_nats"]:.3f} nats a token; a gap's text in
the first pass from pure noise {report["first_pass_gap_nats"]:.3f} nats a token."""


def _change(report: dict[str, Any]) -> str:
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows(report))
    return f"""## Before and after
The model it was made from and this one, on the same items of the same held-out files.

| | before | after | change |
|---|--:|--:|--:|
{lines}"""


def _own_data(options: TrainOptions, corpus: Corpus) -> str:
    names = ", ".join(f"`{source.resolve().name}`" for source in options.sources)
    chars = sum(len(file.text) for file in corpus.training)
    return f"""## Data
Python source of the folders {names}: {len(corpus.training):,} files, {chars:,} characters after
leaving out files above 100 kB, tables, copies and near-copies. {len(corpus.held_out):,} more files,
chosen by a hash of their path, were held out: files that were learned from may resemble them."""


def _data(corpus: Corpus) -> str:
    trained = [package for package in corpus.packages if not package.held_out]
    held = [p for p in corpus.packages if p.held_out and not p.calibration]
    calibrated = [package for package in corpus.packages if package.calibration]
    chars = sum(len(file.text) for file in corpus.training)
    return f"""## Data
Python source that was installed on the machine: {len(corpus.training):,} files, {chars:,}
characters after leaving out tests, vendored copies, files above 100 kB, tables, copies and
near-copies. Nothing from the network, nothing from users. Whole packages were held out.

### Trained on
{_table(trained)}

### Held out
{_table(held)}

### Kept for calibration
Neither trained on nor measured on: the confidence was fitted and choices were made with these.

{_table(calibrated)}"""


def _table(packages: list[Package]) -> str:
    rows = [f"| {p.name} | {p.version} | {p.licence} | {p.files} | {p.chars:,} |" for p in packages]
    return "\n".join(
        ["| package | version | licence | files | characters |", "|---|---|---|--:|--:|", *rows]
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
