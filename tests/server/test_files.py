import os
import stat
from pathlib import Path

import pytest

from infilld.server.process.files import put


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    put(tmp_path / "a", b"\x00new")
    assert (tmp_path / "a").read_bytes() == b"\x00new"
    assert mode_of(tmp_path / "a") == 0o600


@pytest.mark.parametrize("mode", [0o644, 0o600, 0o755])
def test_link_and_mode_stay(tmp_path: Path, mode: int) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(mode)
    link.symlink_to(real)
    put(link, b"new")
    assert (real.read_bytes(), mode_of(real), link.is_symlink()) == (b"new", mode, True)
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_mode_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "a").touch(0o644)
    put(tmp_path / "a", b"", mode=0o600)
    assert mode_of(tmp_path / "a") == 0o600


def test_a_refusal_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def refuse() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put(path, b"new", check=refuse)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
