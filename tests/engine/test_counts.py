"""What a worker counts."""

import pytest

from infilld.engine.counts import Counts
from infilld.engine.request import InfillRequest, InfillResult, Span, Timings

REQUEST = InfillRequest(text="", spans=(Span(0, 0),))


@pytest.mark.parametrize(
    ("times", "p50", "p95"),
    [
        ([], None, None),
        ([7.0], 7.0, 7.0),
        ([200.0, 100.0], 100.0, 200.0),
        ([100.0, 110.0, 120.0, 5000.0], 110.0, 5000.0),
        ([float(n) for n in range(1, 101)], 50.0, 95.0),
    ],
)
def test_a_centile_is_a_time_that_was_taken(
    times: list[float], p50: float | None, p95: float | None
) -> None:
    counts = Counts()
    for number, ms in enumerate(times):
        result = InfillResult(id=str(number), seed=0, timings=Timings(total_ms=ms))
        counts.ended(REQUEST, "ok", result)
    report = counts.report()
    assert (report["p50_ms"], report["p95_ms"]) == (p50, p95)
