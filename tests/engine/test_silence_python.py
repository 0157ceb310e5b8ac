"""A fill is blamed for broken syntax only where nothing else is broken."""

import time

import pytest

from infilld.engine.silence.python import PythonText, parses


@pytest.mark.parametrize(
    ("prefix", "fill", "suffix", "broken"),
    [
        ("x = ", "1", "\n", False),
        ("x = ", "(1", "\n", True),
        ("def f(a):\n    return a +", " a", "\n", False),
        ("def f(a):\n    return a +", " a)", "\n", True),
        # A line that opens a block.
        ("if x", " > 1:", "\n    y = 1\n", False),
        ("if x", " > 1", "\n    y = 1\n", True),
        ("try:\n    f()\nexcept", " ValueError", "\n    pass\n", True),
        ("if a:\n    f()\nel", "if b", "\n    pass\n", True),
        # Several lines: headers, the start of a statement, the end of brackets.
        ("class A:\n    ", "x = (", "\n            y = 1\n", True),
        ("def f(a):\n    ", "a(\n    b", "\n    else:\n        pass\n", True),
        ("f(\n    a,\n    ", "b = = c", "\nx = 1\n", True),
        # Inside brackets.
        ("f(\n    1,\n    ", "2 3", ",\n)\n", True),
        ("d = {\n    'a': 1,\n    ", "'b' 2", ",\n}\n", True),
        ("d = {\n    'a': 1,\n    ", "'b': 2", ",\n}\n", False),
        # Broken elsewhere: nothing can be said.
        ("def (\n\nx = ", "((", "\n", False),
        ("x = ", "((", "\ny = = 2\n", False),
        ("function f() {\n  return ", "((", ";\n}\n", False),
        ("", "((", "", True),
        ("s = '\0'\nx = ", "((", "\n", False),
    ],
)
def test_what_breaks_a_document(prefix: str, fill: str, suffix: str, broken: bool) -> None:
    assert PythonText(prefix, suffix).is_broken_by(fill) is broken


def test_a_long_document_is_judged_in_bounded_time() -> None:
    text = PythonText("x = 1\n" * 16_000 + "y = ", "\n")
    started = time.monotonic()
    assert text.is_broken_by("((")
    assert time.monotonic() - started < 5
    started = time.monotonic()
    assert PythonText("x = 1\n" * 200_000, "\n").is_broken_by("((")
    assert time.monotonic() - started < 1


def test_what_parses() -> None:
    assert parses("x = 1\n")
    assert parses("'\\d'\n")  # a warning, not an error
    assert not parses("x = \n")
    assert not parses("\0")
    assert not parses("(" * 5000)
