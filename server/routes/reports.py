"""What the daemon tells of its work: `/stats`, `/v1/recent`, `/metrics`."""

import asyncio
import time
from datetime import UTC, datetime
from importlib.metadata import version

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse

from infilld.server.jobs import Jobs
from infilld.server.keeping import metrics
from infilld.server.keeping.metrics import Metrics
from infilld.server.keeping.outcomes import Outcome
from infilld.server.keeping.recent import CAPACITY, Recent
from infilld.server.keeping.statistics import Statistics

_NOT_KEPT: dict[str, object] = {"state": "disabled", "why": "None are asked for."}


def router(
    jobs: Jobs, counted: Metrics, recent: Recent, statistics: Statistics | None
) -> APIRouter:
    """The reporting routes over one engine; `statistics` None: none are kept."""
    routes = APIRouter()
    started_s = time.monotonic()

    def live() -> dict[str, object]:
        failure = jobs.worker.failure
        return {
            "state": jobs.worker.state,
            "failure": None if failure is None else str(failure),
            "uptime_s": round(time.monotonic() - started_s, 3),
            "live_jobs": len(jobs),
            "resident_bytes": metrics.resident_bytes(),
            **jobs.worker.stats(),
        }

    @routes.get("/stats")
    async def stats() -> dict[str, object]:
        """Counters since the start, and what is kept of earlier days; no source text.

        `today` counts since midnight, `week` the last 7 days, `total` all that is kept (90 days).
        In each, `p50_ms` and `p95_ms` are by kind of request, `shown` to `retained` count answers
        of which a client said so, `acceptance` is the share inserted among those shown, and
        `abstentions` counts answers without a text by reason. `statistics` says whether records
        are kept.
        """
        if statistics is None:
            return {**live(), "statistics": _NOT_KEPT}
        kept = await asyncio.to_thread(statistics.report)
        return {**live(), "statistics": statistics.status(), **kept}

    @routes.get("/v1/recent")
    async def last(limit: int = Query(CAPACITY, ge=1, le=CAPACITY)) -> dict[str, object]:
        """The last answers, newest first, and how many have each reason; no source text.

        `kind` is infill, rewrite, repair, chat or warm; `document` says whether a newer request
        may supersede it.
        """
        return {
            "recent": [_entry(each) for each in recent.last(limit)],
            "reasons": recent.reasons(),
        }

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> PlainTextResponse:
        """Counters, gauges and a histogram of times for Prometheus, since the start."""
        told = jobs.worker.describe()
        known = {key: told.get(key) for key in ("model", "device", "memory_bytes", "last_load_s")}
        status = {} if statistics is None else statistics.status()
        numbers = {"version": version("infilld"), **known, **status, **live()}
        text = metrics.exposition(counted.families(numbers))
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    return routes


def _entry(each: Outcome) -> dict[str, object]:
    return {
        "id": each.id,
        "time": datetime.fromtimestamp(each.at, UTC).isoformat(timespec="milliseconds"),
        "route": each.route,
        "kind": each.kind,
        "language": each.language,
        "document": each.has_document,
        "reason": each.reason,
        "why": each.why,
        "choices": len(each.chars),
        "total_ms": round(each.timings.total_ms, 1),
        "deadline_ms": each.deadline_ms,
    }
