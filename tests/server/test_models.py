"""`infilld models use`: what it accepts, and what it does to the configuration."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from infilld.server import cli, models
from infilld.server.settings import STARTER

STARTER_FOLDER = models.folder_of(STARTER)

needs_starter = pytest.mark.skipif(
    not (STARTER_FOLDER / "config.json").is_file(),
    reason="this checkout has no starter model yet",
)


@pytest.fixture
def config(own_home: Path) -> Path:
    """A configuration that is a link to a file elsewhere, as in a repository of dotfiles."""
    real = own_home / "dotfiles" / "infilld.toml"
    real.parent.mkdir()
    real.write_text("# mine\nport = 0\n")
    real.chmod(0o644)
    path = own_home / "config" / "infilld" / "config.toml"
    path.parent.mkdir(parents=True)
    path.symlink_to(real)
    return path


@needs_starter
def test_using_a_model_keeps_link_and_mode(config: Path) -> None:
    assert cli.main(["models", "use", STARTER]) == 0
    assert config.is_symlink()
    real = config.resolve()
    assert real.read_text() == 'model = "starter"\n# mine\nport = 0\n'
    assert stat.S_IMODE(real.stat().st_mode) == 0o644
    assert os.listdir(real.parent) == ["infilld.toml"]
    assert os.listdir(config.parent) == ["config.toml"]


@needs_starter
def test_the_first_configuration_is_made(own_home: Path) -> None:
    assert cli.main(["models", "use", STARTER]) == 0
    path = own_home / "config" / "infilld" / "config.toml"
    assert path.read_text() == 'model = "starter"\n'


@needs_starter
def test_a_configuration_that_cannot_be_written_stays(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cli.main(["models", "use", STARTER]) == 1
    assert f"cannot write {config}: No space left on device" in capfd.readouterr().err
    assert config.read_text() == "# mine\nport = 0\n"
    assert os.listdir(config.resolve().parent) == ["infilld.toml"]


@needs_starter
def test_free_memory_is_that_of_the_chosen_device(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from infilld.engine import worker

    free_bytes = {torch.device("cuda:0"): 1, torch.device("cuda:1"): 1 << 40}
    monkeypatch.setattr(worker, "pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes[device], 1 << 40))
    assert not models.inspect(STARTER_FOLDER, "cuda:0")["fits"]
    report = models.inspect(STARTER_FOLDER, "cuda:1")
    assert (report["device"], report["available_bytes"]) == ("cuda:1", 1 << 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the starter model."""
    return Path(shutil.copytree(STARTER_FOLDER, tmp_path / "copy"))


@needs_starter
@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "holds no tokenizer.json"), ("{}", "is not a tokenizer")],
    ids=["absent", "damaged"],
)
def test_a_folder_without_a_tokenizer_is_not_used(
    own_home: Path,
    folder: Path,
    content: str | None,
    words: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = folder / "tokenizer.json"
    path.unlink() if content is None else path.write_text(content)
    assert cli.main(["models", "use", str(folder)]) == 1
    said, remedy = capfd.readouterr().err.splitlines()
    assert words in said
    assert remedy.strip()
    assert not (own_home / "config").exists()
    assert cli.main(["doctor", "--json", "--model", str(folder), "--device", "cpu"]) == 1
    checks = {check["name"]: check for check in json.loads(capfd.readouterr().out)}
    assert words in checks["model"]["found"]


@needs_starter
def test_a_whole_folder_is_used(own_home: Path, folder: Path) -> None:
    assert cli.main(["models", "use", str(folder)]) == 0
    path = own_home / "config" / "infilld" / "config.toml"
    assert path.read_text() == f'model = "{folder}"\n'
