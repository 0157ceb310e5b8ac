"""How jobs ended, for tests of what is kept of them."""

from typing import Any

from infilld.engine.request import (
    Alternative,
    InfillRequest,
    InfillResult,
    Span,
    SpanFill,
    Timings,
    Usage,
)
from infilld.server.keeping.outcomes import Outcome, outcome_of

GAP = InfillRequest(text="x = ", spans=(Span(4, 4),), document="secret/path.py", path="secret.py")


def result(
    job_id: str = "a", *, ms: float = 10.0, text: str = "sEcReT", **more: Any
) -> InfillResult:
    fills = () if more.get("reason", "ok") != "ok" else (text, "other")
    return InfillResult(
        id=job_id,
        seed=1,
        alternatives=tuple(Alternative((SpanFill(4, 4, fill, 0.9),), -0.1) for fill in fills),
        usage=Usage(prompt_tokens=7, cached_tokens=3, passes=2, text_tokens=4),
        timings=Timings(queue_ms=1, encode_ms=2, denoise_ms=3, total_ms=ms),
        **more,
    )


def outcome(job_id: str = "a", **more: Any) -> Outcome:
    return outcome_of(job_id, "/v1/infill", GAP, result(job_id, **more))
