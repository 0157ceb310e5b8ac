import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def harness() -> Iterator[ModuleType]:
    path = Path(__file__).with_name("harness.py")
    spec = importlib.util.spec_from_file_location("harness", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "harness", module)
        spec.loader.exec_module(module)
        yield module


def cases_of(harness: ModuleType, calls: list[str]) -> Any:
    def cases(device: str, impl: str) -> Iterator[Any]:
        run = lambda: calls.append(impl)  # noqa: E731 -- a case wants a callable
        yield harness.Case(name="2x8", moved_bytes=1000, run=run)

    return cases


def test_no_number_on_red(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "_run_tests", lambda operation: 1)
    calls: list[str] = []
    assert harness.main("bench_accept.py", cases_of(harness, calls), []) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no number is printed" in captured.err
    assert not calls


def test_one_json_line_per_case(harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    arguments = ["--no-tests", "--impl", "reference"]
    assert harness.main("bench_accept.py", cases_of(harness, calls), arguments) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["op"], found["impl"], found["case"]) == ("accept", "reference", "2x8")
    assert found["p20_us"] <= found["us"] <= found["p80_us"]
    assert len(calls) >= harness.REPEATS


def test_the_floor_is_the_longer_of_moving_and_computing(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "peak_named", lambda name: (1e9, 1e12))
    floors = [
        harness.timed(
            "op",
            "reference",
            "cpu",
            harness.Case(name="x", moved_bytes=2000, operations=operations, run=lambda: None),
        )["floor_us"]
        for operations in (0, 5_000_000)
    ]
    assert floors == [2.0, 5.0]


def test_peaks_are_found_by_the_name_of_the_device(harness: ModuleType) -> None:
    assert harness.peak_named("NVIDIA H200") == (4.8e12, 989e12)
    assert harness.peak_named("cpu") is None


def test_every_bench_gives_cases() -> None:
    folder = Path(__file__).parent
    assert sorted(folder.glob("bench_*.py"))
    for path in folder.glob("bench_*.py"):
        text = path.read_text()
        assert "main(__file__, cases)" in text
