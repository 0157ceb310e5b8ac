"""What gets into a corpus, and what does not."""

from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from infilld.engine.training.corpus import (
    HELD_OUT,
    SourceFile,
    collect_folders,
    deduplicated,
    licence_of,
    load,
    save,
)

LINES = [f"value_{n} = compute_something({n}, 'text')" for n in range(20)]
PROGRAM = "\n".join(LINES) + "\n"


def written(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, newline="")
    return folder


def test_tables_scraps_and_giants_are_left_out(tmp_path: Path) -> None:
    folder = written(
        tmp_path / "code",
        good=PROGRAM,
        scrap="x = 1\n",
        table="TABLE = [" + ", ".join(str(n) for n in range(200)) + "]\n",
        giant="# words\n" * 20_000,
        wide="x = '" + "a" * 1200 + "'\n",
    )
    corpus = collect_folders([folder])
    assert {Path(file.path).stem for file in corpus.training + corpus.held_out} == {"good"}


def test_environments_within_a_folder_are_left_out(tmp_path: Path) -> None:
    folder = written(tmp_path / ".hidden", good=PROGRAM)
    for inner in (".venv/lib", "env/site-packages/other", "node_modules"):
        (folder / inner).mkdir(parents=True)
        (folder / inner / "theirs.py").write_text(PROGRAM.replace("x", "y"))
    corpus = collect_folders([folder])
    everything = corpus.training + corpus.held_out + corpus.calibration
    assert {Path(file.path).stem for file in everything} == {"good"}


def test_copies_and_near_copies_are_left_out() -> None:
    near = "\n".join(LINES[:15] + [f"something_else_{n} = 'quite different'" for n in range(5)])
    other = "\n".join(f"def function_number_{n}(): pass" for n in range(20))
    files = [SourceFile("p", str(n), t) for n, t in enumerate([PROGRAM, PROGRAM, near, other])]
    assert [file.path for file in deduplicated(files)] == ["0", "3"]


def test_line_ends_become_one_kind(tmp_path: Path) -> None:
    folder = written(tmp_path / "code", windows=PROGRAM.replace("\n", "\r\n"))
    assert collect_folders([folder]).training[0].text == PROGRAM


def test_no_usable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no usable Python file"):
        collect_folders([written(tmp_path / "empty")])
    with pytest.raises(FileNotFoundError, match="no folder"):
        collect_folders([tmp_path / "absent"])


def test_a_saved_corpus_is_the_same(tmp_path: Path) -> None:
    corpus = collect_folders([written(tmp_path / "code", a=PROGRAM + "# é\U0001f600\n")])
    save(corpus, tmp_path / "saved")
    assert load(tmp_path / "saved") == corpus


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("License-Expression: MIT", "MIT"),
        ("License: BSD License", "BSD License"),
        (
            "Classifier: License :: OSI Approved :: Apache Software License",
            "Apache Software License",
        ),
        ("License-Expression: MIT AND GPL-3.0", None),
        ("License: LGPL", None),
        ("License: NVIDIA Proprietary", None),
        ("", None),
    ],
)
def test_only_permissive_licences_are_taken(
    tmp_path: Path, fields: str, expected: str | None
) -> None:
    folder = tmp_path / "p-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: p\nVersion: 1\n{fields}\n")
    assert licence_of(PathDistribution(folder)) == expected


def test_held_out_names_are_top_level_names() -> None:
    assert all(name.isidentifier() for name in HELD_OUT)
