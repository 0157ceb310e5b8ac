"""The child of `sandbox.py`: gives up what it can, then runs the program and its tests.

    python -I -S sandboxed.py JOB_DESCRIPTOR REPORT_DESCRIPTOR CPU_SECONDS

Runs without site packages, so it may import nothing but the standard library. Its report is a
line "ready" with the guards that hold, then the job's secret, alone or with what went wrong.
"""

import ctypes
import itertools
import json
import os
import platform
import resource
import struct
import sys
import types
from collections.abc import Sequence
from os.path import abspath
from typing import Any

_MEMORY_BYTES = 512 << 20
_FILE_BYTES = 1 << 20
# The kernel bounds each file, not their number.
_MOST_WRITTEN_FILES = 64
_MOST_WHY_CHARS = 300

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2

# Landlock's calls have these numbers on every machine.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_FILE = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_MAKE_LINK, _REFER, _TRUNCATE = 1 << 12, 1 << 13, 1 << 14
# How many rights the first three versions know; later ones add none that matter here.
_RIGHTS = {1: 13, 2: 14, 3: 15}

_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
# A refused call returns error 1, EPERM.
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050001
# Error 38, ENOSYS: the C library then makes its threads by clone.
_NO_SUCH_CALL = 0x00050026
_LOAD, _IF_EQUAL, _IF_GREATER_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CALL_OFFSET, _MACHINE_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16
_CLONE, _CLONE3, _CLONE_THREAD = 56, 435, 0x10000
_SOCKET_CALL, _SOCKET_PAIR_CALL = 41, 53
# clone, fork, vfork, clone3, execve, execveat
_PROCESS_CALLS = (56, 57, 58, 435, 59, 322)
# kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_open, pidfd_send_signal
_SIGNAL_CALLS = (62, 200, 234, 129, 297, 434, 424)
# ptrace, process_vm_readv, process_vm_writev, pidfd_getfd, prlimit64
_OTHERS_CALLS = (101, 310, 311, 438, 302)
# setpgid, setsid, unshare, setns, mount, bpf, io_uring_setup, keyctl
_LEAVING_CALLS = (109, 112, 272, 308, 165, 321, 425, 250)

_REFUSED_EVENTS = (
    *("socket.", "subprocess.", "ctypes.", "pty.", "os.fork", "os.exec", "os.spawn"),
    *("os.posix_spawn", "os.system", "os.kill", "os.chmod", "os.chown", "os.link", "os.mkdir"),
    *("os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "os.utime"),
    *("os.setxattr", "os.removexattr", "resource."),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the job; the process ends here."""
    job_descriptor, report_descriptor, cpu_s = map(int, sys.argv[1:])
    with os.fdopen(job_descriptor, "rb") as file:
        job = json.load(file)
    guards = _give_up(os.getcwd(), cpu_s)
    os.write(report_descriptor, f"ready {' '.join(guards)}\n".encode())
    # From here on complaints are the program's.
    os.dup2(1, 2)
    why = _why_it_fails(job["program"], job["entry_point"])
    os.write(report_descriptor, f"{job['secret']} {why}\n".encode(errors="replace"))
    os._exit(0)


def _why_it_fails(source: str, entry_point: str) -> str:
    """What goes wrong in a program or its tests; empty: nothing."""
    module = types.ModuleType("program")
    # Dataclasses look their module up.
    sys.modules["program"] = module
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
        module.__dict__["check"](module.__dict__[entry_point])
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".replace("\n", " ")
        return text[:_MOST_WHY_CHARS]
    return ""


def _give_up(folder: str, cpu_s: int) -> list[str]:
    """Take every guard there is; returns the names of those that hold."""
    guards = ["limits"] if _take_limits(cpu_s) else []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if libc.unshare(_NEW_USER | _NEW_NET) == 0:
            guards.append("namespaces")
        # Without it landlock and seccomp are for root alone.
        libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if _take_landlock(libc, folder):
            guards.append("landlock")
        if platform.machine() == "x86_64" and _take_seccomp(libc):
            guards.append("seccomp")
    _take_audit(folder)
    return [*guards, "audit"]


def _take_limits(
    cpu_s: int,
    *,
    memory_bytes: int = _MEMORY_BYTES,
    file_bytes: int = _FILE_BYTES,
    threads: bool = False,
) -> bool:
    """Bound what may be used; says whether every bound was taken."""
    held = True
    limits = [
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ]
    # Threads count as processes, and so do those of the same user elsewhere.
    limits += [] if threads else [(resource.RLIMIT_NPROC, 0)]
    for limit, most in limits:
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(limit, (most, most))
        except (OSError, ValueError):
            held = False
    return held


def _take_landlock(
    libc: ctypes.CDLL, folder: str, readable: Sequence[str] = (), *, folders: bool = False
) -> bool:
    """Leave only files that an interpreter needs, and the own folder. Source: landlock(7).

    Args:
        libc: the C library. folder: the own one. readable: folders that may be read too.
        folders: and links may be made and removed there, and /dev/null written.
    """
    version = libc.syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)
    if version < 1:
        return False
    rights = (1 << _RIGHTS[min(version, max(_RIGHTS))]) - 1
    attributes = struct.pack("=Q", rights)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    own = _WRITE_FILE | _READ_FILE | _READ_DIR | _REMOVE_FILE | _MAKE_FILE | _TRUNCATE
    if folders:
        own |= _REMOVE_DIR | _MAKE_DIR | _MAKE_LINK | _REFER
    reading = _EXECUTE | _READ_FILE | _READ_DIR
    allowed = dict.fromkeys((sys.base_prefix, "/usr", "/lib", "/lib64", *readable), reading)
    allowed |= dict.fromkeys(("/dev/null", "/dev/urandom", "/etc/ld.so.cache"), _READ_FILE)
    if folders:
        allowed["/dev/null"] = _READ_FILE | _WRITE_FILE
    for path, access in (*allowed.items(), (folder, own)):
        try:
            beneath = os.open(path, os.O_PATH)
        except OSError:
            continue
        rule = struct.pack("=Qi", access & rights, beneath)
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
        os.close(beneath)
    held = bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    os.close(ruleset)
    return held


def _take_seccomp(libc: ctypes.CDLL, *, threads: bool = False) -> bool:
    """Refuse calls that reach beyond this process. Source: seccomp(2), bpf of linux/filter.h.

    Args:
        libc: the C library. threads: may be started, and pairs of sockets between them made.
    """
    calls = {_SOCKET_CALL, _SOCKET_PAIR_CALL, *_PROCESS_CALLS, *_SIGNAL_CALLS}
    calls |= {*_OTHERS_CALLS, *_LEAVING_CALLS}
    first: list[tuple[int, int, int, int]] = []
    if threads:
        calls -= {_SOCKET_PAIR_CALL, _CLONE, _CLONE3}
        # clone3 keeps its flags where a filter cannot read them.
        first = [
            (_IF_EQUAL, 0, 1, _CLONE3),
            (_RETURN, 0, 0, _NO_SUCH_CALL),
            (_IF_EQUAL, 0, 4, _CLONE),
            (_LOAD, 0, 0, _FIRST_ARGUMENT_OFFSET),
            (_IF_ANY_BIT, 0, 1, _CLONE_THREAD),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _REFUSE),
        ]
    # Each comparison jumps over those behind it and over the return that allows.
    program = [
        (_LOAD, 0, 0, _MACHINE_OFFSET),
        (_IF_EQUAL, 1, 0, _X86_64),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _CALL_OFFSET),
        *first,
        (_IF_GREATER_EQUAL, len(calls) + 1, 0, _X32_BIT),
        *((_IF_EQUAL, len(calls) - index, 0, call) for index, call in enumerate(sorted(calls))),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    held = ctypes.create_string_buffer(code, len(code))
    pointer = struct.pack("@HP", len(program), ctypes.addressof(held))
    return bool(libc.prctl(_SET_SECCOMP, _FILTER, pointer, 0, 0) == 0)


def _take_audit(folder: str) -> None:
    """Refuse what Python announces before it does it; this cannot be taken back."""
    own = os.path.join(folder, "")
    written = itertools.count(1)

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_REFUSED_EVENTS):
            raise PermissionError(f"refused: {event}")
        if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
            path = abspath(os.fsdecode(args[0]))
            is_elsewhere, is_written = not path.startswith(own), bool(args[2] & _WRITING)
            if path.startswith("/proc/") or (is_elsewhere and is_written):
                raise PermissionError(f"refused: {path}")
            if is_written and next(written) > _MOST_WRITTEN_FILES:
                raise PermissionError(f"refused: more than {_MOST_WRITTEN_FILES} files")

    sys.addaudithook(refuse)


if __name__ == "__main__":
    main()
