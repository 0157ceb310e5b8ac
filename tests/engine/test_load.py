"""The measurement under load: every figure is there, and its table names them."""

from pathlib import Path

import pytest
from tiny_infill import tiny_infiller

from infilld.engine import load, resident
from infilld.engine.load import format_load, run_load


def test_every_number_of_clients_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "load_infiller", lambda *wishes: tiny_infiller())
    monkeypatch.setattr(load, "CLIENTS", (1, 3))
    report = run_load(Path("tiny"), seconds=0.05)
    throughput, deadlines = report["throughput"], report["deadlines"]
    assert [row["clients"] for row in deadlines] == [1, 3]
    assert [row["side_by_side"] for row in throughput] == [4, 4, 1, 1]
    for row in deadlines:
        assert row["answers"] == sum(row["reasons"].values()) >= row["clients"]
        assert row["late_p50_ms"] <= row["late_p99_ms"] <= row["late_max_ms"]
        assert 0 <= row["within_a_pass"] <= 1
    for row in throughput:
        assert row["answers_per_s"] > 0
    assert {row["passes_per_round"] for row in throughput if row["side_by_side"] == 1} == {1.0}
    assert len(format_load(report).splitlines()) == 3 + len(throughput) + len(deadlines)
