"""The model card: data, compute and measured quality, written from the records of the run."""

import platform
from pathlib import Path
from typing import Any

import torch

from infilld.engine.training.corpus import Corpus, Package
from infilld.engine.training.recipe import TrainOptions
from infilld.engine.training.trainer import Progress
from infilld.engine.weights import inspect_checkpoint
from infilld.engine.worker import pick_device

CARD = "MODEL_CARD.md"


def write_card(
    options: TrainOptions, corpus: Corpus, progress: Progress, report: dict[str, Any]
) -> Path:
    """Write MODEL_CARD.md into the model folder; returns its path."""
    path = options.out / CARD
    sections = [_head(options, progress), _quality(report), _data(corpus)]
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


def _head(options: TrainOptions, progress: Progress) -> str:
    return f"""# A small infilling model for Python

Made by `infilld train` in the layout of DiffusionGemma: a block-diffusion model whose prompt is
read causally and whose canvas is refined by bidirectional passes. It is small; "Quality"
below tells how often it is right. It knows no natural language and follows no instructions. It
exists so that a fresh machine has something to run; for work, load a larger checkpoint.

infilld uses it when no other model is configured. `transformers` opens it with
`DiffusionGemmaForBlockDiffusion` and `AutoTokenizer`. Prompt:
`<bos><|fim_suffix|>` suffix `<|fim_prefix|>` prefix; canvas: the gap, `<|filler|>` where it needs
no text, then up to 16 tokens of the suffix, `<eos>` where the text ends. The vision tower holds
zeros: the public class insists on one. Licence: Apache-2.0, as the project.

{_shape(options)}

## Compute
| | |
|---|---|
| size | {options.size} recipe (`engine/training/recipe.py`) |
| training | {progress.steps:,} steps, {progress.elapsed_s / 60:.0f} minutes |
| encoder tokens seen | {progress.encoder_tokens:,} |
| gap positions seen | {progress.canvas_tokens:,} |
| last encoder loss, smoothed | {progress.encoder_nats:.3f} nats a token |
| last gap loss, smoothed, all noise, fillers too | {progress.gap_nats:.3f} nats a token |
| machine | {platform.machine()}, device {pick_device(options.device)}, \
{torch.get_num_threads()} threads |
| seed | {options.seed} |

`infilld train --size {options.size} --minutes {options.minutes:g} --out DIR` makes it again from
the packages below; the clock decides the number of steps, so not bit for bit."""


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


def _data(corpus: Corpus) -> str:
    trained = [package for package in corpus.packages if not package.held_out]
    held = [package for package in corpus.packages if package.held_out]
    chars = sum(len(file.text) for file in corpus.training)
    return f"""## Data
Python source that was installed on the machine: {len(corpus.training):,} files, {chars:,}
characters after leaving out tests, vendored copies, files above 100 kB, tables, copies and
near-copies. Nothing from the network, nothing from users. Whole packages were held out.

### Trained on
{_table(trained)}

### Held out
{_table(held)}"""


def _table(packages: list[Package]) -> str:
    rows = [f"| {p.name} | {p.version} | {p.licence} | {p.files} | {p.chars:,} |" for p in packages]
    return "\n".join(
        ["| package | version | licence | files | characters |", "|---|---|---|--:|--:|", *rows]
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
