"""A checkpoint quantized here is the same whether made or kept, and what is broken is made anew."""

import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import loaded_bytes
from safetensors.torch import load_file, save_file
from tiny_model import ALL_TWO, TAME, checkpoint
from torch import Tensor

from infilld.engine.checkpoints import files, kept, streaming
from infilld.engine.checkpoints.kept import MANIFEST, inspect_kept, is_kept, read_kept
from infilld.engine.checkpoints.loading import inspect_checkpoint, read_weights
from infilld.engine.checkpoints.quantizing import Quantization, is_quantizable, quantize_rows
from infilld.engine.checkpoints.streaming import cache_folder, quantize_folder, read_quantized
from infilld.engine.checkpoints.weights import Weights
from infilld.engine.errors import CheckpointMismatch, CheckpointMissing, NotEnoughMemory
from infilld.kernels._weights import QuantizedWeight

INT4, INT8 = Quantization(kind="int4"), Quantization(kind="int8")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a plain checkpoint, with a tokenizer beside it."""
    folder = Path(shutil.copytree(checkpoint(TAME), tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A copy of a plain checkpoint in several files."""
    return Path(shutil.copytree(checkpoint(ALL_TWO), tmp_path / "shards"))


def same(one: Weights, other: Weights) -> bool:
    """Whether two readings hold the same bits in the same form."""
    return one.tensors.keys() == other.tensors.keys() and all(
        same_tensor(one.tensors[name], other.tensors[name]) for name in one.tensors
    )


def same_tensor(one: Tensor | QuantizedWeight, other: Tensor | QuantizedWeight) -> bool:
    if isinstance(one, QuantizedWeight) and isinstance(other, QuantizedWeight):
        return (one.kind, one.group, one.parts.keys()) == (
            other.kind,
            other.group,
            other.parts.keys(),
        ) and all(same_tensor(part, other.parts[name]) for name, part in one.parts.items())
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return False


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing was to be quantized")


def entries() -> list[str]:
    """Folders in the cache."""
    return sorted(path.name for path in cache_folder().iterdir() if path.is_dir())


class TestReading:
    @pytest.mark.parametrize("quantization", [INT4, INT8], ids=["int4", "int8"])
    def test_matrices_are_quantized_and_the_rest_is_not(
        self, source: Path, quantization: Quantization
    ) -> None:
        plain = read_weights(source, dtype=torch.bfloat16)
        exact = read_weights(source)
        weights = read_quantized(source, quantization, dtype=torch.bfloat16)
        assert weights.config == plain.config
        assert weights.format == f"infilld {quantization.kind}"
        assert weights.tensors.keys() == plain.tensors.keys()
        few = 0
        for name, tensor in exact.tensors.items():
            assert isinstance(tensor, Tensor)
            if is_quantizable(name, tensor.shape):
                few += 1
                expected: Tensor | QuantizedWeight = quantize_rows(tensor, quantization)
            else:
                expected = plain.tensors[name]
            assert same_tensor(weights.tensors[name], expected), name
        # Four projections in a sliding layer, three in a full one; four more in each. The experts'
        # second matrix has 24 columns, which no group divides.
        assert few == 2 * 4 + 1 * 3 + 3 * (3 + 1)

    def test_the_second_time_it_is_read(
        self, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[tuple[int, int]] = []

        def progress(done: int, total: int) -> None:
            told.append((done, total))

        first = read_quantized(source, INT4, progress=progress)
        assert told == sorted(told)
        assert told[-1][0] == told[-1][1] > 0
        monkeypatch.setattr(streaming, "quantize_rows", never)
        assert same(first, read_quantized(source, INT4, progress=never))

    def test_it_does_not_matter_where_files_end(
        self, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = read_quantized(shards, INT4)
        whole = tmp_path / "whole"
        whole.mkdir()
        tensors = {}
        for path in shards.glob("*.safetensors"):
            tensors |= load_file(path)
        save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(shards / "config.json", whole / "config.json")
        monkeypatch.setattr(kept, "_FILE_BYTES", 4096)
        other = read_quantized(whole, INT4)
        assert same(one, other)
        (folder,) = [path for path in cache_folder().iterdir() if kept.made_from(path) == whole]
        assert len(list(folder.glob("*.safetensors"))) > 5

    def test_only_safetensors_and_json_are_kept(self, source: Path) -> None:
        read_quantized(source, INT4)
        (name,) = entries()
        found = {path.suffix for path in (cache_folder() / name).iterdir()}
        assert found == {".safetensors", ".json"}

    def test_two_at_once_quantize_once(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls: list[str] = []
        real = streaming._stream

        def counted(*args: Any) -> Any:
            calls.append("stream")
            return real(*args)

        monkeypatch.setattr(streaming, "_stream", counted)
        read: list[Weights] = []
        threads = [
            threading.Thread(target=lambda: read.append(read_quantized(source, INT4)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(calls) == 1
        assert same(read[0], read[1])
        assert same(read[0], read[2])


class TestSourceChanges:
    def test_other_files_are_quantized_anew_and_the_old_result_goes(self, source: Path) -> None:
        read_quantized(source, INT4)
        (before,) = entries()
        path = source / "model.safetensors"
        tensors = load_file(path)
        tensors["model.decoder.layers.0.mlp.up_proj.weight"] *= 2
        save_file(tensors, path, metadata={"format": "pt"})
        weights = read_quantized(source, INT4)
        (after,) = entries()
        assert after != before
        held = weights.tensors["layers.0.mlp.up_proj.weight"]
        truth = tensors["model.decoder.layers.0.mlp.up_proj.weight"]
        assert same_tensor(held, quantize_rows(truth, INT4))

    def test_other_ways_are_kept_beside(self, source: Path) -> None:
        for quantization in (INT4, INT8, Quantization(group=16)):
            read_quantized(source, quantization)
        assert len(entries()) == 3

    def test_a_model_that_is_moved_stays_known(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = read_quantized(source, INT4)
        moved = source.rename(tmp_path / "moved")
        monkeypatch.setattr(streaming, "quantize_rows", never)
        assert same(first, read_quantized(moved, INT4))


def _replace(folder: Path, change: Callable[[bytes], bytes]) -> None:
    """Put another file in the place of one that may be mapped."""
    (path,) = folder.glob("*.safetensors")
    content = change(path.read_bytes())
    path.unlink()
    path.write_bytes(content)


def _truncate(folder: Path) -> None:
    _replace(folder, lambda content: content[:-1])


def _remove(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


def _overwrite_header(folder: Path) -> None:
    _replace(folder, lambda content: b"\xff" * len(content))


def _manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        told = json.loads((folder / MANIFEST).read_text())
        change(told)
        (folder / MANIFEST).write_text(json.dumps(told))

    return edit


WEIGHT = "layers.0.mlp.up_proj.weight"
BROKEN: dict[str, Callable[[Path], Any]] = {
    "truncated": _truncate,
    "removed": _remove,
    "header": _overwrite_header,
    "no-manifest": lambda folder: (folder / MANIFEST).unlink(),
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "not-json": lambda folder: (folder / MANIFEST).write_text("{"),
    "a-list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "version": _manifest(lambda told: told.update(version=99)),
    "no-files": _manifest(lambda told: told.pop("files")),
    "outside": _manifest(lambda told: told["files"].update({"../x": 1})),
    "kind": _manifest(lambda told: told["weights"][WEIGHT].update(kind="int3")),
    "other-kind": _manifest(lambda told: told["weights"][WEIGHT].update(kind="fp8")),
    "group": _manifest(lambda told: told["weights"][WEIGHT].update(group=7)),
    "unlisted": _manifest(lambda told: told["weights"].pop(WEIGHT)),
    "unknown": _manifest(lambda told: told["weights"].update(x={"kind": "int4", "group": 8})),
}


class TestBroken:
    @pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
    def test_what_is_broken_is_made_anew(
        self, source: Path, damage: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        first = read_quantized(source, INT4)
        (name,) = entries()
        damage(cache_folder() / name)
        with pytest.raises((CheckpointMissing, CheckpointMismatch)) as caught:
            read_kept(cache_folder() / name)
        assert "\n" not in str(caught.value)
        with caplog.at_level(logging.WARNING, logger="infilld"):
            assert same(first, read_quantized(source, INT4))
        assert "removing what was kept" in caplog.text
        assert entries() == [name]
        assert same(first, read_kept(cache_folder() / name))

    def test_an_interrupted_run_leaves_nothing(
        self, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = 0

        def interrupted(weight: Tensor, quantization: Quantization) -> QuantizedWeight:
            nonlocal calls
            calls += 1
            if calls == 9:
                raise KeyboardInterrupt
            return quantize_rows(weight, quantization)

        monkeypatch.setattr(streaming, "quantize_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read_quantized(source, INT4)
        assert entries() == []

    def test_what_a_killed_run_left_is_removed(self, source: Path) -> None:
        read_quantized(source, INT4)
        (name,) = entries()
        whole = cache_folder() / name
        partial = whole.rename(whole.with_name(f"{name}.partial"))
        (partial / MANIFEST).unlink()
        read_quantized(source, INT4)
        assert entries() == [name]

    def test_what_else_is_broken_does_not_matter(self, source: Path) -> None:
        other = cache_folder() / "other"
        other.mkdir(parents=True)
        (other / MANIFEST).write_text(json.dumps({"source": str(source)}))
        (cache_folder() / "junk").mkdir()
        read_quantized(source, INT4)
        assert len(entries()) == 3


class TestNothingKept:
    def check(self, source: Path, caplog: pytest.LogCaptureFixture, words: str) -> None:
        truth = read_weights(source)
        with caplog.at_level(logging.WARNING, logger="infilld"):
            weights = read_quantized(source, INT4)
        assert words in caplog.text
        for name, tensor in truth.tensors.items():
            assert isinstance(tensor, Tensor)
            few = is_quantizable(name, tensor.shape)
            expected = quantize_rows(tensor, INT4) if few else tensor
            assert same_tensor(weights.tensors[name], expected)

    def test_no_folder(
        self,
        source: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        self.check(source, caplog, "Not a directory")

    def test_no_room(
        self, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        usage = shutil.disk_usage(source)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        self.check(source, caplog, "no room to keep")
        assert entries() == []

    def test_a_disk_that_fills_up(
        self, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(kept, "save_file", full)
        self.check(source, caplog, "No space left on device")
        assert entries() == []


class TestFolder:
    def test_it_is_a_checkpoint_by_itself(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "out"
        quantize_folder(source, out, INT4)
        kept_weights = read_quantized(source, INT4)
        shutil.rmtree(source)
        assert is_kept(out)
        assert same(read_weights(out), kept_weights)
        names = {path.name for path in out.iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
        assert str(tmp_path) not in (out / MANIFEST).read_text()
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert out.stat().st_mode & 0o777 == 0o755

    def test_the_summary_tells_what_is_read(self, source: Path, tmp_path: Path) -> None:
        quantize_folder(source, tmp_path / "out", INT4)
        summary = inspect_checkpoint(tmp_path / "out")
        weights = read_weights(tmp_path / "out", dtype=torch.bfloat16)
        assert summary == inspect_kept(tmp_path / "out")
        assert summary.format == weights.format == "infilld int4"
        assert summary.notes == weights.notes
        assert "quantized here to int4 in groups of 32 from plain tensors" in summary.notes
        assert loaded_bytes(summary, torch.bfloat16) == weights.nbytes
        plain = inspect_checkpoint(source)
        assert summary.parameters == plain.parameters
        assert summary.config == plain.config
        storages = {(line.part, line.storage) for line in summary.parts}
        assert ("attention", "int4, groups of 32") in storages
        assert ("dense MLP", "int4, groups of 16") in storages
        assert {("experts", "int4, groups of 32"), ("experts", "F32")} <= storages
        assert ("embedding", "F32") in storages

    def test_nothing_is_overwritten(self, source: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "mine.txt").write_text("mine")
        with pytest.raises(FileExistsError, match="not an empty folder"):
            quantize_folder(source, out, INT4)
        assert [path.name for path in out.iterdir()] == ["mine.txt"]

    def test_a_failure_leaves_nothing(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(kept, "save_file", full)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(OSError, match="No space left"):
            quantize_folder(source, tmp_path / "out", INT4)
        assert sorted(tmp_path.iterdir()) == before

    def test_an_empty_folder_will_do(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        quantize_folder(source, tmp_path / "out", INT8)
        assert read_weights(tmp_path / "out").format == "infilld int8"

    def test_what_is_quantizable_is_refused(self, source: Path, tmp_path: Path) -> None:
        quantize_folder(source, tmp_path / "out", INT4)
        for read in (
            lambda: quantize_folder(tmp_path / "out", tmp_path / "again", INT4),
            lambda: read_quantized(tmp_path / "out", INT8),
        ):
            with pytest.raises(CheckpointMismatch, match="is quantized already"):
                read()

    def test_no_room_is_said_before_anything_is_done(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(source)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        monkeypatch.setattr(streaming, "quantize_rows", never)
        with pytest.raises(OSError, match="no room for"):
            quantize_folder(source, tmp_path / "out", INT4)
        assert not (tmp_path / "out").exists()


class TestBadSource:
    def test_a_number_that_is_none(self, source: Path) -> None:
        path = source / "model.safetensors"
        tensors = load_file(path)
        tensors["model.decoder.layers.1.experts.gate_up_proj"][0, 0, 0] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointMismatch, match=r"layers.1.experts.gate_up_proj.*not finite"):
            read_quantized(source, INT4)
        assert entries() == []

    def test_a_head_of_its_own(self, source: Path) -> None:
        path = source / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"] + 1
        save_file(tensors, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointMismatch, match="differs from the embedding"):
            read_quantized(source, INT4)

    def test_a_file_that_the_system_will_not_map(
        self, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = files.safe_open

        def too_large(path: Path, framework: str) -> Any:
            if framework == "pt":
                raise RuntimeError(f"unable to mmap 50502065392 bytes from file <{path}>")
            return real(path, framework=framework)

        monkeypatch.setattr(files, "safe_open", too_large)
        with pytest.raises(NotEnoughMemory, match="cannot be mapped into memory") as caught:
            read_quantized(source, INT4)
        assert "several files" in caught.value.remedy
        assert inspect_checkpoint(source).format == "plain"
