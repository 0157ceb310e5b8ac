"""A whole evaluation: items, contenders, measures, one report."""

import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infilld.engine.bench import machine_facts
from infilld.engine.errors import ModelError, UnknownOption, Unsupported
from infilld.engine.evaluation.benchmark import humaneval_items
from infilld.engine.evaluation.contenders import make_contender
from infilld.engine.evaluation.held_out import files_below, held_out_files
from infilld.engine.evaluation.items import Item, cut_items
from infilld.engine.evaluation.measures import is_exact, measure, measure_silence, measure_tests
from infilld.engine.evaluation.names import CONTENDERS, KINDS
from infilld.engine.evaluation.sandbox import TIMEOUT_S, Outcome, run_tests
from infilld.engine.infill import Infiller
from infilld.engine.syntax import parses
from infilld.engine.worker import load_infiller

Say = Callable[[str], None]

SCHEMA = 1
"""Counts changes of the report that a reader of an older one would misread."""


_SAY_EVERY_S = 20.0


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated.

    Attributes:
        folders: held-out Python source; none: the held-out packages that are installed here.
        benchmark: folder of a benchmark's files; None: no benchmark.
        items: gaps of each kind. seed: chooses them, and is the seed of every request.
        kinds: of `KINDS`; none: all, and `benchmark` where one is given.
        contenders: of `CONTENDERS`; none: all.
    """

    folders: tuple[Path, ...] = ()
    benchmark: Path | None = None
    items: int = 100
    seed: int = 0
    kinds: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what there is not.

        Raises:
            UnknownOption: a kind or a contender of another name, or `benchmark` without a folder.
        """
        for what, given, known in (
            ("kind", self.kinds, KINDS),
            ("contender", self.contenders, CONTENDERS),
        ):
            for name in given:
                if name not in known:
                    raise UnknownOption(
                        f"{name!r} is no {what}", remedy=f"Choose among {', '.join(known)}."
                    )
        if "benchmark" in self.kinds and self.benchmark is None:
            raise UnknownOption(
                "the kind benchmark, and no benchmark",
                remedy="Name the folder of its files with --benchmark.",
            )

    def chosen_kinds(self) -> list[str]:
        """Kinds to evaluate, in the order of `KINDS`."""
        wanted = self.kinds or [name for name in KINDS if name != "benchmark" or self.benchmark]
        return [name for name in KINDS if name in wanted]

    def chosen_contenders(self) -> list[str]:
        """Contenders, in the order of `CONTENDERS`."""
        return [name for name in CONTENDERS if name in (self.contenders or CONTENDERS)]


def run_evaluation(
    folder: Path, device: str, options: EvaluationOptions, say: Say = lambda line: None
) -> dict[str, Any]:
    """Evaluate a checkpoint.

    Args:
        folder: checkpoint. device: as for the daemon.
        options: on what. say: gets one line for each thing that happened.

    Returns:
        The report, ready for JSON:
        `schema`, `infilld`, `python` — versions; `model`, `model_folder`, `parameters`;
        `machine`, `load_average_after` — as in a report of the bench;
        `seed`; `held_out` — packages or folders, files, characters;
        `benchmark` — its folder, items, how many of its own solutions pass here, seconds given
        to each program, guards of the sandbox;
        `kinds` — for each kind `about`, `items`, and `contenders`: for each the figures of
        `compare`.

    Raises:
        RequestError: no source, no benchmark, or the model cannot infill.
        ModelError: the checkpoint or the device will not do, or no sandbox can be had here.
    """
    # What the caller can get wrong comes before the model is loaded.
    items, sources = _items(options, say)
    engine = load_infiller(folder, device)
    if engine.controls is None:
        raise Unsupported(
            f"{folder} was not trained to infill: its vocabulary has no filler token",
            remedy="Evaluate a model that `infilld train` made, or the starter model.",
        )
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "infilld": version("infilld"),
        "python": platform.python_version(),
        "model": folder.name,
        "model_folder": str(folder),
        "parameters": sum(p.numel() for p in engine.model.parameters()),
        "machine": machine_facts(engine),
        "seed": options.seed,
        **sources,
        "kinds": {
            kind: {
                "about": KINDS[kind],
                "items": len(chosen),
                "contenders": compare(
                    engine, chosen, options.chosen_contenders(), options.seed, say
                ),
            }
            for kind, chosen in items.items()
        },
    }
    return report | {"load_average_after": os.getloadavg()[0]}


def compare(
    engine: Infiller,
    items: Sequence[Item],
    names: Sequence[str],
    seed: int,
    say: Say = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Figures of contenders on the same items of one kind.

    Args:
        engine: a model that can infill. items: at least one. names: of contenders.
        seed: of every request. say: gets a line for each contender.

    Returns:
        For each contender the figures of `measure`; of `measure_tests`, where items have tests;
        and where `canvas` takes part, how many items only this one, or only canvas, had exact.
    """
    are_sound = [parses(item.filled(item.missing)) for item in items]
    figures: dict[str, dict[str, Any]] = {}
    exact: dict[str, list[bool]] = {}
    for name in names:
        started = said = time.monotonic()
        contender = make_contender(name, engine, seed)
        answers = []
        for item in items:
            answers.append(contender.answer(item))
            if time.monotonic() >= said + _SAY_EVERY_S:
                said = time.monotonic()
                say(f"{item.kind}: {name} has answered {len(answers)} of {len(items)}")
        exact[name] = [is_exact(item, answer) for item, answer in zip(items, answers, strict=True)]
        found = measure(items, answers, are_sound)
        if items[0].check is not None:
            found |= measure_tests(_outcomes(items, [answer.text for answer in answers]))
        if items[0].kind == "silent":
            found |= measure_silence(items, answers)
        if "canvas" in exact and name != "canvas":
            pairs = list(zip(exact[name], exact["canvas"], strict=True))
            found["only_it_exact"] = pairs.count((True, False))
            found["only_canvas_exact"] = pairs.count((False, True))
        figures[name] = found
        say(
            f"{items[0].kind}: {name} has {100 * found['exact_match']:.1f} % of {len(items)} "
            f"exact, {time.monotonic() - started:.0f} s"
        )
    return figures


def _outcomes(items: Sequence[Item], texts: Sequence[str | None]) -> list[Outcome | None]:
    """How each filled program fares; None where there is no text or no test."""
    return [
        None
        if text is None or item.check is None
        else run_tests(f"{item.filled(text)}\n{item.check.test}", item.check.entry_point)
        for item, text in zip(items, texts, strict=True)
    ]


def _items(options: EvaluationOptions, say: Say) -> tuple[dict[str, list[Item]], dict[str, Any]]:
    """Items of each kind, and what the report says of where they come from."""
    items: dict[str, list[Item]] = {}
    sources: dict[str, Any] = {"held_out": None, "benchmark": None}
    kinds = options.chosen_kinds()
    if any(kind != "benchmark" for kind in kinds):
        files = files_below(options.folders) if options.folders else held_out_files()
        sources["held_out"] = {
            "from": sorted({file.package for file in files}),
            "files": len(files),
            "chars": sum(len(file.text) for file in files),
        }
        say(f"{len(files)} held-out files of {', '.join(sources['held_out']['from'])}")
    for kind in kinds:
        if kind != "benchmark":
            items[kind] = cut_items(files, kind, options.items, options.seed)
    if "benchmark" in kinds and options.benchmark is not None:
        found = humaneval_items(options.benchmark)
        if len(found) > options.items:
            places = sorted(random.Random(options.seed).sample(range(len(found)), options.items))
            found = [found[place] for place in places]
        items["benchmark"] = found
        sources["benchmark"] = {"from": str(options.benchmark)} | _own_solutions(found, say)
    return items, sources


def _own_solutions(items: Sequence[Item], say: Say) -> dict[str, Any]:
    """Whether the sandbox can tell right from wrong: the true texts ought to pass.

    Raises:
        ModelError: not one does.
    """
    found = [o for o in _outcomes(items, [item.missing for item in items]) if o is not None]
    passed = sum(outcome.verdict == "passed" for outcome in found)
    guards = found[0].guards
    if not passed:
        raise ModelError(
            f"none of the benchmark's {len(found)} own solutions passes its tests in the sandbox: "
            f"{found[0].verdict}, {found[0].why}",
            remedy="Leave the benchmark out on this machine.",
        )
    say(
        f"{passed} of the benchmark's {len(found)} own solutions pass; what the model writes runs "
        f"behind the guards {', '.join(guards)}"
    )
    return {
        "items": len(found),
        "own_solutions_pass": passed,
        "timeout_s": TIMEOUT_S,
        "guards": list(guards),
    }


def format_evaluation(report: dict[str, Any]) -> str:
    """The report as tables for the terminal, one for each kind."""
    machine = report["machine"]
    lines = [
        f"{report['model']}: {report['parameters'] / 1e6:.1f} M parameters, {machine['dtype']} "
        f"on {machine['device']} ({machine['name']}), seed {report['seed']}",
    ]
    for kind, found in report["kinds"].items():
        lines += ["", f"{kind}: {found['about']}, {found['items']} items"]
        rows = found["contenders"]
        columns = [c for c in _COLUMNS if any(c.key in row for row in rows.values())]
        lines.append(" " * 18 + "".join(f"{c.title:>{c.width}}" for c in columns))
        for name, row in rows.items():
            cells = "".join(f"{_cell(row.get(c.key), c):>{c.width}}" for c in columns)
            lines.append(f"{name:<18}{cells}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Column:
    """A figure's place in the table; shares are shown in percent."""

    key: str
    title: str
    width: int = 9
    is_share: bool = True


_COLUMNS = (
    _Column("pass_at_1", "pass@1"),
    _Column("exact_match", "exact"),
    _Column("exact_match_95", "95 %", 14),
    _Column("noise", "noise"),
    _Column("edit_similarity", "similar"),
    _Column("parse_rate", "parses"),
    _Column("abstained", "abstains"),
    _Column("precision", "precise"),
    _Column("shown_parse_rate", "shown ok"),
    _Column("mean_passes", "passes", is_share=False),
    _Column("median_ms", "p50 ms", is_share=False),
    _Column("p90_ms", "p90 ms", is_share=False),
)


def _cell(value: Any, column: _Column) -> str:
    if value is None:
        return "-"
    if isinstance(value, (tuple, list)):
        return "–".join(f"{100 * bound:.1f}" for bound in value)
    return f"{100 * value:.1f}" if column.is_share else f"{value:.1f}"
