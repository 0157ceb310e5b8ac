"""`infilld models`: what it accepts, what it tells, and what it makes."""

import json
import math
import os
import pty
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_gguf import Type, config_json, write_gguf

from infilld.engine.checkpoints.weights import expected_shapes
from infilld.engine.config import ModelConfig
from infilld.server import cli
from infilld.server.settings import STARTER
from infilld.server.verbs import models

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


def infilld(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A real process of the command line."""
    command = [sys.executable, "-P", "-m", "infilld.server", "models", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def told(capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What `infilld models WORDS --json` prints."""
    assert cli.main(["models", *words, "--json", "--device", "cpu"]) == 0
    report: dict[str, Any] = json.loads(capfd.readouterr().out)
    return report


@needs_starter
class TestInspect:
    def test_it_tells_what_is_stored_how(self, capfd: pytest.CaptureFixture[str]) -> None:
        report = told(capfd, "inspect", STARTER)
        assert report["format"] == "plain"
        parts = {row["part"]: row for row in report["parts"]}
        assert sum(row["parameters"] for row in parts.values()) == report["parameters"]
        assert sum(row["stored_bytes"] for row in parts.values()) == report["stored_bytes"]
        assert parts["experts"]["bits_per_weight"] == 16
        assert sum(row["bytes"] for row in report["memory"]) == report["needed_bytes"]
        assert report["fits"]
        assert report["instead"] == []
        assert report["context_tokens"] == report["most_context_tokens"] == 512

    def test_less_context_takes_less(self, capfd: pytest.CaptureFixture[str]) -> None:
        one = told(capfd, "inspect", STARTER, "--context", "100")
        other = told(capfd, "inspect", STARTER, "--context-tokens", "500")
        assert (one["context_tokens"], other["context_tokens"]) == (100, 500)
        assert one["needed_bytes"] < other["needed_bytes"]

    def test_a_gpu_that_is_not_here(self, capfd: pytest.CaptureFixture[str]) -> None:
        report = told(capfd, "inspect", STARTER, "--memory", "18")
        assert (report["device"], report["available_bytes"]) == ("a GPU", 18_000_000_000)
        assert report["fits"]
        assert "CUDA context and graphs" in {row["what"] for row in report["memory"]}
        report = told(capfd, "inspect", STARTER, "--memory", "0.7")
        assert not report["fits"]
        assert report["most_context_tokens"] == 0

    def test_more_context_than_the_model_reads(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["models", "inspect", STARTER, "--context", "513"]) == 1
        said = capfd.readouterr().err
        assert "513 tokens is wanted, the model reads 512 at most" in said
        assert "Ask for a context of 1 to 512 tokens." in said

    @pytest.mark.parametrize("flag", ["--context", "--memory"])
    def test_a_flag_that_is_no_number(self, flag: str, capfd: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["models", "inspect", STARTER, flag, "much"]) == 2
        assert "expected" in capfd.readouterr().err

    def test_for_people(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["models", "inspect", STARTER, "--device", "cpu"]) == 0
        lines = capfd.readouterr().out.splitlines()
        assert any(line.split()[:2] == ["format", "plain"] for line in lines)
        assert any(line.split()[:4] == ["embedding", "BF16", "16.0", "bits"] for line in lines)
        assert any(line.startswith("  keys and values") for line in lines)


def write_large(folder: Path) -> None:
    """Google's 26B model, all of whose numbers are holes in the file."""
    folder.mkdir()
    config = config_json(
        vocab_size=262_144,
        hidden_size=2816,
        intermediate_size=2112,
        moe_intermediate_size=704,
        num_hidden_layers=30,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 5,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        sliding_window=1024,
        num_experts=128,
        top_k_experts=8,
        max_position_embeddings=262_144,
    ) | {"canvas_length": 256}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = dict(expected_shapes(ModelConfig.from_dict(config)))
    (layers,) = shapes.pop("encoder_scalars")
    named = {f"model.decoder.{name}": shape for name, shape in shapes.items()}
    scalar = "model.encoder.language_model.layers.{}.layer_scalar"
    header, at = {}, 0
    for name, shape in {**named, **{scalar.format(i): (1,) for i in range(layers)}}.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (at, end)}
        at = end
    told = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(told)) + told)
        file.truncate(8 + len(told) + at)


class TestLarge:
    """More bytes than many a machine has memory: only the header may be looked at."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_large(tmp_path / "large")
        return tmp_path / "large"

    def test_int4_with_32k_of_context_fits_18_gb(
        self, folder: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        report = told(capfd, "inspect", str(folder), "--memory", "18", "--context", "32768")
        assert report["format"] == "plain"
        assert report["stored_bytes"] == 50_501_973_624
        assert report["fits"]
        memory = {row["what"]: row for row in report["memory"]}
        assert memory["weights in few bits"]["remark"] == "int4"
        assert report["needed_bytes"] == pytest.approx(17.93e9, abs=0.01e9)

    def test_what_fits_instead_is_told(
        self, folder: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        plain = ["--weights", "plain", "--memory", "24"]
        report = told(capfd, "inspect", str(folder), *plain, "--context", "32768")
        assert not report["fits"]
        (offer,) = report["instead"]
        assert (offer["weights"], offer["context_tokens"]) == ("int4", 32_768)
        assert offer["needed_bytes"] < 24_000_000_000


def test_a_gguf_file_is_told_by_itself_or_by_its_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def storage(name: str, shape: tuple[int, ...]) -> Type:
        return Type.Q4_K if len(shape) > 1 and shape[-1] % 256 == 0 else Type.F32

    path = write_gguf(tmp_path, storage).path
    report = told(capfd, "inspect", str(path), "--memory", "18")
    by_folder = told(capfd, "inspect", str(tmp_path), "--memory", "18")
    assert report == by_folder | {"folder": str(path)}
    assert report["format"] == "GGUF Q4_K"
    parts = {(row["part"], row["storage"]): row for row in report["parts"]}
    assert parts["experts", "Q4_K"]["held_as"] == "int4"
    assert parts["embedding", "Q4_K"]["held_as"] == "plain"
    assert any("made plain" in note for note in report["notes"])


@needs_starter
class TestQuantize:
    @pytest.mark.e2e
    def test_a_new_user(
        self, own_home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "small"
        done = infilld("quantize", STARTER, str(out), "--device", "cpu")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        first, second = done.stdout.splitlines()
        assert first.startswith(f"{out}: int4 in groups of 32, 3.5 MB of 6.7 MB, ")
        assert second == f"Use it with: infilld models use {out}"
        report = told(capfd, "inspect", str(out))
        assert report["format"] == "infilld int4"
        assert report["stored_bytes"] < 3_500_000
        held = {row["part"]: row["held_as"] for row in report["parts"]}
        assert [part for part, kind in held.items() if kind == "int4"] == [
            "attention",
            "dense MLP",
            "experts",
        ]
        assert cli.main(["models", "use", str(out)]) == 0
        capfd.readouterr()
        assert cli.main(["models", "list", "--json"]) == 0
        (row,) = [row for row in json.loads(capfd.readouterr().out) if row["configured"]]
        assert (row["folder"], row["present"]) == (str(out), True)
        assert row["stored_bytes"] == sum(p.stat().st_size for p in out.glob("*.safetensors"))

    @pytest.mark.e2e
    def test_a_terminal_sees_a_bar(self, tmp_path: Path) -> None:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-P", "-m", "infilld.server", "models", "quantize"]
        words = [STARTER, str(tmp_path / "out"), "--device", "cpu"]
        subprocess.run([*command, *words], stdout=subprocess.DEVNULL, stderr=theirs, check=True)
        os.close(theirs)
        assert "6.7/6.7 MB" in os.read(ours, 65536).decode()
        os.close(ours)

    def test_json_and_another_kind(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        report = told(capfd, "quantize", STARTER, str(out), "--kind", "int8", "--group", "64")
        assert (report["folder"], report["kind"], report["group"]) == (str(out), "int8", 64)
        assert told(capfd, "inspect", str(out))["format"] == "infilld int8"

    @pytest.mark.parametrize(
        ("words", "code", "said"),
        [
            (["quantize", STARTER], 2, "needs two folders"),
            (["quantize"], 2, "needs two folders"),
            (["quantize", STARTER, "OUT", "--group", "12"], 2, "expected a power of two"),
            (["inspect", STARTER, "OUT"], 2, "takes one folder"),
            (["quantize", STARTER, "."], 1, "exists and is not an empty folder"),
            (["quantize", "NOWHERE", "OUT"], 1, "no model folder at"),
            (["quantize", STARTER, "/proc/out"], 1, "cannot write /proc/out"),
        ],
        ids=["out", "both", "group", "extra", "exists", "nowhere", "unwritable"],
    )
    def test_what_is_refused(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        words: list[str],
        code: int,
        said: str,
    ) -> None:
        (tmp_path / "mine").write_text("mine")
        monkeypatch.chdir(tmp_path)
        assert cli.main(["models", *words, "--device", "cpu"]) == code
        lines = capfd.readouterr().err.splitlines()
        assert said in lines[0]
        assert os.listdir(tmp_path) == ["mine"]

    def test_what_is_quantized_is_refused(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        told(capfd, "quantize", STARTER, str(tmp_path / "out"))
        again = [str(tmp_path / "out"), str(tmp_path / "again")]
        assert cli.main(["models", "quantize", *again, "--device", "cpu"]) == 1
        assert "is quantized already" in capfd.readouterr().err
        path = write_gguf(tmp_path / "gguf", lambda name, shape: Type.F32).path
        assert cli.main(["models", "quantize", str(path), again[1], "--device", "cpu"]) == 1
        assert "holds a GGUF file" in capfd.readouterr().err
