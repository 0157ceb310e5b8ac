"""A whole evaluation: items, contenders, measures, one report."""

import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from infilld.engine.evaluation.names import CONTENDERS, CUT_KINDS, KINDS
from infilld.engine.evaluation.pairs import KIND as PAIRS
from infilld.engine.evaluation.pairs import pairs, run_pairs
from infilld.engine.evaluation.recordings import KIND as TYPING
from infilld.engine.evaluation.recordings import recordings, run_typing
from infilld.engine.evaluation.repository import KIND as REPOSITORY
from infilld.engine.evaluation.repository import (
    Repository,
    arguments_of,
    own_repository,
    workshop,
)
from infilld.engine.evaluation.sandbox import TIMEOUT_S, Outcome, run_tests
from infilld.engine.infill import Infiller
from infilld.engine.silence.python import parses
from infilld.engine.worker import load_infiller

Say = Callable[[str], None]
# How an item's tests fare with a text in its gap.
Judge = Callable[[Item, str], Outcome]

SCHEMA = 1
"""Counts changes of the report that a reader of an older one would misread."""


MOST_HOLES = 30
"""Holes in a repository, at most: each costs a run of tests, and each new answer another one."""

_SAY_EVERY_S = 20.0
# A line is typed with some twenty pauses.
_ITEMS_A_RECORDING = 10


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated.

    Attributes:
        folders: held-out Python source; none: the held-out packages that are installed here.
        benchmark: folder of a benchmark's files; None: no benchmark.
        repository: folder with tests of its own; None: the checkout of infilld, if there is one
            and no folder is given.
        tests: calls of pytest in the repository, each as on a command line.
        items: gaps of each kind; a tenth as many lines are typed, and at most `MOST_HOLES` holes
            are made in a repository. seed: chooses them, and is the seed of every request.
        kinds: of `KINDS`; none: all, and `benchmark` where one is given.
        contenders: of `CONTENDERS`; none: all.
    """

    folders: tuple[Path, ...] = ()
    benchmark: Path | None = None
    repository: Path | None = None
    tests: tuple[str, ...] = ()
    items: int = 100
    seed: int = 0
    kinds: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what there is not.

        Raises:
            UnknownOption: a kind or a contender of another name, `benchmark` without a folder, or
                one of `repository` and `tests` without the other.
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

        if (self.repository is None) != (not self.tests):
            raise UnknownOption(
                "of a repository and its tests one is named without the other",
                remedy="Give both --repository and --tests.",
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
        to each program, guards of the sandbox; `repository` — its folder, files, items, how many
        statements were left out to find them, guards;
        `kinds` — for each kind `about`, `items`, and `contenders`: for each the figures of
        `compare`.

    Raises:
        RequestError: no source, no benchmark, or the model cannot infill.
        ModelError: the checkpoint or the device will not do, or no sandbox can be had here.
    """
    with ExitStack() as stack:
        # What the caller can get wrong comes before the model is loaded.
        work = _work(options, stack, say)
        engine = load_infiller(folder, device)
        if engine.controls is None:
            raise Unsupported(
                f"{folder} was not trained to infill: its vocabulary has no filler token",
                remedy="Evaluate a model that `infilld train` made, or the starter model.",
            )
        names = options.chosen_contenders()
        kinds = {}
        for kind, task in work.tasks.items():
            count, contenders = task(engine, names)
            kinds[kind] = {"about": KINDS[kind], "items": count, "contenders": contenders}
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "infilld": version("infilld"),
        "python": platform.python_version(),
        "model": folder.name,
        "model_folder": str(folder),
        "parameters": engine.model.parameter_count,
        "machine": machine_facts(engine),
        "seed": options.seed,
        **work.sources,
        "kinds": kinds,
    }
    return report | {"load_average_after": os.getloadavg()[0]}


def compare(
    engine: Infiller,
    items: Sequence[Item],
    names: Sequence[str],
    seed: int,
    say: Say = lambda line: None,
    judge: Judge | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of contenders on the same items of one kind.

    Args:
        engine: a model that can infill. items: at least one. names: of contenders.
        seed: of every request. say: gets a line for each contender.
        judge: runs the tests of an item with a text; None: those an item brings, if it has any.

    Returns:
        For each contender the figures of `measure`; of `measure_tests`, where items have tests; of
        `measure_silence`, where nothing is missing;
        and where `canvas` takes part, how many items only this one, or only canvas, had exact.
    """
    if judge is None and items[0].check is not None:
        judge = _run_program
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
        if judge is not None:
            found |= measure_tests(_outcomes(items, [answer.text for answer in answers], judge))
        if items[0].kind == "silent":
            found |= measure_silence(items, answers)
        if "canvas" in exact and name != "canvas":
            both = list(zip(exact[name], exact["canvas"], strict=True))
            found["only_it_exact"] = both.count((True, False))
            found["only_canvas_exact"] = both.count((False, True))
        figures[name] = found
        say(
            f"{items[0].kind}: {name} has {100 * found['exact_match']:.1f} % of {len(items)} "
            f"exact, {time.monotonic() - started:.0f} s"
        )
    return figures


def _outcomes(
    items: Sequence[Item], texts: Sequence[str | None], judge: Judge
) -> list[Outcome | None]:
    """How each filled item fares; None where there is no text."""
    return [
        None if text is None else judge(item, text) for item, text in zip(items, texts, strict=True)
    ]


def _run_program(item: Item, text: str) -> Outcome:
    """How a benchmark's program fares with a text in its gap."""
    assert item.check is not None
    return run_tests(f"{item.filled(text)}\n{item.check.test}", item.check.entry_point)


# Answers one kind: how many items, and figures for each of the contenders that are named.
_Task = Callable[[Infiller, Sequence[str]], tuple[int, dict[str, dict[str, Any]]]]


@dataclass
class _Work:
    """What is to be done: a task for each kind, and what the report says of where it comes from."""

    tasks: dict[str, _Task]
    sources: dict[str, Any]


def _work(options: EvaluationOptions, stack: ExitStack, say: Say) -> _Work:
    """Everything that needs no model; the stack keeps what is needed until the end."""
    work = _Work({}, {"held_out": None, "benchmark": None, "repository": None})
    kinds, seed = options.chosen_kinds(), options.seed

    def answered(items: Sequence[Item], judge: Judge | None = None) -> _Task:
        return lambda engine, names: (
            len(items),
            compare(engine, items, names, seed, say, judge),
        )

    if any(kind in CUT_KINDS or kind in (TYPING, PAIRS) for kind in kinds):
        files = files_below(options.folders) if options.folders else held_out_files()
        work.sources["held_out"] = {
            "from": sorted({file.package for file in files}),
            "files": len(files),
            "chars": sum(len(file.text) for file in files),
        }
        say(f"{len(files)} held-out files of {', '.join(work.sources['held_out']['from'])}")
    for kind in kinds:
        if kind in CUT_KINDS:
            work.tasks[kind] = answered(cut_items(files, kind, options.items, seed))
    if TYPING in kinds:
        lines = max(1, options.items // _ITEMS_A_RECORDING)
        made = recordings(files, lines, seed)
        work.tasks[TYPING] = lambda engine, names: (
            lines,
            run_typing(engine, made, seed, names, say),
        )
    if PAIRS in kinds:
        couples = pairs(files, options.items, seed)
        work.tasks[PAIRS] = lambda engine, names: (
            len(couples),
            run_pairs(engine, couples, seed, names, say),
        )
    if "benchmark" in kinds and options.benchmark is not None:
        found = humaneval_items(options.benchmark)
        if len(found) > options.items:
            places = sorted(random.Random(seed).sample(range(len(found)), options.items))
            found = [found[place] for place in places]
        work.tasks["benchmark"] = answered(found)
        work.sources["benchmark"] = {"from": str(options.benchmark)} | _own_solutions(found, say)
    repository = _repository(options, say) if REPOSITORY in kinds else None
    if repository is not None:
        shop = stack.enter_context(workshop(repository))
        say(f"making holes in {repository.folder} that its own tests miss")
        holes, facts = shop.items(min(options.items, MOST_HOLES), seed)
        say(
            f"{facts['items']} of {facts['statements_tried']} places are missed; what the model "
            f"writes runs behind the guards {', '.join(facts['guards'])}"
        )
        work.tasks[REPOSITORY] = answered(holes, shop.judge)
        work.sources["repository"] = facts
    return work


def _repository(options: EvaluationOptions, say: Say) -> Repository | None:
    """The repository that is named, or our own; None: there is none, which is said."""
    if options.repository is not None:
        return Repository(options.repository, arguments_of(options.tests))
    if options.folders and REPOSITORY not in options.kinds:
        return None
    own = own_repository()
    if own is None:
        say(
            "no holes in a repository: infilld was not installed from a checkout with its tests, "
            "or pytest is missing; name another one with --repository and --tests"
        )
    return own


def _own_solutions(items: Sequence[Item], say: Say) -> dict[str, Any]:
    """Whether the sandbox can tell right from wrong: the true texts ought to pass.

    Raises:
        ModelError: not one does.
    """
    found = [_run_program(item, item.missing) for item in items]
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
    _Column("both_exact", "both"),
    _Column("noise", "noise"),
    _Column("edit_similarity", "similar"),
    _Column("parse_rate", "parses"),
    _Column("abstained", "abstains"),
    _Column("precision", "precise"),
    _Column("shown_parse_rate", "shown ok"),
    _Column("saved", "saved"),
    _Column("shown", "shows"),
    _Column("whole", "whole"),
    _Column("starts", "starts"),
    _Column("median_passes", "p50 pass", is_share=False),
    _Column("p90_passes", "p90 pass", is_share=False),
    _Column("mean_passes", "passes", is_share=False),
    _Column("mean_prompt_tokens", "prompt", is_share=False),
    _Column("cold_ms", "cold ms", is_share=False),
    _Column("warm_ms", "warm ms", is_share=False),
    _Column("speed_up", "times", is_share=False),
    _Column("median_ms", "p50 ms", is_share=False),
    _Column("p90_ms", "p90 ms", is_share=False),
)


def _cell(value: Any, column: _Column) -> str:
    if value is None:
        return "-"
    if isinstance(value, (tuple, list)):
        return "–".join(f"{100 * bound:.1f}" for bound in value)
    return f"{100 * value:.1f}" if column.is_share else f"{value:.1f}"
