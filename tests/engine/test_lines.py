"""A fill ends its lines as the text around it does."""

import pytest

from infilld.engine.lines import line_end, unix


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("", 0, "\n"),
        ("no line", 3, "\n"),
        ("a\nb\r\nc", 2, "\n"),
        ("a\nb\r\nc", 5, "\r\n"),
        ("a\r\nb\nc", 5, "\n"),
        ("a\rb", 2, "\r"),
        ("ab\r\nc", 0, "\r\n"),
        ("ab\rc", 0, "\r"),
        ("a\r\nb", 2, "\r\n"),
        ("\n", 1, "\n"),
    ],
)
def test_the_line_end_in_use(text: str, at: int, expected: str) -> None:
    assert line_end(text, at) == expected


def test_unix() -> None:
    assert unix("a\r\nb\rc\nd\r\r\n") == "a\nb\nc\nd\n\n"
