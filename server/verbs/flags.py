"""Types of the command line's numbers, for argparse: out of range is bad usage; and vain flags."""

import argparse
import sys
from collections.abc import Callable, Collection

from infilld.server import discovery
from infilld.server.settings import KEYS, Settings

MANY = 1_000_000_000
"""The highest count where nothing but memory and patience sets a bound."""


def whole(low: int, high: int) -> Callable[[str], int]:
    """A reader of whole numbers from `low`, which is 0 or more, to `high`, both included."""

    def read(text: str) -> int:
        # Python's own reading takes 1_000, signs, spaces and digits of every script.
        digits = (text.lstrip("0") or "0") if text.isascii() and text.isdigit() else ""
        if not 1 <= len(digits) <= len(str(high)) or not low <= int(digits) <= high:
            raise argparse.ArgumentTypeError(
                f"{_shown(text)}: expected a whole number from {low} to {high}"
            )
        return int(digits)

    return read


def above_zero(high: float) -> Callable[[str], float]:
    """A reader of numbers above 0 and up to `high`."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0 < number <= high:  # refuses nan too
            raise argparse.ArgumentTypeError(
                f"{_shown(text)}: expected a number above 0 and up to {high:g}"
            )
        return number

    return read


def share() -> Callable[[str], float]:
    """A reader of numbers from 0 to 1, both included."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if not 0 <= number <= 1:  # refuses nan too
            raise argparse.ArgumentTypeError(f"{_shown(text)}: expected a number from 0 to 1")
        return number

    return read


def some_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """A reader of names out of `known`, with commas between them."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{_shown(name)}: expected some of {', '.join(known)}"
                )
        return names

    return read


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}…"


def warn_of_vain_flags(options: argparse.Namespace, settings: Settings) -> None:
    """Say which flags change nothing, since a daemon runs that was started with others."""
    names = [name for name in KEYS if name != "state_dir"]
    vain = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
    pid = discovery.running_pid(settings) if vain else None
    if pid is not None:
        sys.stderr.write(
            f"infilld: {', '.join(vain)} {'counts' if len(vain) == 1 else 'count'} "
            "when the daemon starts, and one runs already "
            f"(pid {pid}); `infilld stop` ends it\n"
        )
