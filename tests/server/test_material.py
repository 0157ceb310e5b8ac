"""Files that go along with a request: text, of a size, and no secrets."""

import os
from pathlib import Path

import pytest

from infilld.server.verbs import material
from infilld.server.verbs.document import DocumentProblem


def test_a_file_goes_along_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "b.py"
    path.write_bytes("\ufeffé = 1\r\n".encode())
    item = material.read(path)
    assert (item.path, item.text, item.kind) == (str(path), "é = 1\r\n", "open")


@pytest.mark.parametrize(
    "name",
    [
        *(".env", ".env.local", "prod.env", "server.pem", "SERVER.KEY", "id_rsa", "id_ed25519"),
        *(".netrc", ".npmrc", "credentials", "credentials.json", "secrets.yaml", "a.p12"),
        *(".ssh/config", ".aws/config"),
    ],
)
def test_what_looks_secret_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("a = 1\n")
    link = tmp_path / "harmless.py"
    link.symlink_to(path)
    for way in (path, link):
        with pytest.raises(DocumentProblem, match="looks like a secret") as caught:
            material.read(way)
        assert caught.value.remedy


@pytest.mark.parametrize(
    "name", ["environment.py", "secrets.py", "credentials.py", "id_rsa.pub", "keys.py", "env.ts"]
)
def test_source_with_such_a_name_goes_along(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("a = 1\n")
    assert material.read(path).text == "a = 1\n"


def test_a_private_key_is_refused_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine:\n-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3Blb\n")
    with pytest.raises(DocumentProblem, match="looks like a secret"):
        material.read(path)


def test_what_is_no_text_or_too_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for content, words in (
        (b"a\0b", "NUL"),
        (b"\xff", "not UTF-8"),
        (b"a" * (material.MAX_BYTES + 1), "1000001 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(DocumentProblem, match=words):
            material.read(path)
    path.write_bytes(b"a" * material.MAX_BYTES)
    assert len(material.read(path).text) == material.MAX_BYTES


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in (
        ("pipe", "is no file"),
        ("", "is no file"),
        ("none", "No such file"),
        ("loop", "cannot read"),
    ):
        with pytest.raises(DocumentProblem, match=words):
            material.read(tmp_path / name)
