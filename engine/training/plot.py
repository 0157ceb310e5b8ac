"""The losses of a run as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path

_SIZE_INCHES, _DOTS_PER_INCH = (8.0, 4.5), 120


def plot_losses(history: Sequence[Sequence[float]], path: Path) -> None:
    """Draw encoder and gap losses over the minutes of a run.

    Args:
        history: as in `Progress`; a loss that is no number leaves its line out there.
        path: of the picture, a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Here and not above: training does without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, column in (("encoder", 1), ("gap, fillers too", 2)):
        found = [(row[0] / 60, row[column]) for row in history if math.isfinite(row[column])]
        axes.plot([at for at, _ in found], [nats for _, nats in found], marker=".", label=name)
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("nats a token, smoothed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
