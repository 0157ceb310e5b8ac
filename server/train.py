"""`infilld train`: make a starter model from source code."""

import argparse
import json
import sys
from pathlib import Path

from infilld.server import wire
from infilld.server.flags import MANY, above_zero, whole
from infilld.server.settings import Settings

OPTIONS = ("sources", "out", "state", "minutes", "size", "fresh", "seed", "max_steps")
"""The fields of `TrainOptions` that are flags of the verb; `device` is a setting."""

MOST_MINUTES = 600_000
"""More than a year."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb; what is not given is left to `TrainOptions`, which needs torch."""
    parser.add_argument(
        "sources",
        metavar="FOLDER",
        nargs="*",
        type=Path,
        default=None,
        help="Python source to learn from; none: the standard library and the permissively "
        "licensed packages that are installed here",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the finished model")
    parser.add_argument("--state", metavar="DIR", type=Path, help="what an interrupted run needs")
    parser.add_argument(
        "--minutes",
        metavar="N",
        type=above_zero(MOST_MINUTES),
        help="of training, resumed runs too",
    )
    parser.add_argument("--size", choices=("cpu", "gpu"), help="about 2 M or 20 M parameters")
    parser.add_argument(
        "--fresh", action="store_const", const=True, help="forget an interrupted run"
    )
    parser.add_argument(
        "--seed", metavar="N", type=whole(0, wire.MAX_SEED), help="of every random draw"
    )
    parser.add_argument("--max-steps", metavar="N", type=whole(1, MANY), help="end the run early")
    parser.add_argument("--json", action="store_true", help="print the evaluation as JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Train; says how it goes on stderr and prints the evaluation at the end.

    Raises:
        RequestError: no usable source, or a folder that cannot be written.
        UnsupportedDevice: no such device.
    """
    from infilld.engine.training.recipe import TrainOptions
    from infilld.engine.training.run import train

    given = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    if "sources" in given:
        given["sources"] = tuple(given["sources"])
    report = train(TrainOptions(device=settings.device, **given), _say)
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        for name, value in report.items():
            sys.stdout.write(f"{name:<28}{value}\n")
    return 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
