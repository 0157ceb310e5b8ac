"""Where the gaps of an evaluation come from: files, and a benchmark's own format."""

import gzip
import json
from pathlib import Path

import pytest

from infilld.engine.errors import RequestError
from infilld.engine.evaluation.benchmark import humaneval_items
from infilld.engine.evaluation.held_out import files_below, held_out_files
from infilld.engine.evaluation.items import Check, Item, cut_items
from infilld.engine.evaluation.measures import place_of
from infilld.engine.evaluation.names import CUT_KINDS
from infilld.engine.training.corpus import HELD_OUT, SourceFile

TEXT = "".join(
    f"def total_{n}(items):\n    price = {n}\n\n    # sum of all\n    return sum(items)\n\n\n"
    for n in range(9)
)
FILES = [SourceFile("p", "p/a.py", TEXT), SourceFile("p", "p/b.py", TEXT.upper())]
ROW = {
    "task_id": "T/1",
    "entry_point": "f",
    "prompt": "def f(x):\n    return ",
    "suffix": "\n",
    "canonical_solution": "x + 1",
    "test": "def check(f):\n    assert f(1) == 2\n",
}


@pytest.mark.parametrize("kind", CUT_KINDS)
class TestCutItems:
    def test_the_seed_alone_decides(self, kind: str) -> None:
        assert cut_items(FILES, kind, 20, 3) == cut_items(FILES, kind, 20, 3)
        assert cut_items(FILES, kind, 20, 3) != cut_items(FILES, kind, 20, 4)
        assert cut_items(FILES, kind, 20, 3)[:5] == cut_items(FILES, kind, 5, 3)

    def test_the_parts_are_the_file(self, kind: str) -> None:
        by_path = {file.path: file.text for file in FILES}
        for item in cut_items(FILES, kind, 50, 0):
            assert item.kind == kind
            assert item.filled(item.missing) == by_path[item.source]
            assert bool(item.missing.strip()) is (kind != "silent")

    def test_files_without_a_place_are_refused(self, kind: str) -> None:
        with pytest.raises(RequestError, match=f"0 gaps of kind {kind} in 1 files, 2 are wanted"):
            cut_items([SourceFile("p", "p/a.py", "\n\n   \n")], kind, 2, 0)


def test_the_rest_of_a_line_starts_behind_code_and_ends_with_the_line() -> None:
    for item in cut_items(FILES, "rest_of_line", 50, 0):
        assert item.before.rpartition("\n")[2].strip()
        assert "\n" not in item.missing
        assert item.after.startswith("\n")


def test_the_items_of_the_first_model_cards_are_kept() -> None:
    # Chosen by the rule of evaluation.json since the first model; other draws would not compare.
    found = cut_items(FILES, "rest_of_line", 3, 0)
    assert [(len(item.before), item.missing) for item in found] == [
        (430, "L"),
        (523, "items)"),
        (310, "tal_4(items):"),
    ]


def test_a_line_is_whole_and_stands_behind_its_indent() -> None:
    for item in cut_items(FILES, "line", 50, 0):
        assert not item.before.rpartition("\n")[2].strip()
        assert not item.missing[0].isspace()
        assert "\n" not in item.missing
        assert item.after.startswith("\n")


def test_lines_are_two_to_four_and_end_in_code() -> None:
    found = cut_items(FILES, "lines", 50, 0)
    assert {item.missing.count("\n") for item in found} == {1, 2, 3}
    for item in found:
        assert not item.before.rpartition("\n")[2].strip()
        assert item.missing.rpartition("\n")[2].strip()
        assert item.after.startswith("\n")


def test_spans_may_cut_words() -> None:
    found = cut_items(FILES, "span", 200, 0)
    sizes = {len(item.missing) for item in found}
    assert min(sizes) >= 1
    assert max(sizes) == 40
    assert any(item.before[-1:].isalpha() and item.missing[0].isalpha() for item in found)


def test_silent_places_are_complete() -> None:
    text = (
        "def f(a, b):\n    x = g(\n        a,\n\n        b)\n\n    y = [x, h()]\n"
        "    return y\n\n\n# the end\nz = f(1, 2)\n\n"
    )
    found = {
        (place_of(item), item.before[-2:], item.after[:1])
        for item in cut_items([SourceFile("p", "p/a.py", text)], "silent", 400, 0)
    }
    assert found == {
        *(("line_end", before, "\n") for before in ("):", "b)", ")]", " y")),
        # Not the blank line within brackets, nor the last one of the file.
        *(("blank_line", before, "\n") for before in (")\n", "y\n", "\n\n")),
        # Not between brackets that hold nothing.
        *(("before_code", "(a", ","), ("before_code", " b", ")"), ("before_code", "b)", ":")),
        *(("before_code", " a", ","), ("before_code", "[x", ","), ("before_code", "()", "]")),
        *(("before_code", "(1", ","), ("before_code", " 2", ")")),
    }


def test_what_is_not_python_has_no_silent_place() -> None:
    with pytest.raises(RequestError, match="0 gaps of kind silent"):
        cut_items([SourceFile("p", "p/a.py", "f(((\n" * 9)], "silent", 1, 0)


def test_held_out_packages_are_those_of_the_corpus() -> None:
    found = {file.package.lstrip("_") for file in held_out_files()}
    assert found <= HELD_OUT
    # What runs this test is one of them.
    assert "pytest" in found


def test_folders_give_every_usable_file(tmp_path: Path) -> None:
    for index in range(30):
        text = "".join(f"name_{index}_{n} = 'a line of file {index}'\n" for n in range(20))
        (tmp_path / f"{index}.py").write_text(text)
    assert len(files_below([tmp_path])) == 30


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_without_source_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=name) as raised:
        files_below([tmp_path / name])
    assert ".py files" in raised.value.remedy


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may read everything, so the answer is pretended.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RequestError, match=f"cannot read {tmp_path}"):
        files_below([tmp_path])


def write(path: Path, *rows: object) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("name", ["RandomSpanInfillingLight.jsonl.gz", "x.jsonl", "x.jsonl.gz"])
def test_a_benchmark_file_gives_items(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ROW, ROW | {"task_id": "T/2"})
    first, second = humaneval_items(tmp_path)
    assert first == Item(
        "benchmark", "def f(x):\n    return ", "x + 1", "\n", "T/1", Check(ROW["test"], "f")
    )
    assert second.source == "T/2"


def test_the_light_benchmark_is_preferred(tmp_path: Path) -> None:
    write(tmp_path / "RandomSpanInfillingLight.jsonl.gz", ROW)
    write(tmp_path / "RandomSpanInfilling.jsonl.gz", ROW, ROW)
    assert len(humaneval_items(tmp_path)) == 1


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ([], "not a JSON object"),
        (ROW | {"test": 1}, "no text named 'test'"),
        ({"task_id": "T"}, "no text named 'entry_point'"),
        (ROW | {"canonical_solution": ""}, "is empty"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, row: object, what: str) -> None:
    write(tmp_path / "x.jsonl", ROW, row)
    with pytest.raises(RequestError, match=rf"x\.jsonl, line 2: .*{what}"):
        humaneval_items(tmp_path)


@pytest.mark.parametrize("content", [b"{", b'"a\xff"'])
def test_a_file_that_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(RequestError, match=r"x\.jsonl"):
        humaneval_items(tmp_path)


def test_a_cut_off_archive_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl.gz", ROW)
    content = (tmp_path / "x.jsonl.gz").read_bytes()
    for broken in (content[: len(content) // 2], b"not gzip"):
        (tmp_path / "x.jsonl.gz").write_bytes(broken)
        with pytest.raises(RequestError, match=r"x\.jsonl\.gz"):
            humaneval_items(tmp_path)


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_a_folder_without_a_benchmark_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=name) as raised:
        humaneval_items(tmp_path / name)
    assert "RandomSpanInfillingLight" in raised.value.remedy
