"""What speaks against a fill: planted faults are found, and what belongs there is left alone."""

import builtins
import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infilld.engine.silence import trees
from infilld.engine.silence.surroundings import Surroundings

# A page of each language; « and » enclose what is cut out, then what must not be put there.
PAGES = {
    "python": (
        "import os\n\n\ndef sizes(folder):\n    for name in os.listdir(folder):\n"
        "        yield «name, os.path.getsize(name)»\n\n\nprint(dict(sizes('.')))\n",
        ["name, os.path.getsize(name", "name, os.path.getsize(name))", "name = = 2", "(", '"name'],
    ),
    "javascript": (
        "const a = /[(]/;\nfunction total(items) {\n  let sum = 0;\n  for (const item of items) {\n"
        "    sum += «weight(item, `${item.size}`)»;\n  }\n  return sum;\n}\n",
        ["weight(item", "weight(item))", "item +", "{", "= ="],
    ),
    "typescript": (
        "interface Box { size: number; tags?: string[] }\n\n"
        "export function width(box: Box): number {\n"
        "  return «Math.max(box.size, 1)»;\n}\n",
        ["Math.max(box.size, 1", "Math.max(box.size, 1))", "box as", "{ size: "],
    ),
    "tsx": (
        "export function Row({ name }: { name: string }) {\n"
        '  return <li className="row">Don\'t {«name.trim()»}</li>;\n}\n',
        ["name.trim(", "name.trim())", "name +", "name}"],
    ),
    "rust": (
        "fn longest<'a>(a: &'a str, b: &'a str) -> &'a str {\n"
        "    if «a.len() > b.len()» { a } else { b }\n}\n",
        ["a.len( > b.len()", "a.len() > b.len())", "a.len() >", "let = a {"],
    ),
    "go": (
        "package main\n\nfunc sum(values []int) int {\n\ttotal := 0\n"
        "\tfor _, value := range values {\n\t\ttotal += «scale(value)»\n\t}\n\treturn total\n}\n",
        ["scale(value", "scale(value))", "value +* 2)", "}"],
    ),
    "c": (
        "#include <stdio.h>\n\nint main(int argc, char **argv) {\n"
        '    for (int i = 0; i < argc; i++) {\n        «printf("%s\\n", argv[i]);»\n    }\n'
        "    return 0;\n}\n",
        ['printf("%s\\n", argv[i];', 'printf("%s\\n", argv[i]));', 'printf("%s', "i = ;", "}"],
    ),
    "cpp": (
        "#include <vector>\n\ntemplate <typename T>\nT sum(const std::vector<T>& values) {\n"
        "  T total{};\n  for (const auto& value : values) {\n"
        "    total += «scale(value[0], 1'000)»;\n  }\n  return total;\n}\n",
        ["scale(value[0", "scale(value[0]))", "value ..", "}"],
    ),
    "java": (
        "public class Box {\n    private final int size;\n\n    public Box(int size) {\n"
        "        this.size = «Math.max(size, 1)»;\n    }\n}\n",
        ["Math.max(size, 1", "Math.max(size, 1))", "size +", "new int[{"],
    ),
    "json": (
        '{\n  "name": "box",\n  "sizes": [«1, 2, {"a": null}»],\n  "on": true\n}\n',
        ['1, 2, {"a": null', "1, 2]", "1 2", '"a": 1', '"a'],
    ),
    "html": (
        '<!doctype html>\n<html>\n<body>\n<ul class="a">\n«<li>one (1</li>»\n'
        "</ul>\n</body>\n</html>\n",
        ["<li>one</ul>", "<li one</li>", "<", "</div>"],
    ),
    "css": (
        "body {\n  margin: 0;\n  «color: rgb(1, 2, 3);»\n}\n\n.row:hover > a { width: 1px }\n",
        ["color: rgb(1, 2, 3;", "color: rgb(1, 2, 3));", "color: {", "}"],
    ),
    "bash": (
        '#!/bin/bash\nset -e\nfor name in *.txt; do\n  if [ -f "$name" ]; then\n'
        '    «echo "$(wc -l < "$name")"»\n  fi\ndone\n',
        ['echo "$(wc -l', "echo )", "echo $(( 1 +", "if true; then"],
    ),
    "yaml": (
        "name: box\nsizes:\n  - 1\n  - 2\non:\n  push:\n"
        "    branches: «[main, dev]»\n    tags: [v1]\n",
        ["[main, dev", "{main: [dev}", '"main', "main: dev: ["],
    ),
    "toml": (
        '[project]\nname = "box"\nversion = «"1.0"»\n\n[tool.box]\nsizes = [1, 2]\n',
        ['"1.0', "[1", "= 1", "1.0]"],
    ),
}
FAULTS = [(name, fill) for name, (_, fills) in PAGES.items() for fill in fills]


def cut(page: str) -> tuple[str, str, str]:
    before, _, rest = page.partition("«")
    missing, _, after = rest.partition("»")
    return before, missing, after


@pytest.mark.parametrize("language", PAGES)
def test_what_belongs_there_is_left_alone(language: str) -> None:
    before, missing, after = cut(PAGES[language][0])
    around = Surroundings(before, after, language=language)
    assert around.objection(missing) is None
    assert around.trimmed(missing) == missing


@pytest.mark.parametrize(("language", "fill"), FAULTS)
def test_planted_faults_are_found(language: str, fill: str) -> None:
    before, missing, after = cut(PAGES[language][0])
    for replaced in ("", missing):
        around = Surroundings(before, after, language=language, replaced=replaced)
        objection = around.objection(fill)
        kept = around.trimmed(fill)
        # What can be cut off is a fault that is mended, and nothing may be left.
        if objection is None:
            assert fill.strip(")]}") == kept != fill
        elif kept:
            assert objection.reason in ("unbalanced", "does_not_parse")
        else:
            assert objection.reason == "repeats_suffix"


@pytest.mark.parametrize("language", PAGES)
def test_a_fault_is_found_where_something_else_is_broken(language: str) -> None:
    if language in ("html", "yaml", "toml", "css", "json", "bash"):
        pytest.skip("what is broken there changes how the rest is read")
    page, fills = PAGES[language]
    before, missing, after = cut(page)
    after += "\n\nclass ] 1 {\n"
    around = Surroundings(before, after, language=language)
    assert around.objection(missing) is None
    assert around.objection(fills[0]) is not None


@pytest.mark.parametrize("language", PAGES)
def test_the_lines_around_are_not_written_again(language: str) -> None:
    page = PAGES[language][0].replace("«", "").replace("»", "")
    lines = page.splitlines()
    told = [i for i in range(1, len(lines) - 1) if len(lines[i].strip()) >= 16]
    for i in told:
        prefix, suffix = "\n".join([*lines[:i], ""]), "\n" + "\n".join(lines[i + 1 :])
        again = Surroundings("\n".join([*lines[: i + 1], ""]), suffix, language=language)
        if not lines[i].strip().startswith("<"):
            assert again.objection(lines[i]) is not None
        following = "\n".join([*lines[i:], ""])
        assert Surroundings(prefix, "\n" + following, language=language).trimmed(lines[i]) == ""


@pytest.mark.parametrize(
    ("prefix", "fill", "suffix", "expected"),
    [
        ("x = f(", "a)", ")\n", "a"),
        ("x = f(", "a):", "):\n", "a"),
        ("x = ", "foo(bar())", ")\n", "foo(bar()"),
        ("x = (", "foo(bar())", ")\n", "foo(bar())"),
        ("x = g(f(", "a))", "))\n", "a"),
        ("x = g(", "f(a))", ")\n", "f(a)"),
        ('x = "', 'abc"', '"\n', "abc"),
        ("x = f(\n    a", ", b)", "\n)\n", ", b"),
        ("x = ", "1,", ",\n", "1"),
        ("x = 1\n", "y = first(x)\nz = second(x)", "\nz = second(x)\n", "y = first(x)"),
        ("x = 1\n", "y = first(x)\n\nz = second(x)\n", "\n\nz = second(x)\n", "y = first(x)"),
        ("if x:\n    ", "return None", "\nreturn None\n", "return None"),
        ("x = ", "1  ", "\n", "1"),
        ("x = ", "1 ", "+ 2\n", "1 "),
        ("f(", "a)\ng(b)\n", ")\ng(b)\n", "a"),
        # A table of equal rows, a loop that was unrolled.
        (
            "if x:\n    ",
            "step_on(s, o)\n    step_on(s, o)",
            "\n    step_on(s, o)\n" * 2,
            "step_on(s, o)\n    step_on(s, o)",
        ),
        ("    first, 1, 1,\n    ", "first, 1, 1,", "\n    first, 1, 1,\n", "first, 1, 1,"),
    ],
)
def test_the_suffix_is_trimmed(prefix: str, fill: str, suffix: str, expected: str) -> None:
    around = Surroundings(prefix, suffix, language="python")
    assert around.trimmed(fill) == expected
    assert around.trimmed(expected) == expected


def test_what_is_only_a_repetition_is_told() -> None:
    around = Surroundings(
        "value = read(path)\n", "\nother = write(path)\nlast = close(path)\n", language=None
    )
    for fill, reason in [
        ("other = write(path)", "repeats_suffix"),
        ("other = write(path)\nlast = close(path)", "repeats_suffix"),
        ("x = 1\nother = write(path)\nlast = close(path)\ny = 2", "repeats_suffix"),
        ("value = read(path)", "repeats_prefix"),
        ("x = parse(value)\n" * 3, "repetition"),
        ("a = build(c)\nd = parse(value)\n" * 4, "repetition"),
        ("x = " + "very " * 20, "repetition"),
        ("0, " * 60, "repetition"),
    ]:
        objection = around.objection(fill)
        assert objection is not None
        assert objection.reason == reason
        assert objection.why.endswith(".")
    for fill in ("value = read(other)", "# " + "-" * 90, "\\x00" * 12, "pass\npass\npass"):
        assert around.objection(fill) is None
    line = Surroundings("total = count(rows)", "\n", language="python")
    started_again = line.objection("total = count(rows) + 1")
    assert started_again is not None
    assert started_again.reason == "repeats_prefix"


def test_a_block_may_be_opened_whose_end_is_not_written_yet() -> None:
    around = Surroundings("function f(", "\n", language="javascript")
    assert around.objection("a, b) {") is None
    assert around.objection("a, b)) {") is not None
    assert around.objection("(a, b) {") is not None


def test_a_bracket_open_elsewhere_is_not_the_fill_s_fault() -> None:
    around = Surroundings("x = f(\n\ny = ", "\n", language="rust")
    assert around.objection("1") is None
    assert around.objection("(1") is not None


code = st.text(alphabet="ab ()[]{}\"'\n,;:#/`$", max_size=24)


@settings(deadline=None, max_examples=150)
@given(code, code, code, st.sampled_from(["python", "javascript", "rust", "html", None]))
def test_trimming(prefix: str, fill: str, suffix: str, language: str | None) -> None:
    around = Surroundings(prefix, suffix, language=language)
    once = around.trimmed(fill)
    assert fill.startswith(once)
    assert around.trimmed(once) == once
    around.objection(fill)


def balanced() -> st.SearchStrategy[str]:
    """Calls within calls."""
    return st.recursive(
        st.sampled_from(["a", "b1", "'(' ", "[]"]),
        lambda inner: st.lists(inner, min_size=1, max_size=3).map(
            lambda parts: f"f({', '.join(parts)})"
        ),
        max_leaves=8,
    )


@settings(deadline=None, max_examples=150)
@given(balanced(), st.data())
def test_a_piece_of_balanced_code_is_never_trimmed(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    around = Surroundings(text[:start], f"{text[end:]}\n", language="python")
    piece = text[start:end]
    kept = piece if text[end:].strip() else piece.rstrip()
    assert around.trimmed(piece) == kept


LONG = [
    ("", "", ""),
    ("\0" * 50, "a\0(", "\0"),
    ("x" * 1_000_000, "(", "y" * 100_000),
    ("(" * 400_000, ")" * 30_000, ")" * 10),
    ("a = '" + "\u202e\U0001f600" * 100, "\ufeff'", "\n\t \t x\n"),
    ("x = (1)\n" * 20_000, "y = (", "\n" + "z = f(x)\n" * 20_000),
    (
        "def f(a):\n    return {a: [1]}\n\n\n" * 5_000,
        "y = ((2)",
        "\n\n\nclass A:\n    b = 1\n" * 5_000,
    ),
]


@pytest.mark.parametrize("language", [*PAGES, "fortran", None])
@pytest.mark.parametrize(("prefix", "fill", "suffix"), LONG, ids=range(len(LONG)))
def test_anything_is_judged_in_bounded_time(
    prefix: str, fill: str, suffix: str, language: str | None
) -> None:
    started = time.monotonic()
    around = Surroundings(prefix, suffix, language=language)
    around.trimmed(fill)
    around.objection(fill)
    assert time.monotonic() - started < 2


def test_a_long_document_is_judged() -> None:
    block = "def f(a):\n    return {a: [1]}\n\n\n"
    around = Surroundings(block * 5_000, "\n\n\n" + block * 5_000, language="python")
    assert around.objection("y = (2)") is None
    for fill in ("y = (2", "y = (2))", "y = = 2"):
        assert around.objection(fill) is not None


def test_a_method_of_a_long_class_is_judged() -> None:
    methods = "\n\n    def f(self):\n        return {1: [self.a]}\n" * 2_000
    before = f"class B:\n    a = 1\n{methods}\n    def g(self):\n        "
    around = Surroundings(before, f"\n{methods}", language="python")
    assert around.objection("return f(self)") is None
    for fill in ("return f(self", "return f(self))", "return = self"):
        assert around.objection(fill) is not None


def test_branches_of_the_preprocessor_may_close_the_same_bracket() -> None:
    before = "#ifdef A\nint f(int a) {\n#else\nint f(long a) {\n#endif\n    "
    around = Surroundings(before, "\n}\n", language="c")
    assert around.objection("return a;") is None
    assert around.objection("return (a;") is not None
    macro = Surroundings("", "\n\nint g(int a) { return a; }\n", language="cpp")
    assert macro.objection("A_API int f(int a);") is None


def test_nothing_is_parsed_too_late() -> None:
    around = Surroundings("x = ", "\n", language="python")
    assert around.objection("= 1") is not None
    assert around.objection("= 1", until=time.monotonic() - 1) is None
    assert around.objection("(1", until=time.monotonic() - 1) is not None


@pytest.fixture
def no_grammars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("tree_sitter"):
            raise ImportError(name)
        return real(name, *args, **more)

    trees._grammar.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    yield
    trees._grammar.cache_clear()


@pytest.mark.usefixtures("no_grammars")
def test_a_missing_grammar_judges_nothing_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert Surroundings("let x = ", ";\n", language="javascript").objection("= =") is None
    assert len([record for record in caplog.records if "javascript" in record.message]) == 1
