"""Programs that loop, grow, leave early or reach out, in real children."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from infilld.engine.evaluation import sandbox
from infilld.engine.evaluation.sandbox import Outcome, run_tests

RIGHT = "def f(x):\n    return x + 1\n"
CHECK = "def check(g):\n    assert g(1) == 2\n"
SECRET = "a-secret-of-this-machine"


def outcome(program: str, timeout_s: float = 30.0) -> Outcome:
    return run_tests(f"{program}\n{RIGHT}\n{CHECK}", "f", timeout_s=timeout_s)


def test_what_is_right_passes() -> None:
    found = outcome("import collections, dataclasses, hashlib, math, re, typing")
    assert (found.verdict, found.why) == ("passed", "")
    assert {"limits", "audit"} <= set(found.guards)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("def f(x):\n    return x", "AssertionError"),
        ("def f(x) return x", "SyntaxError"),
        ("", "KeyError"),
        ("def f(x):\n    return f(x)", "RecursionError"),
        ("def f(x):\n    raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_what_is_wrong_fails_and_says_why(program: str, why: str) -> None:
    found = run_tests(f"{program}\n{CHECK}", "f", timeout_s=30.0)
    assert found.verdict == "failed"
    assert why in found.why


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, sys; os.closerange(0, 1000); os._exit(0)",
        # A pass told without the secret is none.
        "import os\nfor fd in range(3, 20):\n    try:\n        os.write(fd, b'\\n \\n')\n"
        "    except OSError:\n        pass\nos._exit(0)",
    ],
)
def test_leaving_before_the_tests_is_no_pass(program: str) -> None:
    assert outcome(program).verdict == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "while True:\n    pass",
        "while True:\n    print('x' * 1000)",
        "import time; time.sleep(1000)",
    ],
)
def test_what_does_not_end_is_ended(program: str) -> None:
    started = time.monotonic()
    found = outcome(program, timeout_s=1.5)
    assert found.verdict == "timed out"
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("x = [0] * 10**9", "MemoryError"),
        ("x = []\nwhile True:\n    x.append(bytearray(10**7))", "MemoryError"),
        ("open('a', 'wb').write(bytes(5 << 20))", "File too large"),
        ("for n in range(99):\n    open(f'{n}', 'w').write('x')", "more than 64 files"),
        ("import os\nwhile True:\n    os.fork()", "refused"),
        ("import subprocess; subprocess.run(['true'])", "refused"),
        ("import os; os.system('true')", "refused"),
        ("import socket; socket.socket()", "refused"),
        ("import socket; socket.getaddrinfo('localhost', 80)", "refused"),
        ("import os; os.kill(os.getppid(), 9)", "refused"),
        ("import ctypes; ctypes.CDLL(None)", "refused"),
        ("import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (-1, -1))", "refused"),
        (f"open({str(Path(__file__).parent / 'written')!r}, 'w')", "refused"),
        (f"import os; os.remove({str(Path(__file__))!r})", "refused"),
        ("import os; open(f'/proc/{os.getppid()}/environ')", "refused"),
        ("input()", "EOFError"),
        ("import torch", "ModuleNotFoundError"),
    ],
)
def test_what_reaches_out_fails(program: str, why: str) -> None:
    found = outcome(program)
    assert found.verdict == "failed"
    assert why in found.why


def test_its_own_folder_is_its_own_and_empty() -> None:
    program = "import os\nassert os.listdir() == []\nopen('a', 'w').write('b')"
    assert outcome(f"{program}\nassert open('a').read() == 'b'").verdict == "passed"
    assert outcome(program).verdict == "passed"


def test_the_environment_is_not_handed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFILLD_TOKEN", SECRET)
    program = f"import os\nassert {SECRET!r} not in repr(dict(os.environ))\n"
    assert outcome(program).verdict == "passed"
    # The check itself can fail.
    monkeypatch.undo()
    assert outcome(program.replace("not in", "in")).verdict == "failed"


def test_a_long_program_arrives_whole() -> None:
    assert outcome(f"x = '{'a' * 500_000}'").verdict == "passed"


def test_an_interpreter_that_does_not_start_is_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_CHILD", Path("/nowhere/sandboxed.py"))
    found = outcome("")
    assert found.verdict == "error"
    assert "/nowhere/sandboxed.py" in found.why


def alone(guard: str, deed: str) -> str:
    """What a deed does behind one guard of the child, without the others."""
    code = (
        f"import ctypes, os, sys\nsys.path.insert(0, {str(sandbox._CHILD.parent)!r})\n"
        "import sandboxed as s\nlibc = ctypes.CDLL(None)\nlibc.prctl(38, 1, 0, 0, 0)\n"
        f"if not {guard}:\n    print('absent')\n    os._exit(0)\n"
        f"try:\n    {deed}\nexcept OSError as error:\n    print(type(error).__name__)\n"
        "else:\n    print('done')\nsys.stdout.flush()\nos._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    said = done.stdout.strip()
    if said == "absent":
        pytest.skip("this machine has no such guard")
    return said


@pytest.mark.skipif(sys.platform != "linux", reason="these guards are Linux's")
class TestGuardsOfTheKernel:
    """Each holds by itself: the audit hook is not what refuses here."""

    @pytest.mark.parametrize(
        "deed",
        [
            "os.fork()",
            "os.posix_spawn('/bin/true', ['true'], {})",
            "os.execv('/bin/true', ['true'])",
            "os.kill(os.getpid(), 0)",
            "os.setsid()",
            "__import__('socket').socket()",
            "__import__('socket').socketpair()",
        ],
    )
    def test_seccomp(self, deed: str) -> None:
        assert alone("s._take_seccomp(libc)", deed) == "PermissionError"

    def test_seccomp_leaves_the_rest(self) -> None:
        assert alone("s._take_seccomp(libc)", "open('/dev/null').read(); os.getpid()") == "done"

    @pytest.mark.parametrize(
        ("deed", "said"),
        [
            ("open('/etc/passwd')", "PermissionError"),
            ("os.listdir('/')", "PermissionError"),
            ("open(f'/proc/{os.getppid()}/environ')", "PermissionError"),
            ("open(os.devnull + '2', 'w')", "PermissionError"),
            ("open('OWN/a', 'w').write('b')", "done"),
            ("open(os.__file__).read()", "done"),
        ],
    )
    def test_landlock(self, tmp_path: Path, deed: str, said: str) -> None:
        own = str(tmp_path)
        assert alone(f"s._take_landlock(libc, {own!r})", deed.replace("OWN", own)) == said
