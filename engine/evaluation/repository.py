"""Items out of a real repository: statements that its own tests miss when they are gone.

The tests first run as they are, with a record of which lines ran where nobody says which files
they judge. Then whole statements of functions are replaced by `pass`, one place at a time; a place
at which the tests then fail is an item. An answer is right when the tests pass with it.

The repository is copied once. Its tests read the copy and write into a scratch folder that is
emptied after every run, so that no run can change another one's.
"""

import ast
import json
import random
import shlex
import shutil
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from infilld.engine.errors import ModelError, RequestError
from infilld.engine.evaluation.items import Item
from infilld.engine.evaluation.measures import is_exact_text
from infilld.engine.evaluation.sandbox import Outcome, run_repository

KIND = "repository"
_MOST_LINES = 3
_MOST_FILE_BYTES = 5 << 20
_SKIPPED = {"__pycache__", "node_modules", "build", "dist", "venv", "env"}
_TEST_FOLDERS = {"test", "tests", "testing"}
# The first run loads what later ones find in memory; a traced one is several times slower.
_FIRST_TIMEOUT_S = 240.0
_LEAST_TIMEOUT_S = 10.0
# Time of a run with a hole, at most, in times of the run without one.
_PATIENCE = 4
_STAND_IN = "pass"


@dataclass(frozen=True)
class TestRun:
    """One call of pytest.

    Attributes:
        arguments: of pytest. sources: files whose statements it judges, relative to the
            repository; none: every one that it runs and that is no test.
    """

    # pytest would take the name for a test's.
    __test__ = False

    arguments: tuple[str, ...]
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Repository:
    """A folder of Python source, and the tests that judge it."""

    folder: Path
    runs: tuple[TestRun, ...]


# Neither plug-ins nor settings: each costs more time than most of these tests. What is measured by
# the clock could fail here for another reason than the answer.
_QUICK = (
    *("-c", "/dev/null", "--rootdir=.", "--confcutdir=.", "--import-mode=importlib"),
    *("--disable-plugin-autoload", "--noconftest", "-k", "not bounded_time"),
)


def own_repository() -> Repository | None:
    """The checkout this module lies in, with modules whose tests are quick; None: it is none.

    `infilld train` takes the standard library and installed packages, and leaves infilld out.
    """
    root = Path(__file__).resolve().parents[2]
    pairs = [
        ("server/verbs/document.py", "tests/server/test_document.py"),
        ("server/process/files.py", "tests/server/test_files.py"),
        ("engine/silence/python.py", "tests/engine/test_silence_python.py"),
        ("engine/training/corpus.py", "tests/engine/test_training_corpus.py"),
        ("lsp/documents.py", "tests/lsp/test_documents.py"),
        ("lsp/gap.py", "tests/lsp/test_gap.py"),
    ]
    here = [pair for pair in pairs if all((root / path).is_file() for path in pair)]
    if not here or find_spec("pytest") is None or not (root / "pyproject.toml").is_file():
        return None
    runs = [TestRun((*_QUICK, test), (source,)) for source, test in here]
    return Repository(root, tuple(runs))


@dataclass
class Workshop:
    """A copy of a repository in which tests run.

    Attributes:
        repository: the original. copy: of it. scratch: what tests may write.
        roots: where imports are looked for first. guards: that held in the latest run.
    """

    repository: Repository
    copy: Path
    scratch: Path
    roots: tuple[Path, ...]
    guards: tuple[str, ...] = ()
    _timeouts: dict[TestRun, float] = field(default_factory=dict)
    _of_item: dict[Item, TestRun] = field(default_factory=dict)
    _known: dict[tuple[Item, str], Outcome] = field(default_factory=dict)

    def items(self, count: int, seed: int) -> tuple[list[Item], dict[str, Any]]:
        """Up to so many items, the runs taking turns, and what the report says of them.

        Args:
            count: items wanted. seed: chooses them.

        Raises:
            ModelError: tests fail without a hole, or cannot run here.
            RequestError: no statement is missed.
        """
        rng = random.Random(f"{KIND} {seed}")
        queues = [(run, self._candidates(run, rng)) for run in self.repository.runs]
        items: list[Item] = []
        tried = 0
        while len(items) < count and any(queue for _, queue in queues):
            for run, queue in queues:
                # Each run gives one item before the next one is asked.
                while queue and len(items) < count:
                    item = queue.pop()
                    tried += 1
                    if self._run(run, item, _STAND_IN).verdict in ("failed", "timed out"):
                        self._of_item[item] = run
                        items.append(item)
                        break
        if not items:
            raise RequestError(
                f"none of {tried} statements of {self.repository.folder} is missed by its tests",
                remedy="Name tests that run functions of the repository.",
            )
        facts = {
            "from": self.repository.folder.name,
            "files": len({item.source for item in items}),
            "items": len(items),
            "statements_tried": tried,
            "guards": list(self.guards),
        }
        return items, facts

    def judge(self, item: Item, text: str) -> Outcome:
        """How the item's tests fare with a text in its gap."""
        # Without a hole they pass.
        if is_exact_text(item, text):
            return Outcome("passed", "", self.guards)
        key = (item, text)
        if key not in self._known:
            self._known[key] = self._run(self._of_item[item], item, text)
        return self._known[key]

    def _candidates(self, run: TestRun, rng: random.Random) -> list[Item]:
        """Statements of functions that a run judges, in random order."""
        started = time.monotonic()
        self._require(run, self._pytest(run, _FIRST_TIMEOUT_S))
        self._timeouts[run] = max(_LEAST_TIMEOUT_S, _PATIENCE * (time.monotonic() - started))
        self._empty()
        executed: dict[str, set[int] | None] = dict.fromkeys(run.sources)
        if not executed:
            executed |= self._executed(run)
        found = [
            item for path, ran in sorted(executed.items()) for item in _holes(self.copy, path, ran)
        ]
        rng.shuffle(found)
        return found

    def _executed(self, run: TestRun) -> dict[str, set[int]]:
        """Lines of each file that run, but for those of tests; several times slower than a run."""
        record = self.scratch / "lines.json"
        self._require(run, self._pytest(run, _FIRST_TIMEOUT_S, record))
        lines = json.loads(record.read_text(encoding="utf-8"))
        self._empty()
        executed: dict[str, set[int]] = {}
        for path, line in lines:
            if _is_source(Path(path)):
                executed.setdefault(path, set()).add(line)
        return executed

    def _require(self, run: TestRun, outcome: Outcome) -> None:
        """Refuse tests that tell nothing."""
        if outcome.verdict == "passed":
            self.guards = outcome.guards
            return
        raise ModelError(
            f"{self.repository.folder}: its own tests do not pass in the sandbox: "
            f"pytest {' '.join(run.arguments)}: {outcome.verdict}, {outcome.why}",
            remedy="Name tests that need no network, no other process, and no file written beside "
            "them, or leave the repository out.",
        )

    def _run(self, run: TestRun, item: Item, text: str) -> Outcome:
        path = self.copy / item.source
        path.write_text(item.filled(text), encoding="utf-8")
        try:
            return self._pytest(run, self._timeouts[run])
        finally:
            path.write_text(item.filled(item.missing), encoding="utf-8")
            self._empty()

    def _pytest(self, run: TestRun, timeout_s: float, traced: Path | None = None) -> Outcome:
        return run_repository(
            self.copy, self.scratch, self.roots, run.arguments, timeout_s=timeout_s, traced=traced
        )

    def _empty(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(exist_ok=True)


@contextmanager
def workshop(repository: Repository) -> Iterator[Workshop]:
    """A copy of a repository, for as long as it is needed.

    Raises:
        RequestError: no such folder.
    """
    if not repository.folder.is_dir():
        raise RequestError(
            f"no folder {repository.folder}", remedy="Name the folder of a repository."
        )
    with tempfile.TemporaryDirectory(prefix="infilld-", ignore_cleanup_errors=True) as folder:
        # The kernel's guards know files by their real path.
        base = Path(folder).resolve()
        copy, scratch = base / "copy", base / "scratch"
        shutil.copytree(repository.folder, copy, symlinks=True, ignore=_ignored)
        scratch.mkdir()
        yield Workshop(repository, copy, scratch, _roots(copy, base / "roots"))


def _ignored(folder: str, names: list[str]) -> set[str]:
    """What no copy needs: hidden, installed, built or large."""
    return {name for name in names if _is_needless(Path(folder) / name)}


def _is_needless(path: Path) -> bool:
    if path.name.startswith(".") or not path.exists():
        return True
    if path.is_dir():
        is_made = path.name in _SKIPPED or path.name.endswith(".egg-info")
        return is_made or (path / "pyvenv.cfg").exists()
    return not path.is_file() or path.stat().st_size > _MOST_FILE_BYTES


def _roots(copy: Path, links: Path) -> tuple[Path, ...]:
    """Where the repository's packages are imported from.

    Names that setuptools' `package-dir` gives to folders become links. Otherwise it is `src`, where
    there is one, and the repository's own folder.
    """
    try:
        project = tomllib.loads((copy / "pyproject.toml").read_text(encoding="utf-8"))
        named = project["tool"]["setuptools"]["package-dir"]
    except (OSError, ValueError, KeyError, TypeError):
        named = {}
    names = [(name, copy / path) for name, path in named.items() if name and (copy / path).is_dir()]
    for name, target in names:
        link = links.joinpath(*name.split("."))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    if names:
        return (links,)
    source = copy / str(named.get("", "src"))
    return (source, copy) if source.is_dir() and source != copy else (copy,)


def _is_source(path: Path) -> bool:
    """Whether a file of a repository is no test."""
    is_test = path.name.startswith("test_") or path.name.endswith("_test.py")
    return not (is_test or path.name == "conftest.py" or _TEST_FOLDERS & set(path.parts[:-1]))


def _holes(copy: Path, source: str, executed: set[int] | None) -> list[Item]:
    """Whole statements of functions, up to three lines that were executed; None: all are."""
    try:
        text = (copy / source).read_bytes().decode()
        tree = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return []
    # Written back as it was: other line ends would make every line differ.
    if "\r" in text:
        return []
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    places: set[tuple[int, int]] = set()
    functions = [
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    for function in functions:
        for block in _blocks(function):
            for first, statement in enumerate(block):
                for last in block[first : first + _MOST_LINES]:
                    begin, end = statement.lineno, last.end_lineno or last.lineno
                    was_run = executed is None or begin in executed
                    if end - begin < _MOST_LINES and was_run:
                        places.add((begin, end))
    found = []
    for begin, end in sorted(places):
        line = lines[begin - 1]
        start = starts[begin - 1] + len(line) - len(line.lstrip())
        stop = starts[end] - 1
        found.append(Item(KIND, text[:start], text[start:stop], text[stop:], source))
    return found


def _blocks(function: ast.AST) -> Iterator[list[ast.stmt]]:
    """Statements of a function that may be left out, those beside one another together."""
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block: list[ast.stmt] = []
            statements = getattr(node, name, None)
            for statement in statements if isinstance(statements, list) else []:
                if _may_be_left_out(statement):
                    block.append(statement)
                else:
                    yield block
                    block = []
            yield block


def _may_be_left_out(statement: ast.stmt) -> bool:
    """Not a definition, nor what does nothing."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return False
    kept = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Pass)
    return not isinstance(statement, kept)


def arguments_of(texts: Sequence[str]) -> tuple[TestRun, ...]:
    """Calls of pytest as they are written on a command line.

    Raises:
        RequestError: quotes that do not end, or nothing in between.
    """
    runs = []
    for text in texts:
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise RequestError(f"{text!r}: {error}", remedy="Close the quotes.") from None
        if not words:
            raise RequestError("no tests are named", remedy="Give arguments of pytest.")
        runs.append(TestRun(words))
    return tuple(runs)
