"""Holes in repositories whose tests run in real children, and what those may do."""

import subprocess
import sys
from pathlib import Path

import pytest

from infilld.engine.errors import ModelError, RequestError
from infilld.engine.evaluation.items import Item
from infilld.engine.evaluation.repository import (
    Repository,
    TestRun,
    arguments_of,
    own_repository,
    workshop,
)
from infilld.engine.evaluation.sandbox import Outcome, run_repository

# Plug-ins and settings of this machine cost seconds, and are no part of what is looked at.
BARE = ("-c", "/dev/null", "--rootdir=.", "--confcutdir=.", "--disable-plugin-autoload")
SOURCE = '''\
def add(a, b):
    """Sum."""
    total = a
    unseen = 3
    return total + b


def unused(x):
    return x
'''
TESTS = "from toy import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"


def toy(folder: Path, tests: str = TESTS, source: str = SOURCE) -> Repository:
    (folder / "src").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / ".hidden").mkdir()
    (folder / "src/toy.py").write_text(source)
    (folder / "tests/test_toy.py").write_text(tests)
    return Repository(folder, (TestRun((*BARE, "tests")),))


@pytest.mark.slow
@pytest.mark.e2e
def test_what_tests_miss_is_an_item_and_what_they_accept_is_right(tmp_path: Path) -> None:
    with workshop(toy(tmp_path / "toy")) as shop:
        assert not (shop.copy / ".hidden").exists()
        items, facts = shop.items(10, 0)
        # Nothing runs the other function, and nobody misses what is never read.
        assert {item.missing for item in items} == {
            "total = a",
            "return total + b",
            "total = a\n    unseen = 3",
            "unseen = 3\n    return total + b",
            "total = a\n    unseen = 3\n    return total + b",
        }
        assert facts["statements_tried"] == 6
        assert {"limits", "audit"} <= set(facts["guards"])
        (item,) = [item for item in items if item.missing == "return total + b"]
        assert (item.kind, item.source) == ("repository", "src/toy.py")
        assert item.filled(item.missing) == SOURCE
        assert shop.judge(item, "return b + a").verdict == "passed"
        assert shop.judge(item, "return b - a").verdict == "failed"
        assert "test_add" in shop.judge(item, "return b - a").why
        assert (shop.copy / "src/toy.py").read_text() == SOURCE
    assert not shop.copy.exists()


@pytest.mark.slow
@pytest.mark.e2e
def test_tests_that_fail_by_themselves_are_refused(tmp_path: Path) -> None:
    with (
        workshop(toy(tmp_path / "toy", "def test_a():\n    assert False\n")) as shop,
        pytest.raises(ModelError, match=r"do not pass in the sandbox: .*test_a"),
    ):
        shop.items(1, 0)


def run(folder: Path, test: str, timeout_s: float = 60.0) -> Outcome:
    copy, scratch = folder / "copy", folder / "scratch"
    copy.mkdir()
    scratch.mkdir()
    (copy / "test_it.py").write_text(f"import os\n\n\ndef test_it(tmp_path):\n    {test}\n")
    return run_repository(copy, scratch, [copy], [*BARE, "test_it.py"], timeout_s=timeout_s)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    "test",
    [
        "(tmp_path / 'a').mkdir(); (tmp_path / 'a/b').write_text('c'); os.listdir(tmp_path)",
        "import threading as t; x = t.Thread(target=print); x.start(); x.join()",
        "import asyncio; asyncio.run(asyncio.sleep(0))",
        "assert open('test_it.py').read()",
    ],
    ids=["folders", "threads", "loops", "reading"],
)
def test_what_a_test_needs_it_may(tmp_path: Path, test: str) -> None:
    assert run(tmp_path, test) == Outcome("passed", "", run_guards(tmp_path / "again"))


def run_guards(folder: Path) -> tuple[str, ...]:
    folder.mkdir()
    return run(folder, "pass").guards


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize(
    "test",
    [
        "open('test_it.py', 'a')",
        f"open({str(Path(__file__).parent / 'written')!r}, 'w')",
        "os.remove('test_it.py')",
        "os.fork()",
        "os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.socket().bind(('127.0.0.1', 0))",
        "os.kill(os.getppid(), 0)",
        "os._exit(0)",
    ],
)
def test_what_no_test_needs_fails(tmp_path: Path, test: str) -> None:
    assert run(tmp_path, test).verdict == "failed"
    assert (tmp_path / "copy/test_it.py").exists()


@pytest.mark.slow
@pytest.mark.e2e
def test_what_does_not_end_is_ended(tmp_path: Path) -> None:
    assert run(tmp_path, "while True: pass", timeout_s=3.0).verdict == "timed out"


@pytest.mark.skipif(sys.platform != "linux", reason="these guards are Linux's")
@pytest.mark.parametrize(
    ("deed", "said"),
    [
        ("os.fork()", "PermissionError"),
        ("os.execv('/bin/true', ['true'])", "PermissionError"),
        ("__import__('socket').socket()", "PermissionError"),
        ("os.kill(os.getpid(), 0)", "PermissionError"),
        ("__import__('socket').socketpair()", "done"),
        ("__import__('threading').Thread(target=int).start()", "done"),
    ],
)
def test_the_wider_filter_holds_by_itself(deed: str, said: str) -> None:
    from infilld.engine.evaluation import sandbox

    code = (
        f"import ctypes, os, sys\nsys.path.insert(0, {str(sandbox._CHILD.parent)!r})\n"
        "import sandboxed as s\nlibc = ctypes.CDLL(None)\nlibc.prctl(38, 1, 0, 0, 0)\n"
        "if not s._take_seccomp(libc, threads=True):\n    print('absent')\n    os._exit(0)\n"
        f"try:\n    {deed}\nexcept OSError as error:\n    print(type(error).__name__)\n"
        "else:\n    print('done')\nsys.stdout.flush()\nos._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    if done.stdout.strip() == "absent":
        pytest.skip("this machine has no such guard")
    assert done.stdout.strip() == said


def test_packages_are_imported_from_the_copy(tmp_path: Path) -> None:
    repository = toy(tmp_path / "toy")
    with workshop(repository) as shop:
        assert shop.roots == (shop.copy / "src", shop.copy)
    (repository.folder / "pyproject.toml").write_text(
        '[tool.setuptools.package-dir]\n"big.toy" = "src"\n"gone" = "nowhere"\n'
    )
    with workshop(repository) as shop:
        (root,) = shop.roots
        assert (root / "big/toy").resolve() == shop.copy / "src"
        assert not (root / "gone").exists()


def test_our_own_repository_has_quick_tests() -> None:
    found = own_repository()
    assert found is not None
    for each in found.runs:
        (source,) = each.sources
        assert (found.folder / source).is_file()
        assert (found.folder / each.arguments[-1]).is_file()


def test_arguments_are_read_as_a_shell_would() -> None:
    assert arguments_of(["tests -k 'a b'", "x"]) == (
        TestRun(("tests", "-k", "a b")),
        TestRun(("x",)),
    )
    for text in ("'a", " "):
        with pytest.raises(RequestError):
            arguments_of([text])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(RequestError, match="absent"),
        workshop(Repository(tmp_path / "absent", (TestRun(("x",)),))),
    ):
        pass


def test_an_exact_answer_needs_no_run(tmp_path: Path) -> None:
    item = Item("repository", "a = ", "1", "\n", "a.py")
    with workshop(toy(tmp_path / "toy")) as shop:
        assert shop.judge(item, "1  ").verdict == "passed"
