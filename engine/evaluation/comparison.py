"""The engine beside `transformers`: one checkpoint, one prefix, as many passes, in turn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infilld.engine.config import SamplerConfig
from infilld.engine.draws import SeededDraws
from infilld.engine.evaluation.transformers_baseline import Baseline, best_baseline
from infilld.engine.infill import Infiller
from infilld.engine.passes import CanvasPass
from infilld.engine.reading import Ask
from infilld.engine.sampler import denoise
from infilld.engine.stopping import AllOf
from infilld.engine.timing import centiles, in_turn

PREFIX_TOKENS = 1024
CANVAS_TOKENS = (16, 32, 64, 128, 256)
# A fill of a line or two; its prefix is encoded already, as it is while somebody types.
FILL_TOKENS = 32
STEPS = 12
# Of the runs that take long.
_FEW = 3


def compare(engine: Infiller, folder: Path, repeats: int) -> dict[str, Any]:
    """Times of both, and how many times as fast the engine is.

    A pass reads a canvas behind an encoded prefix, and is told a belief. `transformers` returns
    its logits; ours is read to the end: most probable tokens, entropies, the next belief. To
    `generate`, which encodes the prompt and refines a whole canvas, two things are compared: the
    same with as many passes, and a fill of a few tokens with as many passes.

    Args:
        engine: loaded from `folder`. repeats: runs of each pass.

    Raises:
        Unsupported: transformers is not installed.
    """
    model, length = engine.model, engine.model.config.canvas_tokens
    device, vocab = model.device, model.config.vocab_tokens
    draws = SeededDraws(0, device)
    prefix = draws.first_canvas(1, min(PREFIX_TOKENS, engine.prompt_tokens), vocab)[0]
    theirs = best_baseline(folder, device, prefix, draws.first_canvas(1, FILL_TOKENS, vocab))
    cache = model.new_cache()
    model.encode(prefix, cache)
    rows = []
    for tokens in sorted({min(n, length) for n in CANVAS_TOKENS}):
        canvas = draws.first_canvas(1, tokens, vocab)
        runs = {"ours": _pass(engine, cache, canvas), "theirs": _their_pass(theirs, canvas)}
        rows.append({"tokens": tokens, **_times(runs, repeats, device)})

    config = SamplerConfig(max_steps=STEPS, stability_passes=None)

    def fill(tokens: int) -> None:
        canvas = draws.first_canvas(1, tokens, vocab)
        denoise(model, cache, canvas, config, draws, stop=AllOf(()))

    def whole() -> None:
        # Not a second cache: a GPU with little memory holds one.
        cache.trim(0)
        model.encode(prefix, cache)
        canvas = draws.first_canvas(1, length, vocab)
        denoise(model, cache, canvas, config, draws, stop=AllOf(()))

    runs = {
        "theirs": lambda: theirs.generate(length, STEPS),
        "ours": whole,
        "fill": lambda: fill(min(FILL_TOKENS, length)),
    }
    return {
        **theirs.facts(),
        "prefix_tokens": len(prefix),
        "pass": rows,
        "generate": {
            "tokens": length,
            "passes": STEPS,
            "fill_tokens": min(FILL_TOKENS, length),
            **_times(runs, max(_FEW, repeats // 5), device),
        },
    }


def format_comparison(report: dict[str, Any]) -> str:
    """The report as a table for the terminal."""
    lines = [
        f"beside transformers {report['transformers']} ({report['dtype']}, {report['attention']} "
        f"attention, {report['experts']} experts: its fastest here), prefix of "
        f"{report['prefix_tokens']} tokens",
        f"{'':<28}{'p10':>9}{'p50':>9}{'p99':>9}  ms",
    ]
    for row in report["pass"]:
        lines += [_line(f"pass over {row['tokens']}, {n}", row[n]) for n in ("theirs", "ours")]
        lines.append(f"{'  times as fast':<28}{row['ours_ratio']:>18.2f}")
    found = report["generate"]
    whole = f"{found['tokens']} tokens, {found['passes']} passes"
    lines.append(_line(f"generate {found['tokens']}, theirs", found["theirs"]))
    lines.append(_line(f"generate {found['tokens']}, ours", found["ours"]))
    lines.append(f"{'  times as fast, ' + whole:<46}{found['ours_ratio']:.2f}")
    lines.append(_line(f"fill {found['fill_tokens']}, warm prefix", found["fill"]))
    lines.append(f"{'  times as fast as their generate':<46}{found['fill_ratio']:.2f}")
    return "\n".join(lines)


def _line(name: str, ms: dict[str, float]) -> str:
    return f"{name:<28}{ms['p10']:>9.2f}{ms['p50']:>9.2f}{ms['p99']:>9.2f}"


def _times(
    runs: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Any]:
    """Centiles by name, and the ratio of each median to that of `theirs`."""
    in_turn(runs, 1, device)
    found: dict[str, Any] = {
        name: centiles(each) for name, each in in_turn(runs, repeats, device).items()
    }
    ratios = {
        f"{name}_ratio": round(found["theirs"]["p50"] / max(found[name]["p50"], 1e-3), 2)
        for name in runs
        if name != "theirs"
    }
    return {**found, **ratios}


def _pass(engine: Infiller, cache: Any, canvas: Tensor) -> Callable[[], object]:
    ask = Ask(temperature=torch.tensor(0.8), top=engine.model.belief_tokens)
    (first,) = engine.model.run([CanvasPass(canvas, cache, None, ask)])
    told = CanvasPass(canvas, cache, first.belief, ask)
    return lambda: engine.model.run([told])


def _their_pass(theirs: Baseline, canvas: Tensor) -> Callable[[], object]:
    belief = theirs.run(canvas, None) / 0.8
    return lambda: theirs.run(canvas, belief)
