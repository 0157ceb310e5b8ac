"""A plain checkpoint into few bits while it is read, and the result kept for the next time.

Host memory holds the files of one tensor, that tensor, and half a gigabyte of the result until it
is written; all of the result only where it cannot be kept on disk. Measured: a checkpoint of 1.46
GB in files of 236 MB took 690 MB beside what torch takes, and 25 MB when it was read again.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infilld.engine.checkpoints import kept
from infilld.engine.checkpoints.files import Reader
from infilld.engine.checkpoints.gguf import gguf_in
from infilld.engine.checkpoints.loading import refuse_untied
from infilld.engine.checkpoints.plan import Piece, Plan, make_plan
from infilld.engine.checkpoints.quantizing import (
    Quantization,
    bits_per_weight,
    is_quantizable,
    quantize_rows,
)
from infilld.engine.checkpoints.weights import Weights
from infilld.engine.config import read_json
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing
from infilld.kernels._weights import QuantizedWeight

log = logging.getLogger(__name__)

# Called with bytes of the source that are done, and all of them.
Progress = Callable[[int, int], None]
_ROOM_BYTES = 1_000_000_000


def cache_folder() -> Path:
    """Where quantized checkpoints are kept, `$XDG_CACHE_HOME/infilld/quantized`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "infilld" / "quantized"


def read_quantized(
    source: Path,
    quantization: Quantization,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    computed_on: str | torch.device | None = None,
    progress: Progress | None = None,
) -> Weights:
    """The weights of a plain checkpoint in few bits, from what was kept of the last time, or anew.

    What is kept is found by names, sizes and times of the source's files and by how they were
    quantized. It is removed where it is broken. Where it cannot be written, nothing is kept.

    Args:
        source: folder of a plain checkpoint.
        quantization: kind and group.
        device: where the weights go. computed_on: where they are quantized; None: there too.
        dtype: of plain weights; they are kept as the source has them.
        progress: told of bytes that are done; not called where nothing has to be done.

    Raises:
        CheckpointMissing, CheckpointMismatch: the source cannot be read, or is quantized already.
    """
    plan = _plan_of(source)
    computing = torch.device(device if computed_on is None else computed_on)
    root = cache_folder()
    folder = root / _fingerprint(source, plan, quantization)
    with _locked(root, folder.name) as is_writable:
        found = _kept_weights(folder, device, dtype)
        if found is not None:
            return found
        if is_writable:
            _forget_older(root, source, quantization)
        needed_bytes = _result_bytes(plan, quantization)
        if is_writable and shutil.disk_usage(root).free >= needed_bytes + _ROOM_BYTES:
            try:
                _write(folder, source, plan, quantization, computing, progress)
                return kept.read_kept(folder, device=device, dtype=dtype)
            except OSError as error:
                log.warning("%s: the quantized weights are not kept: %s", folder, error)
        else:
            log.warning("%s: no room to keep %.1f GB", root, needed_bytes / 1e9)
    tensors: dict[str, Tensor | QuantizedWeight] = {}
    for name, held in _stream(plan, quantization, computing, progress):
        tensors[name] = _placed(held, device, dtype)
    return Weights(
        config=plan.config,
        tensors=tensors,
        format=f"{kept.METHOD} {quantization.kind}",
        notes=_notes(plan, quantization),
        vision_tensors=plan.vision_tensors,
    )


def quantize_folder(
    source: Path,
    out: Path,
    quantization: Quantization,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> None:
    """Write a plain checkpoint in few bits to a folder that can be used by itself.

    Args:
        source: folder of a plain checkpoint.
        out: folder to make; nothing may be there but an empty folder.
        quantization: kind and group.
        device: where to compute.
        progress: told of bytes that are done.

    Raises:
        CheckpointMissing, CheckpointMismatch: the source cannot be read, or is quantized already.
        OSError: the folder cannot be written; nothing is left of it.
    """
    plan = _plan_of(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(17, "exists and is not an empty folder", str(out))
    needed_bytes = _result_bytes(plan, quantization)
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < needed_bytes:
        raise OSError(28, f"no room for {needed_bytes / 1e9:.2f} GB", str(out))
    _write(out, source, plan, quantization, torch.device(device), progress, for_itself=True)


@dataclass(frozen=True)
class _Turn:
    """What is quantized at once: a tensor of the model, and its pieces."""

    name: str
    shape: tuple[int, ...]
    pieces: Sequence[Piece]
    paths: frozenset[Path]


def _plan_of(source: Path) -> Plan:
    if kept.is_kept(source):
        raise CheckpointMismatch(
            f"{source} is quantized already ({kept.METHOD})", remedy="Use it as it is."
        )
    if gguf_in(source) is not None:
        raise CheckpointMismatch(
            f"{source} holds a GGUF file, expected plain safetensors files",
            remedy="Use it as it is.",
        )
    plan = make_plan(source)
    if not plan.is_plain:
        raise CheckpointMismatch(
            f"{source} is quantized already ({plan.format})", remedy="Use it as it is."
        )
    return plan


def _stream(
    plan: Plan, quantization: Quantization, device: torch.device, progress: Progress | None
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Every tensor of the model, quantized or as it is stored, file by file."""
    order = {path: number for number, path in enumerate(plan.files)}
    turns = [
        _Turn(
            name,
            tuple(plan.shapes[name]),
            pieces,
            frozenset(piece.entry.path for piece in pieces),
        )
        for name, pieces in plan.pieces.items()
    ]
    turns.sort(key=lambda turn: min(order[path] for path in turn.paths))
    total = sum(piece.nbytes for turn in turns for piece in turn.pieces)
    done = 0
    with ExitStack() as stack:
        open_paths: frozenset[Path] = frozenset()
        reader: Reader | None = None
        for turn in turns:
            if reader is None or turn.paths != open_paths:
                # Forgets the files before, and with them their pages.
                stack.close()
                reader = stack.enter_context(Reader())
                open_paths = turn.paths
            whole = _whole(turn, reader)
            if turn.name == "embed_tokens.weight" and plan.head is not None:
                refuse_untied(reader.tensor(plan.head), whole)
            if is_quantizable(turn.name, turn.shape):
                yield turn.name, _in_few_bits(turn, whole, quantization, device)
            else:
                yield turn.name, whole
            done += sum(piece.nbytes for piece in turn.pieces)
            if progress is not None:
                progress(done, total)


def _whole(turn: _Turn, reader: Reader) -> Tensor:
    if len(turn.pieces) == 1 and tuple(turn.pieces[0].shape) == turn.shape:
        return reader.tensor(turn.pieces[0].entry)
    first = reader.tensor(turn.pieces[0].entry)
    whole = torch.empty(turn.shape, dtype=first.dtype)
    for piece in turn.pieces:
        piece.place.of(whole).copy_(reader.tensor(piece.entry))
    return whole


def _in_few_bits(
    turn: _Turn, whole: Tensor, quantization: Quantization, device: torch.device
) -> QuantizedWeight:
    try:
        return quantize_rows(whole.to(device), quantization)
    except ValueError as error:
        raise CheckpointMismatch(
            f"{turn.pieces[0].name}: {error}", remedy="Download the checkpoint again."
        ) from None


def _placed(
    held: Tensor | QuantizedWeight, device: str | torch.device, dtype: torch.dtype
) -> Tensor | QuantizedWeight:
    if isinstance(held, QuantizedWeight):
        return held.to(device)
    placed = held.to(device, dtype)
    # A view would keep the whole file mapped.
    return placed.clone() if placed is held else placed


def _notes(plan: Plan, quantization: Quantization) -> tuple[str, ...]:
    how = f"quantized here to {quantization.kind} in groups of {quantization.group}"
    return (*plan.notes, f"{how} from {plan.format} tensors")


def _result_bytes(plan: Plan, quantization: Quantization) -> int:
    """Bytes of the result on disk."""
    total = 0.0
    for name, pieces in plan.pieces.items():
        shape = tuple(plan.shapes[name])
        if is_quantizable(name, shape):
            count = sum(piece.entry.numbers for piece in pieces)
            total += count * bits_per_weight(shape[-1], quantization) / 8
        else:
            total += sum(piece.nbytes for piece in pieces)
    return int(total)


def _write(
    folder: Path,
    source: Path,
    plan: Plan,
    quantization: Quantization,
    device: torch.device,
    progress: Progress | None,
    *,
    for_itself: bool = False,
) -> None:
    """Write a whole folder beside its place, then move it there.

    Either it is to be used by itself, or it says what it was made from.
    """
    if for_itself:
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        draft.chmod(0o755)
    else:
        # Whoever made one and was killed had the lock that we have.
        draft = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    try:
        writer = kept.Writer(draft)
        for name, held in _stream(plan, quantization, device, progress):
            writer.add(name, held)
        if for_itself:
            kept.copy_beside(source, draft)
        writer.finish(
            read_json(source, "config.json"),
            asdict(quantization),
            notes=_notes(plan, quantization),
            source=None if for_itself else source,
        )
        os.replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _kept_weights(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Weights | None:
    """What was kept; None where there is nothing, or was nothing whole."""
    if not folder.is_dir():
        return None
    try:
        return kept.read_kept(folder, device=device, dtype=dtype)
    except (CheckpointMissing, CheckpointMismatch) as error:
        log.warning("removing what was kept: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _fingerprint(source: Path, plan: Plan, quantization: Quantization) -> str:
    """A name for what comes of these files when they are quantized so."""
    files: list[object] = []
    for path in (*plan.files, source / "config.json"):
        found = path.stat()
        files.append([path.name, found.st_size, found.st_mtime_ns])
    told: Mapping[str, Any] = {"files": files, "how": asdict(quantization)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _locked(root: Path, name: str) -> Iterator[bool]:
    """Be the only process that makes or removes `name`; false where nothing can be written."""
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(root / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        log.warning("%s: %s", root, error.strerror)
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process quantizes the same checkpoint; waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield True
    finally:
        os.close(descriptor)


def _forget_older(root: Path, source: Path, quantization: Quantization) -> None:
    """Remove what was kept of earlier files in the same folder, quantized in the same way."""
    for folder in root.iterdir():
        if not folder.is_dir() or kept.made_from(folder) != source.resolve():
            continue
        try:
            announced = read_json(folder, "config.json").get("quantization_config")
        except (CheckpointMissing, CheckpointMismatch):
            continue
        if isinstance(announced, dict) and announced.items() >= asdict(quantization).items():
            log.info("removing %s, which was made from earlier files", folder)
            shutil.rmtree(folder, ignore_errors=True)
