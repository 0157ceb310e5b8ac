"""Python source that is on the machine: collected, deduplicated, split into training and held out.

Only what may be used is taken: the standard library and installed packages under permissive
licences, as their metadata says. Whole packages are held out, so that no file of a held-out
project was seen.
"""

import hashlib
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import Distribution, distributions
from pathlib import Path

MAX_FILE_BYTES = 100_000
MIN_FILE_BYTES = 200
# A file that mostly holds digits is a table, not a program.
_MAX_DIGIT_SHARE = 0.2
# Lines of a file that were seen elsewhere, at most; above it the file is a copy.
_MAX_SEEN_SHARE = 0.6
# Vendored copies would bring held-out packages in by the back door.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "idlelib",
    "__pycache__",
    "site-packages",
    "_vendor",
    "vendor",
}

_INSTALLED_FOLDERS = {"site-packages", "node_modules", "__pycache__"}

_PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|Zlib|Unlicense|0BSD|HPND)\b", re.I
)
_COPYLEFT = re.compile(r"\b(A?L?GPL|GNU|MPL|EUPL|Commons|Proprietary|NVIDIA)\b", re.I)

# Chosen by name before anything was trained: small, ordinary, each of another kind. What is
# tuned, is tuned on the second; what is reported, is measured on the first.
HELD_OUT = frozenset({"httpx", "pytest", "pygls", "fastapi"})
CALIBRATION = frozenset({"asyncio", "email", "json"})
_PARTS = ("training", "held_out", "calibration")


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus; `package` is the top-level name it belongs to."""

    package: str
    path: str
    text: str


@dataclass(frozen=True)
class Package:
    """What a package gave: name, version, licence, files, characters; which part it is of.

    Of what was held out, one part measures the model and one calibrates its confidence.
    """

    name: str
    version: str
    licence: str
    files: int
    chars: int
    held_out: bool
    calibration: bool = False


@dataclass(frozen=True)
class Corpus:
    """Training files, held-out files, files for calibration, and the packages of all."""

    training: list[SourceFile]
    held_out: list[SourceFile]
    packages: list[Package]
    calibration: list[SourceFile] = field(default_factory=list)


def collect_installed() -> Corpus:
    """The standard library and the permissively licensed packages of this environment."""
    found = [("stdlib", sys.version.split()[0], "PSF-2.0", _standard_library())]
    for distribution in sorted(distributions(), key=lambda d: d.name.lower()):
        licence = licence_of(distribution)
        if licence is not None and distribution.name != "infilld":
            found.append((distribution.name, distribution.version, licence, _files(distribution)))
    return _assemble(found)


def collect_folders(folders: Iterable[Path], held_out_share: float = 0.05) -> Corpus:
    """Every Python file below some folders; a share of them, chosen by hash, is held out.

    Half as many more are kept for calibration.

    Raises:
        FileNotFoundError: a folder does not exist, or there is no Python file in any.
    """
    files: list[SourceFile] = []
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"no folder {folder}")
        paths = [folder] if folder.is_file() else sorted(_own_sources(folder))
        base = folder.parent
        files += [
            SourceFile(folder.name, str(path.relative_to(base)), text)
            for path in paths
            if (text := _read(path)) is not None
        ]
    files = list(deduplicated(files))
    if not files:
        raise FileNotFoundError(f"no usable Python file in {', '.join(map(str, folders))}")
    kept = 1.5 * held_out_share
    training = [file for file in files if _fraction(file.path) >= kept] or files
    held = [file for file in files if _fraction(file.path) < held_out_share]
    calibration = [file for file in files if held_out_share <= _fraction(file.path) < kept]
    chars = sum(len(file.text) for file in files)
    packages = [Package("own sources", "", "", len(files), chars, False)]
    return Corpus(training, held, packages, calibration)


def _own_sources(folder: Path) -> Iterator[Path]:
    """Python files below a folder, but for what was installed or hidden there."""
    for path in folder.rglob("*.py"):
        inner = path.relative_to(folder).parts[:-1]
        if not any(part.startswith(".") or part in _INSTALLED_FOLDERS for part in inner):
            yield path


def licence_of(distribution: Distribution) -> str | None:
    """The licence a distribution names, if it is permissive and nothing else."""
    fields = distribution.metadata
    named = [*(fields.get_all("License-Expression") or [""])]
    named += [value[:200] for value in fields.get_all("License") or []]
    named += [c for c in fields.get_all("Classifier") or [] if c.startswith("License")]
    text = " | ".join(part for part in named if part)
    if not _PERMISSIVE.search(text) or _COPYLEFT.search(text):
        return None
    short = named[0] or next((part for part in named[1:] if part), "")
    return short.rpartition(":: ")[2].splitlines()[0][:60]


def deduplicated(files: Iterable[SourceFile]) -> Iterator[SourceFile]:
    """Files that are no copy, nor nearly one, of an earlier file."""
    seen_files: set[bytes] = set()
    seen_lines: set[int] = set()
    for file in files:
        digest = hashlib.sha256(file.text.encode()).digest()
        lines = {hash(line) for raw in file.text.splitlines() if len(line := raw.strip()) > 20}
        copied = len(lines & seen_lines) / max(1, len(lines))
        if digest in seen_files or copied > _MAX_SEEN_SHARE:
            continue
        seen_files.add(digest)
        seen_lines |= lines
        yield file


def save(corpus: Corpus, folder: Path) -> None:
    """Write the corpus as three JSON-lines files and a list of packages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _PARTS:
        lines = "".join(json.dumps(asdict(file)) + "\n" for file in getattr(corpus, name))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    packages = [asdict(package) for package in corpus.packages]
    (folder / "packages.json").write_text(json.dumps(packages, indent=1), encoding="utf-8")


def load(folder: Path) -> Corpus:
    """Read what `save` wrote."""
    parts = {}
    for name in _PARTS:
        with (folder / f"{name}.jsonl").open(encoding="utf-8") as lines:
            parts[name] = [SourceFile(**json.loads(line)) for line in lines]
    packages = json.loads((folder / "packages.json").read_text(encoding="utf-8"))
    return Corpus(packages=[Package(**package) for package in packages], **parts)


def _assemble(found: list[tuple[str, str, str, list[tuple[str, Path]]]]) -> Corpus:
    files: list[SourceFile] = []
    about: dict[str, tuple[str, str]] = {}
    for name, version, licence, paths in found:
        about[name] = (version, licence)
        for top, path in paths:
            text = _read(path)
            if text is not None:
                # Remember the distribution, and the top-level name that may be held out.
                files.append(SourceFile(f"{name}/{top}", str(path), text))
    kept = list(deduplicated(files))
    parts: dict[str, list[SourceFile]] = {name: [] for name in _PARTS}
    for file in kept:
        parts[_part(file)].append(file)
    packages = []
    for part, group in parts.items():
        named = [_named(file, part) for file in group]
        counts = Counter(named)
        chars: Counter[str] = Counter()
        for label, file in zip(named, group, strict=True):
            chars[label] += len(file.text)
        for label in sorted(counts):
            version, licence = about[label.partition("/")[0]]
            sums = (counts[label], chars[label])
            flags = (part != "training", part == "calibration")
            packages.append(Package(label, version, licence, *sums, *flags))
    return Corpus(packages=packages, **parts)


def _part(file: SourceFile) -> str:
    top = file.package.rpartition("/")[2]
    return "held_out" if top in HELD_OUT else "calibration" if top in CALIBRATION else "training"


def _named(file: SourceFile, part: str) -> str:
    return file.package.partition("/")[0] if part == "training" else file.package


def _standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return [
        (_top(path.relative_to(root)), path)
        for path in sorted(root.rglob("*.py"))
        if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    ]


def _files(distribution: Distribution) -> list[tuple[str, Path]]:
    listed = sorted(distribution.files or [], key=str)
    return [
        (_top(Path(str(path))), Path(str(distribution.locate_file(path))))
        for path in listed
        if path.suffix == ".py" and not _SKIPPED_FOLDERS & set(path.parts) and path.parts[0] != ".."
    ]


def _top(path: Path) -> str:
    return path.parts[0].removesuffix(".py").lstrip("_")


def _read(path: Path) -> str | None:
    """The text of a usable file; None for one that is too long, too short, or not source."""
    try:
        if not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            return None
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError):
        return None
    text = text.replace("\r\n", "\n")
    if "\r" in text or "\0" in text or max(map(len, text.splitlines()), default=0) > 1000:
        return None
    if sum(map(str.isdigit, text)) > _MAX_DIGIT_SHARE * len(text):
        return None
    return text


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
