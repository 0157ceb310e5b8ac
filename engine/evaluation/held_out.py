"""Files that the starter model never saw: those of the packages kept from it by name."""

import os
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path

from infilld.engine.errors import RequestError
from infilld.engine.training.corpus import CALIBRATION, HELD_OUT, SourceFile, collect_folders


def held_out_files() -> list[SourceFile]:
    """Files of the held-out packages that are installed here.

    Unlike `collect_installed` this reads no other package, so files that are nearly copies of
    files elsewhere stay in.

    Raises:
        RequestError: none of them is installed.
    """
    return _files_of(HELD_OUT, "held-out packages")


def calibration_files() -> list[SourceFile]:
    """Files of the packages kept for calibration, which the standard library has.

    Raises:
        RequestError: none of them is installed.
    """
    return _files_of(CALIBRATION, "packages kept for calibration")


def _files_of(packages: Collection[str], what: str) -> list[SourceFile]:
    # A leading underscore marks the inner part of a package of that name, as in `_pytest`.
    names = [name for package in sorted(packages) for name in (package, f"_{package}")]
    specs = [spec for name in names if (spec := find_spec(name)) is not None]
    folders = [Path(path) for spec in specs for path in spec.submodule_search_locations or ()]
    if not folders:
        raise RequestError(
            f"none of the {what} is installed: {', '.join(sorted(packages))}",
            remedy="Name folders of Python source that the model was not trained on.",
        )
    return files_below(folders)


def files_below(folders: Sequence[Path]) -> list[SourceFile]:
    """Every usable Python file below some folders, copies left out.

    Raises:
        RequestError: a folder is not there or cannot be read, or none holds a usable file.
    """
    for folder in folders:
        if folder.exists() and not os.access(folder, os.R_OK | (os.X_OK * folder.is_dir())):
            raise RequestError(f"cannot read {folder}", remedy="Name a folder that you may read.")
    try:
        # A share of 0 holds nothing out: every file is handed back.
        return collect_folders(folders, held_out_share=0.0).training
    except FileNotFoundError as error:
        raise RequestError(
            str(error), remedy="Name folders that hold .py files of 200 to 100,000 bytes."
        ) from None
