"""The child of `sandbox.py` that runs a repository's own tests: gives up what they do not need.

    python -I -B tested.py JOB_DESCRIPTOR REPORT_DESCRIPTOR CPU_SECONDS

The guards are those of `sandboxed.py`, wider where a test runner needs it. Its report is the same:
a line "ready" with the guards that hold, then the job's secret, alone or with what went wrong.
"""

import ctypes
import importlib.util
import itertools
import json
import os
import platform
import sys
import threading
from collections.abc import Callable
from os.path import abspath
from types import FrameType, ModuleType
from typing import Any

_MEMORY_BYTES = 4 << 30
_FILE_BYTES = 16 << 20
_MOST_WRITTEN_FILES = 2000
_MOST_WHY_CHARS = 300

_REFUSED_EVENTS = (
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostby", "socket.sendto"),
    *("subprocess.", "pty.", "os.fork", "os.exec", "os.spawn", "os.posix_spawn", "os.system"),
    *("os.kill", "os.chown", "os.setxattr", "os.removexattr", "resource.setrlimit"),
)
# What these change is named by their first argument; the last one tells what it is relative to.
_CHANGING_EVENTS = (
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod"),
    *("os.truncate", "os.utime"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the job; the process ends here."""
    job_descriptor, report_descriptor, cpu_s = map(int, sys.argv[1:])
    with os.fdopen(job_descriptor, "rb") as file:
        job = json.load(file)
    guards = _give_up(job["folder"], job["scratch"], job["roots"], cpu_s)
    os.write(report_descriptor, f"ready {' '.join(guards)}\n".encode())
    # From here on complaints are the tests'.
    os.dup2(1, 2)
    sys.path[:0] = job["roots"]
    lines: set[tuple[str, int]] = set()
    if job["traced"] is not None:
        _trace(os.path.join(job["folder"], ""), lines)
    why = _why_they_fail(job["arguments"])
    if job["traced"] is not None:
        sys.settrace(None)
        with open(job["traced"], "w", encoding="utf-8") as file:
            json.dump(sorted(lines), file)
    os.write(report_descriptor, f"{job['secret']} {why}\n".encode(errors="replace"))
    os._exit(0)


class _FirstFailure:
    """Remembers which test fails first."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def _why_they_fail(arguments: list[str]) -> str:
    """What goes wrong in the tests; empty: nothing."""
    first = _FirstFailure()
    try:
        import pytest

        # Nothing of the repository's is asked for more than the tests that are named.
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments], [first]))
    except BaseException as error:
        return f"{type(error).__name__}: {error}".replace("\n", " ")[:_MOST_WHY_CHARS]
    if code == 0:
        return ""
    why = f"pytest ended with {code}, first {first.name or 'nothing'}"
    return why.replace("\n", " ")[:_MOST_WHY_CHARS]


def _trace(folder: str, lines: set[tuple[str, int]]) -> None:
    """Collect the lines of a folder's files that run."""
    real = os.path.realpath
    names: dict[str, str] = {}

    def local(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        lines.add((names[frame.f_code.co_filename], frame.f_lineno))
        return local

    def called(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        name = frame.f_code.co_filename
        if name not in names:
            path = real(name)
            names[name] = path[len(folder) :] if path.startswith(folder) else ""
        return local if names[name] else None

    threading.settrace(called)
    sys.settrace(called)


def _give_up(folder: str, scratch: str, roots: list[str], cpu_s: int) -> list[str]:
    """Take every guard there is; returns the names of those that hold."""
    guards = _guards()
    held = []
    if guards._take_limits(cpu_s, memory_bytes=_MEMORY_BYTES, file_bytes=_FILE_BYTES, threads=True):
        held.append("limits")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if libc.unshare(guards._NEW_USER | guards._NEW_NET) == 0:
            held.append("namespaces")
        libc.prctl(guards._SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        readable = [folder, *roots, sys.prefix, *(path for path in sys.path if os.path.isabs(path))]
        if guards._take_landlock(libc, scratch, readable, folders=True):
            held.append("landlock")
        if platform.machine() == "x86_64" and guards._take_seccomp(libc, threads=True):
            held.append("seccomp")
    _take_audit(scratch)
    return [*held, "audit"]


def _guards() -> ModuleType:
    """The narrower child's module; by its path, since no package of ours may be imported here."""
    path = os.path.join(os.path.dirname(abspath(__file__)), "sandboxed.py")
    spec = importlib.util.spec_from_file_location("sandboxed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _take_audit(scratch: str) -> None:
    """Refuse what Python announces before it does it; this cannot be taken back."""
    own = os.path.join(os.path.realpath(scratch), "")
    written = itertools.count(1)

    def is_elsewhere(path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        found = abspath(os.fsdecode(path))
        return found != os.devnull and not os.path.join(found, "").startswith(own)

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED_EVENTS):
            raise PermissionError(f"refused: {event}")
        if event.startswith(_CHANGING_EVENTS):
            # Relative to an open folder: the kernel's guard alone knows which.
            is_relative = event != "os.truncate" and isinstance(args[-1], int) and args[-1] >= 0
            if not is_relative and is_elsewhere(args[0]):
                raise PermissionError(f"refused: {event} of {args[0]}")
        if event == "open" and args[2] & _WRITING and isinstance(args[0], (str, bytes)):
            if is_elsewhere(args[0]):
                raise PermissionError(f"refused: {os.fsdecode(args[0])}")
            if next(written) > _MOST_WRITTEN_FILES:
                raise PermissionError(f"refused: more than {_MOST_WRITTEN_FILES} files")

    sys.addaudithook(refuse)


if __name__ == "__main__":
    main()
