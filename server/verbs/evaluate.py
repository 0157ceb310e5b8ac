"""`infilld eval`: how good the configured model is, beside what it has to beat."""

import argparse
import json
import os
import sys
from pathlib import Path

from infilld.engine.evaluation.names import CONTENDERS, KINDS
from infilld.server import wire
from infilld.server.process import files
from infilld.server.settings import Problem, Settings
from infilld.server.verbs import models
from infilld.server.verbs.flags import MANY, some_of, whole


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        type=Path,
        help="Python source that the model never saw; none: the packages held out of the starter "
        "model's training that are installed here",
    )
    parser.add_argument(
        "--benchmark",
        metavar="DIR",
        type=Path,
        help="also a benchmark in the format of openai/human-eval-infilling; its tests run what "
        "the model writes, in a child process that can do little",
    )
    parser.add_argument(
        "--repository",
        metavar="DIR",
        type=Path,
        help="holes in this repository, whose own tests judge what fills them, in a child process "
        "that can do little; not given: infilld's own, in a checkout of it",
    )
    parser.add_argument(
        "--tests",
        metavar="ARGUMENTS",
        action="append",
        default=[],
        help="pytest's arguments in the repository, in one word; again for another call of pytest",
    )
    parser.add_argument(
        "--items",
        metavar="N",
        type=whole(1, MANY),
        default=100,
        help="gaps of each kind; typed lines are a tenth as many, holes at most 30",
    )
    parser.add_argument(
        "--kinds",
        metavar="A,B",
        type=some_of(KINDS),
        default=(),
        help=f"of gaps: {', '.join(KINDS)}; not given: all",
    )
    parser.add_argument(
        "--contenders",
        metavar="A,B",
        type=some_of(CONTENDERS),
        default=(),
        help=f"what answers: {', '.join(CONTENDERS)}; not given: all",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=whole(0, wire.MAX_SEED),
        default=0,
        help="of the choice of gaps and of every random draw",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the report as JSON")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Evaluate; says how it goes on stderr and prints tables at the end.

    Raises:
        Problem: the report cannot be written.
        RequestError: no source, no benchmark, or the model cannot infill.
        ModelError: the checkpoint or the device will not do.
    """
    from infilld.engine.evaluation.run import EvaluationOptions, format_evaluation, run_evaluation

    wanted = EvaluationOptions(
        folders=tuple(options.folders),
        benchmark=options.benchmark,
        repository=options.repository,
        tests=tuple(options.tests),
        items=options.items,
        seed=options.seed,
        kinds=options.kinds,
        contenders=options.contenders,
    )
    if options.out is not None:
        _refuse_unwritable(options.out)
    report = run_evaluation(models.folder_of(settings.model), settings.device, wanted, _say)
    text = json.dumps(report, indent=2) + "\n"
    if options.out is not None:
        try:
            files.put(options.out, text.encode())
        except OSError as error:
            # Minutes of work are not to be lost with it.
            sys.stdout.write(text)
            raise _unwritable(options.out, str(error)) from None
    sys.stdout.write(text if options.json else format_evaluation(report) + "\n")
    return 0


def _refuse_unwritable(path: Path) -> None:
    """Before the work is done, not after it."""
    if path.is_dir():
        raise _unwritable(path, "it is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise _unwritable(path, "its folder is not there or not yours")


def _unwritable(path: Path, why: str) -> Problem:
    return Problem(f"cannot write {path}: {why}", remedy="Choose another file with --out.")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
