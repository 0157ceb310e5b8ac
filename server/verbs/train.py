"""`infilld train`: make a starter model from source code, or go on from a model."""

import argparse
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from infilld.server import wire
from infilld.server.settings import Settings
from infilld.server.verbs.flags import MANY, above_zero, whole
from infilld.server.verbs.models import folder_of

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

    from infilld.engine.training.trainer import Progress

OPTIONS = (
    *("sources", "base", "out", "state", "minutes", "pause_minutes", "size", "fresh", "seed"),
    *("items", "max_steps"),
)
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
    parser.add_argument(
        "--from",
        metavar="MODEL",
        dest="base",
        type=folder_of,
        help='go on from a model: its folder, or "starter"; needs FOLDERs',
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the finished model")
    parser.add_argument("--state", metavar="DIR", type=Path, help="what an interrupted run needs")
    parser.add_argument(
        "--minutes",
        metavar="N",
        type=above_zero(MOST_MINUTES),
        help="of training, resumed runs too; 60, or 10 with --from",
    )
    parser.add_argument(
        "--pause-minutes",
        metavar="N",
        type=above_zero(MOST_MINUTES),
        help="stop this run after so many, with a model; the same command goes on",
    )
    parser.add_argument("--size", choices=("cpu", "gpu"), help="about 3 M or 20 M parameters")
    parser.add_argument(
        "--fresh", action="store_const", const=True, help="forget an interrupted run"
    )
    parser.add_argument(
        "--seed", metavar="N", type=whole(0, wire.MAX_SEED), help="of every random draw"
    )
    parser.add_argument(
        "--items", metavar="N", type=whole(1, MANY), help="gaps to fill in the evaluation"
    )
    parser.add_argument("--max-steps", metavar="N", type=whole(1, MANY), help="end the run early")
    parser.add_argument("--json", action="store_true", help="print the evaluation as JSON")


def run(options: argparse.Namespace, settings: Settings) -> int:
    """Train; says how it goes on stderr and prints the evaluation at the end.

    Raises:
        RequestError: no usable source, a folder that cannot be written or holds another run, or a
            model to go on from that cannot be trained.
        ModelError: that model cannot be read, or no such device.
    """
    from infilld.engine.training.recipe import TrainOptions
    from infilld.engine.training.report import table, to_json
    from infilld.engine.training.run import train

    given = {name: value for name in OPTIONS if (value := getattr(options, name)) is not None}
    if "sources" in given:
        given["sources"] = tuple(given["sources"])
    wanted = TrainOptions(device=settings.device, **given)
    if sys.stderr.isatty():
        with Bar(wanted.planned_minutes) as bar:
            report = train(wanted, bar.say, bar.show)
    else:
        report = train(wanted, _say)
    sys.stdout.write(to_json(report) if options.json else table(report))
    return 0


class Bar:
    """A run on a terminal: a bar while steps are taken, lines before and after.

    Args:
        minutes: of the whole run.
    """

    def __init__(self, minutes: float) -> None:
        self._total_s = 60 * minutes
        self._live: RichProgress | None = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def say(self, line: str) -> None:
        """Write a line; the bar so far stays above it."""
        self._stop()
        _say(line)

    def show(self, progress: "Progress") -> None:
        """Move the bar to where the run is."""
        if self._live is None:
            self._live = self._started()
        (task,) = self._live.task_ids
        done_s = min(progress.elapsed_s, self._total_s)
        self._live.update(
            task,
            completed=done_s,
            refresh=True,
            told=f"{_clock(done_s)} done, {_clock(self._total_s - done_s)} left\n"
            f"step {progress.steps}  {progress.losses}  {progress.tokens_per_s:,.0f} tokens/s",
        )

    def _started(self) -> "RichProgress":
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        live = Progress(
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            TextColumn("{task.fields[told]}"),
            console=Console(stderr=True),
            # Steps redraw it; a thread that does would take time from them.
            auto_refresh=False,
        )
        live.add_task("", total=self._total_s, told="")
        live.start()
        return live

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
