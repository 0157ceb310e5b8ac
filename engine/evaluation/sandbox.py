"""Runs a program and its tests in a child process that can do little.

What a model writes may loop, fill memory or delete things by accident. The child is a fresh
interpreter without site packages, environment or input, in an empty folder of its own. What it
prints is thrown away. It may use 512 MB of memory, write 64 files of 1 MB, and run for so many
seconds; then it is killed.

| guard | where | the program cannot |
|---|---|---|
| limits | everywhere | use more than that; start processes, unless it is root |
| audit | everywhere | in Python: open sockets, start processes, signal, write elsewhere |
| namespaces | Linux that permits it | reach a network |
| landlock | Linux 5.13 | reach files but Python's, the system libraries' and its own |
| seccomp | Linux on x86-64 | start processes or threads, open sockets, signal, leave its group |

Where landlock or seccomp is missing, a program made to do harm can do it; `Outcome.guards` tells
which guards held. No guard hides the tests from the program, which runs beside them: one made to
deceive can find the secret by which a pass is told. Caches and cores are shared, and what the
kernel gets wrong is wrong here too.

A repository's own tests need more, and run behind a second, wider profile (`tested.py`): they may
read their repository and the installed packages, start threads, make folders in a scratch folder,
and use 4 GB and files of 16 MB. Processes, sockets to others and writing elsewhere stay refused.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

TIMEOUT_S = 5.0

_CHILD = Path(__file__).with_name("sandboxed.py")
_TESTED = Path(__file__).with_name("tested.py")
_MOST_REPORT_BYTES = 8192

Verdict = Literal["passed", "failed", "timed out", "error"]


@dataclass(frozen=True)
class Outcome:
    """How a program fared.

    Attributes:
        verdict: passed; failed: it, or a test, raised or ended early; timed out; error: the
            sandbox could not run it, which says nothing about the program.
        why: empty where it passed.
        guards: those that held, as named above.
    """

    verdict: Verdict
    why: str = ""
    guards: tuple[str, ...] = ()


def run_tests(program: str, entry_point: str, *, timeout_s: float = TIMEOUT_S) -> Outcome:
    """Run a program, then its `check` on one of its functions.

    Args:
        program: Python source that defines `check` and the function.
        entry_point: name of the function. timeout_s: by the clock, for the whole child.
    """
    with tempfile.TemporaryDirectory(prefix="infilld-", ignore_cleanup_errors=True) as folder:
        return _run(
            [sys.executable, "-I", "-S", str(_CHILD)],
            {"program": program, "entry_point": entry_point},
            Path(folder),
            {},
            timeout_s,
        )


def run_repository(
    folder: Path,
    scratch: Path,
    roots: Sequence[Path],
    arguments: Sequence[str],
    *,
    timeout_s: float,
    traced: Path | None = None,
) -> Outcome:
    """Run tests of a repository with pytest.

    Args:
        folder: the repository, only read. scratch: the one folder that may be written.
        roots: from which its packages are imported, before any that is installed.
        arguments: of pytest. timeout_s: by the clock, for the whole child.
        traced: file in the scratch folder that is to tell the lines which ran; None: none is.
    """
    job = {
        "folder": str(folder),
        "scratch": str(scratch),
        "roots": [str(root) for root in roots],
        "arguments": list(arguments),
        "traced": None if traced is None else str(traced),
    }
    environment = dict.fromkeys(("HOME", "TMPDIR", "HYPOTHESIS_STORAGE_DIRECTORY"), str(scratch))
    environment |= {"LOGNAME": "nobody", "PATH": os.defpath, "LANG": "C.UTF-8"}
    # Isolated, but with site packages: pytest is one, and so is what the tests import.
    command = [sys.executable, "-I", "-B", str(_TESTED)]
    return _run(command, job, folder, environment, timeout_s)


def _run(
    command: list[str],
    job: Mapping[str, object],
    folder: Path,
    environment: dict[str, str],
    timeout_s: float,
) -> Outcome:
    secret = secrets.token_hex(16)
    with tempfile.TemporaryFile() as job_file, tempfile.TemporaryFile() as errors:
        # A file, not a pipe: writing to it cannot block.
        job_file.write(json.dumps({**job, "secret": secret}).encode())
        job_file.seek(0)
        report, is_late = _run_child(command, folder, environment, job_file, errors, timeout_s)
        errors.seek(0)
        complaint = errors.read(_MOST_REPORT_BYTES).decode(errors="replace").strip()
    return _outcome(report, secret, complaint, timeout_s if is_late else None)


def _run_child(
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    job_file: IO[bytes],
    errors: IO[bytes],
    timeout_s: float,
) -> tuple[bytes, bool]:
    """What the child reported, and whether it had to be ended."""
    ours, theirs = os.pipe()
    try:
        try:
            child = subprocess.Popen(
                [*command, *map(str, (job_file.fileno(), theirs, int(timeout_s) + 1))],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(job_file.fileno(), theirs),
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        try:
            return _read(ours, time.monotonic() + timeout_s)
        finally:
            # Before it is waited for: until then its group cannot be another one's.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    finally:
        os.close(ours)


def _read(pipe: int, until: float) -> tuple[bytes, bool]:
    """Bytes from a pipe up to its end, and whether the time was up before it."""
    found = b""
    while len(found) < _MOST_REPORT_BYTES:
        left_s = until - time.monotonic()
        if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
            return found, True
        piece = os.read(pipe, _MOST_REPORT_BYTES)
        if not piece:
            break
        found += piece
    return found, False


def _outcome(report: bytes, secret: str, complaint: str, late_after_s: float | None) -> Outcome:
    lines = report.decode(errors="replace").split("\n")
    word, *guards = lines[0].split(" ")
    if word != "ready":
        if late_after_s is not None:
            return Outcome("error", f"no interpreter was ready within {late_after_s:g} s")
        return Outcome("error", complaint or "the interpreter ended before the program began")
    held = tuple(guards)
    told = next((line for line in lines[1:] if line.startswith(secret)), None)
    if told is not None:
        why = told.removeprefix(secret).strip()
        return Outcome("failed", why, held) if why else Outcome("passed", "", held)
    if late_after_s is not None:
        return Outcome("timed out", f"not done after {late_after_s:g} s", held)
    return Outcome("failed", "it ended before its tests had", held)
