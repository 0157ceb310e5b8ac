"""`infilld models`: what is configured, what a checkpoint holds, whether it fits, how to make it.

A GB is 10^9 bytes.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from infilld.server.settings import STARTER, Problem, Settings, SettingsProblem
from infilld.server.verbs import model_choice
from infilld.server.verbs.flags import whole

if TYPE_CHECKING:
    from infilld.engine.placement import Limits

_ACTIONS = ("list", "inspect", "use", "quantize")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "action",
        nargs="?",
        choices=_ACTIONS,
        default="list",
        help="list: the starter and what is configured; inspect: what DIR holds and whether it "
        "fits; use: have the daemon load DIR, now and from now on; quantize: write DIR in few "
        "bits to OUT",
    )
    parser.add_argument(
        "folder", nargs="?", metavar="DIR", help='checkpoint folder, GGUF file, or "starter"'
    )
    parser.add_argument("out", nargs="?", metavar="OUT", help="quantize: folder to make")
    parser.add_argument(
        "--no-switch", action="store_true", help="use: only for the next daemon, not one that runs"
    )
    asked = parser.add_argument_group("inspect", "what to plan for")
    asked.add_argument(
        "--context", dest="context_tokens", metavar="N", help="the same as --context-tokens"
    )
    asked.add_argument(
        "--memory",
        dest="memory_gb",
        metavar="GB",
        help="the same as --memory-gb: a GPU with so much, whether it is here or not",
    )
    how = parser.add_argument_group("quantize", "a plain checkpoint into few bits")
    how.add_argument("--kind", choices=("int4", "int8"), default="int4", help="int4 unless told")
    how.add_argument(
        "--group",
        type=whole(8, 1024),
        default=32,
        metavar="N",
        help="numbers that share a scale, a power of two; 32 unless told",
    )


def run(options: argparse.Namespace, wanted: Settings) -> int:
    """Do it; returns the exit code.

    Raises:
        SettingsProblem: no folder given where one is needed.
        Problem: a file cannot be written, or the daemon could not load the model.
        ServerProblem: the daemon refused.
        ModelError: the folder is no checkpoint that can be read.
    """
    action: str = options.action
    if action == "list":
        return _list(wanted, as_json=options.json)
    names = "DIR OUT" if action == "quantize" else "DIR"
    if options.folder is None or (action == "quantize" and options.out is None):
        number = "two folders" if action == "quantize" else "a folder"
        raise SettingsProblem(
            f"models {action} needs {number}", remedy=f"infilld models {action} {names}"
        )
    if action != "quantize" and options.out is not None:
        raise SettingsProblem(
            f"models {action} takes one folder, not {options.out} too",
            remedy=f"infilld models {action} {names}",
        )
    if action == "quantize":
        return _quantize(options, wanted)
    if action == "inspect":
        return _inspect(options.folder, wanted, as_json=options.json)
    return _use(options.folder, wanted, is_live=not options.no_switch)


def folder_of(model: str) -> Path:
    """The checkpoint folder, or GGUF file, of a name or a path."""
    if model == STARTER:
        return Path(str(resources.files("infilld.engine") / "starter"))
    return Path(os.path.abspath(Path(model).expanduser()))


def limits_of(wanted: Settings) -> "Limits":
    """What may be used of a GPU, as the engine takes it."""
    from infilld.engine.placement import Limits

    return Limits(
        context_tokens=None if wanted.context_tokens == "auto" else wanted.context_tokens,
        memory_bytes=None if wanted.memory_gb == "auto" else round(wanted.memory_gb * 1e9),
        key_values=None if wanted.key_values == "auto" else wanted.key_values,
        weights=None if wanted.weights == "auto" else wanted.weights,
    )


def inspect(
    folder: Path,
    device: str,
    limits: "Limits | None" = None,
) -> dict[str, object]:
    """What a checkpoint holds and whether it fits, from file headers alone.

    Args:
        folder: of the checkpoint, or a GGUF file.
        device: as in the settings.
        limits: as the daemon's. A limit of memory means a GPU that is planned for instead of the
            device; None: what is free there.

    Raises:
        ModelError: it cannot be read, the device cannot be used, or the model reads less context.
    """
    import torch

    from infilld.engine import memory
    from infilld.engine.checkpoints.loading import inspect_checkpoint
    from infilld.engine.placement import NO_LIMITS, place_on_gpu
    from infilld.engine.worker import pick_device

    limits = limits or NO_LIMITS
    memory_bytes = limits.memory_bytes
    found, chosen = inspect_checkpoint(folder), pick_device(device)
    budget = memory.budget_of(chosen, memory_bytes)
    if chosen.type == "cuda" or memory_bytes is not None:
        plan = place_on_gpu(found, limits, budget).plan
    else:
        plan = memory.plan_memory(
            found.config,
            memory.WeightBytes.of(found, torch.float32),
            on_gpu=False,
            context_tokens=limits.context_tokens,
            budget_bytes=budget,
        )
    config = found.config
    return {
        "folder": str(folder),
        "format": found.format,
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
        "device": str(chosen) if memory_bytes is None else "a GPU",
        "needed_bytes": plan.total_bytes,
        "available_bytes": memory.free_bytes(chosen) if memory_bytes is None else memory_bytes,
        "fits": plan.fits,
        "context_tokens": plan.context_tokens,
        "most_context_tokens": plan.largest_context(),
        "parts": [
            {
                "part": line.part,
                "storage": line.storage,
                "held_as": line.kind or "plain",
                "parameters": line.parameters,
                "stored_bytes": line.stored_bytes,
                "bits_per_weight": round(line.bits_per_weight, 2),
            }
            for line in found.parts
        ],
        "memory": [
            {"what": what, "bytes": count, "remark": remark} for what, count, remark in plan.rows
        ],
        "instead": [
            {
                "context_tokens": offer.context_tokens,
                "key_values": offer.key_values,
                "weights": offer.weights.storage,
                "needed_bytes": offer.total_bytes,
            }
            for offer in (() if plan.fits else memory.alternatives(plan))
        ],
        "notes": list(found.notes),
    }


def inspect_usable(folder: Path, device: str) -> dict[str, object]:
    """As `inspect`, for a folder that a daemon is to load: it needs a tokenizer too.

    Raises:
        ModelError: a daemon could not load it.
    """
    from infilld.engine.tokenizer import Tokenizer

    report = inspect(folder, device)
    vocab_tokens = report["vocab_tokens"]
    assert isinstance(vocab_tokens, int)
    Tokenizer.from_folder(folder if folder.is_dir() else folder.parent, vocab_tokens)
    return report


def _list(wanted: Settings, *, as_json: bool) -> int:
    rows: list[dict[str, object]] = []
    for name in dict.fromkeys((STARTER, wanted.model)):
        folder = folder_of(name)
        rows.append(
            {
                "model": name,
                "folder": str(folder),
                "configured": name == wanted.model and wanted.engine_url is None,
                "present": (folder / "config.json").is_file() or _stored_bytes(folder) > 0,
                "stored_bytes": _stored_bytes(folder),
            }
        )
    if wanted.engine_url is not None:
        there = {"model": wanted.engine_model, "folder": None, "url": wanted.engine_url}
        rows.insert(0, {**there, "configured": True, "present": True, "stored_bytes": 0})
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
        return 0
    for row in rows:
        if row["folder"] is None:
            sys.stdout.write(f"* {row['model']}  of the remote engine at {row['url']}\n")
            continue
        mark = "*" if row["configured"] else " "
        state = _size(row["stored_bytes"]) if row["present"] else "no checkpoint there"
        sys.stdout.write(f"{mark} {row['model']}  {state}  {row['folder']}\n")
    return 0


def _inspect(name: str, wanted: Settings, *, as_json: bool) -> int:
    report = inspect(folder_of(name), wanted.device, limits_of(wanted))
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return 0
    for key, value in report.items():
        if not isinstance(value, list) or key == "dtypes":
            shown = _size(value) if key.endswith("_bytes") else _shown(value)
            sys.stdout.write(f"{key.removesuffix('_bytes'):<20}{shown}\n")
    _table("stored", report["parts"], _part_line)
    _table("memory", report["memory"], _memory_line)
    _table("what fits instead", report["instead"], _offer_line)
    _table("notes", report["notes"], str)
    return 0


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(title: str, rows: object, line: Callable[..., str]) -> None:
    assert isinstance(rows, list)
    if rows:
        sys.stdout.write(f"\n{title}\n" + "".join(f"  {line(row)}\n" for row in rows))


def _part_line(row: Mapping[str, object]) -> str:
    held = "" if row["held_as"] == "plain" else f"  held as {row['held_as']}"
    return (
        f"{row['part']!s:<18}{row['storage']!s:<22}{row['bits_per_weight']:>6} bits"
        f"{_size(row['stored_bytes']):>12}{held}"
    )


def _memory_line(row: Mapping[str, object]) -> str:
    return f"{row['what']!s:<26}{_size(row['bytes']):>12}  {row['remark']}".rstrip()


def _offer_line(row: Mapping[str, object]) -> str:
    how = f"weights {row['weights']}, keys and values in {row['key_values']}"
    return f"a context of {row['context_tokens']:,} tokens: {_size(row['needed_bytes'])}, {how}"


def _size(count: object) -> str:
    if not isinstance(count, int):
        return "unknown"
    if count >= 1_000_000_000:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _quantize(options: argparse.Namespace, wanted: Settings) -> int:
    """Write a plain checkpoint in few bits to a folder of its own."""
    from infilld.engine.checkpoints.quantizing import Quantization
    from infilld.engine.checkpoints.streaming import quantize_folder
    from infilld.engine.worker import pick_device

    source, out = folder_of(options.folder), folder_of(options.out)
    try:
        how = Quantization(kind=options.kind, group=options.group)
    except ValueError as error:
        raise SettingsProblem(str(error), remedy="--group 32") from None
    begun = time.monotonic()
    try:
        with _bar() as progress:
            quantize_folder(source, out, how, device=pick_device(wanted.device), progress=progress)
    except OSError as error:
        raise Problem(f"cannot write {out}: {error.strerror}") from error
    report = {
        "folder": str(out),
        "kind": how.kind,
        "group": how.group,
        "stored_bytes": _stored_bytes(out),
        "seconds": round(time.monotonic() - begun, 1),
    }
    if options.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return 0
    sys.stdout.write(
        f"{out}: {how.kind} in groups of {how.group}, {_size(report['stored_bytes'])} of "
        f"{_size(_stored_bytes(source))}, {report['seconds']} s\n"
        f"Use it with: infilld models use {out}\n"
    )
    return 0


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, if there is one, that is told of bytes done and bytes in all."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    with Progress(
        BarColumn(), DownloadColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _stored_bytes(folder: Path) -> int:
    return sum(
        file.stat().st_size
        for kind in ("*.safetensors", "*.gguf")
        for file in ((folder,) if folder.match(kind) else folder.glob(kind))
    )


def _use(name: str, wanted: Settings, *, is_live: bool) -> int:
    """Configure a model that could be loaded."""
    folder = folder_of(name)
    inspect_usable(folder, wanted.device)
    model_choice.choose(STARTER if name == STARTER else str(folder), wanted, is_live=is_live)
    return 0
