import pytest

from infilld.engine.languages import STARTER_LANGUAGE, comment_sign, language_of


@pytest.mark.parametrize(
    ("path", "language", "expected"),
    [
        ("a/b.py", None, "python"),
        ("a\\b.PYI", None, "python"),
        ("b.tsx", None, "tsx"),
        ("b.py", "typescriptreact", "tsx"),
        (None, "TypeScript", "typescript"),
        (None, "shellscript", "bash"),
        ("x.h", None, "cpp"),
        ("x.h", "c", "c"),
        ("Makefile", None, "makefile"),
        ("notes.rs", "plaintext", "rust"),
        ("notes", None, None),
        ("", "", None),
        (None, "fortran", "fortran"),
        (None, None, None),
    ],
)
def test_names(path: str | None, language: str | None, expected: str | None) -> None:
    assert language_of(path, language) == expected


def test_an_unnamed_document_is_what_its_caller_says() -> None:
    assert language_of(None, None, unnamed=STARTER_LANGUAGE) == "python"
    assert language_of("a", None, unnamed=STARTER_LANGUAGE) is None


def test_comment_signs() -> None:
    assert comment_sign("python") == "#"
    assert comment_sign("tsx") == "//"
    assert [comment_sign(name) for name in ("json", "css", "html", "fortran", None)] == [None] * 5
