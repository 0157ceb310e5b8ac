"""`infilld models`: what is configured, what a checkpoint holds, whether it fits."""

import argparse
import json
import os
import re
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from infilld.server import discovery, files, settings
from infilld.server.settings import STARTER, Problem, Settings, SettingsProblem

if TYPE_CHECKING:
    import torch

_MODEL_LINE = re.compile(r"^[ \t]*model[ \t]*=.*$", re.MULTILINE)
_FIRST_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("action", nargs="?", choices=("list", "inspect", "use"), default="list")
    parser.add_argument("folder", nargs="?", metavar="DIR", help='checkpoint folder, or "starter"')


def run(options: argparse.Namespace, wanted: Settings) -> int:
    """Do it; returns the exit code.

    Raises:
        SettingsProblem: no folder given where one is needed.
        Problem: the configuration cannot be written.
        ModelError: the folder is no checkpoint that can be read.
    """
    if options.action == "list":
        return _list(wanted, as_json=options.json)
    if options.folder is None:
        raise SettingsProblem(
            f"models {options.action} needs a folder",
            remedy=f"infilld models {options.action} DIR",
        )
    if options.action == "inspect":
        return _inspect(options.folder, wanted, as_json=options.json)
    return _use(options.folder, wanted)


def folder_of(model: str) -> Path:
    """The checkpoint folder of a name or a path."""
    if model == STARTER:
        return Path(str(resources.files("infilld.engine") / "starter"))
    return Path(os.path.abspath(Path(model).expanduser()))


def inspect(folder: Path, device: str) -> dict[str, object]:
    """What a checkpoint holds and whether it fits, from file headers alone.

    Raises:
        ModelError: it cannot be read, or the device cannot be used.
    """
    from infilld.engine.checkpoints.loading import inspect_checkpoint
    from infilld.engine.worker import pick_device

    found, chosen = inspect_checkpoint(folder), pick_device(device)
    # As the worker loads it: two bytes a parameter on a GPU, four on a CPU.
    needed_bytes = found.parameters * (2 if chosen.type == "cuda" else 4)
    available_bytes = _available_bytes(chosen)
    config = found.config
    return {
        "folder": str(folder),
        "parameters": found.parameters,
        "stored_bytes": found.text_bytes,
        "dtypes": list(found.dtypes),
        "files": len(found.files),
        "layers": config.layers,
        "width": config.width,
        "experts": config.experts,
        "vocab_tokens": config.vocab_tokens,
        "canvas_tokens": config.canvas_tokens,
        "vision_tensors": found.vision_tensors,
        "device": str(chosen),
        "needed_bytes": needed_bytes,
        "available_bytes": available_bytes,
        "fits": available_bytes is None or needed_bytes < available_bytes,
    }


def inspect_usable(folder: Path, device: str) -> dict[str, object]:
    """As `inspect`, for a folder that a daemon is to load: it needs a tokenizer too.

    Raises:
        ModelError: a daemon could not load it.
    """
    from infilld.engine.config import ModelConfig
    from infilld.engine.tokenizer import Tokenizer

    report = inspect(folder, device)
    Tokenizer.from_folder(folder, ModelConfig.from_folder(folder).vocab_tokens)
    return report


def _available_bytes(device: "torch.device") -> int | None:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        told = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", told, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _list(wanted: Settings, *, as_json: bool) -> int:
    rows: list[dict[str, object]] = []
    for name in dict.fromkeys((STARTER, wanted.model)):
        folder = folder_of(name)
        rows.append(
            {
                "model": name,
                "folder": str(folder),
                "configured": name == wanted.model,
                "present": (folder / "config.json").is_file(),
                "stored_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            }
        )
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    for row in rows:
        mark = "*" if row["configured"] else " "
        state = f"{_megabytes(row['stored_bytes'])}" if row["present"] else "no checkpoint there"
        sys.stdout.write(f"{mark} {row['model']}  {state}  {row['folder']}\n")
    return 0


def _inspect(name: str, wanted: Settings, *, as_json: bool) -> int:
    report = inspect(folder_of(name), wanted.device)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return 0
    for key, value in report.items():
        shown = _megabytes(value) if key.endswith("_bytes") else value
        sys.stdout.write(f"{key.removesuffix('_bytes'):<16}{shown}\n")
    return 0


def _megabytes(count: object) -> str:
    return f"{count / 1e6:.1f} MB" if isinstance(count, int) else "unknown"


def _use(name: str, wanted: Settings) -> int:
    """Configure a model; what the daemon has loaded stays until it is started again."""
    folder = folder_of(name)
    inspect_usable(folder, wanted.device)
    model = STARTER if name == STARTER else str(folder)
    path = settings.config_folder() / "config.toml"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.put(path, with_model(old, model).encode())
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}") from error
    sys.stdout.write(f"model = {model} in {path}\n")
    if discovery.running_pid(wanted) is not None:
        sys.stdout.write("The running daemon keeps its model until: infilld stop\n")
    return 0


def with_model(toml: str, model: str) -> str:
    """A configuration with another `model`, the rest as it was."""
    # JSON's escapes are TOML's, except for DEL, which TOML wants escaped.
    line = f"model = {json.dumps(model, ensure_ascii=False)}".replace("\x7f", "\\u007f")
    tables = _FIRST_TABLE.search(toml)
    top = toml[: tables.start()] if tables else toml
    rest = toml[len(top) :]
    if _MODEL_LINE.search(top):
        return _MODEL_LINE.sub(lambda _: line, top, count=1) + rest
    return f"{line}\n{top}{rest}"
