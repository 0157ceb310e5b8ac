"""Items of a benchmark in the format of openai/human-eval-infilling, from files of the caller."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from infilld.engine.errors import RequestError
from infilld.engine.evaluation.items import Check, Item

_FIELDS = ("task_id", "entry_point", "prompt", "suffix", "canonical_solution", "test")
_PREFERRED = "RandomSpanInfillingLight.jsonl.gz"


def humaneval_items(folder: Path) -> list[Item]:
    """The items of a folder's benchmark files, in their order.

    Args:
        folder: holds RandomSpanInfillingLight.jsonl.gz, which is then the only file read, or
            other files that end in .jsonl or .jsonl.gz.

    Raises:
        RequestError: no such file, or one that is malformed; names the file and the line.
    """
    remedy = f"Name a folder that holds {_PREFERRED}, as openai/human-eval-infilling gives it."
    if not folder.is_dir():
        raise RequestError(f"no folder {folder}", remedy=remedy)
    paths = sorted(p for p in folder.iterdir() if p.name.endswith((".jsonl", ".jsonl.gz")))
    paths = [path for path in paths if path.name == _PREFERRED] or paths
    items = [item for path in paths for item in _items(path)]
    if not items:
        raise RequestError(f"no benchmark item in {folder}", remedy=remedy)
    return items


def _items(path: Path) -> Iterator[Item]:
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise _malformed(f"{path}: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield _item(json.loads(line))
        except ValueError as error:
            raise _malformed(f"{path}, line {number}: {error}") from None


def _malformed(what: str) -> RequestError:
    return RequestError(
        what, remedy="Get the file anew: every line of it is one JSON object of the benchmark."
    )


def _item(row: object) -> Item:
    """One line as an item.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for name in _FIELDS:
        if not isinstance(row.get(name), str):
            raise ValueError(f"no text named {name!r}")
    if not row["canonical_solution"]:
        raise ValueError("'canonical_solution' is empty")
    check = Check(row["test"], row["entry_point"])
    before, missing, after = row["prompt"], row["canonical_solution"], row["suffix"]
    return Item("benchmark", before, missing, after, row["task_id"], check)
