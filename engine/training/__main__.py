"""`python -m infilld.engine.training`: training where only the engine's own packages are.

The same as `infilld train`, without the daemon's packages and without a progress bar.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from infilld.engine.errors import InfilldError
from infilld.engine.training.recipe import SizeName, TrainOptions
from infilld.engine.training.report import table
from infilld.engine.training.run import train
from infilld.engine.worker import starter_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns 0 done, 1 failed, 130 interrupted: the same command goes on."""
    given = vars(_parser().parse_args(argv))
    if "sources" in given:
        given["sources"] = tuple(given["sources"])
    try:
        report = train(TrainOptions(**given), _say)
    except KeyboardInterrupt:
        return 130
    except InfilldError as error:
        _say(f"{error}\n  {error.remedy}" if error.remedy else str(error))
        return 1
    sys.stdout.write(table(report))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infilld.engine.training",
        description="Make a small model from Python source, or go on from one.",
        allow_abbrev=False,
        # What is not given is left to `TrainOptions`.
        argument_default=argparse.SUPPRESS,
    )
    flag = parser.add_argument
    flag("sources", metavar="FOLDER", nargs="*", type=Path, help="none: what is installed here")
    flag(
        "--from", dest="base", metavar="DIR", type=_model, help='model to go on from, or "starter"'
    )
    flag("--out", metavar="DIR", type=Path, help="folder of the finished model")
    flag("--state", metavar="DIR", type=Path, help="what an interrupted run needs")
    flag("--size", choices=get_args(SizeName), help="about 3 M or 20 M parameters")
    flag("--minutes", metavar="N", type=float, help="of training, resumed runs too")
    flag("--pause-minutes", metavar="N", type=float, help="stop this run after so many minutes")
    flag("--device", metavar="NAME", help='"cpu", "cuda", "cuda:N" or "auto"')
    flag("--items", metavar="N", type=int, help="gaps to fill in the evaluation")
    flag("--seed", metavar="N", type=int, help="of every random draw")
    flag("--max-steps", metavar="N", type=int, help="end the run early")
    flag("--fresh", action="store_true", help="forget an interrupted run")
    return parser


def _model(name: str) -> Path:
    return starter_folder() if name == "starter" else Path(name)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
