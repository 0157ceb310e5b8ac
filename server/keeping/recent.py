"""The last answers and why they are as they are: what "why nothing?" asks for. In memory only."""

from collections import Counter, deque
from collections.abc import Mapping
from datetime import UTC, datetime

from fastapi import APIRouter, Query

from infilld.server.jobs import Event
from infilld.server.keeping.outcomes import Outcome

CAPACITY = 256


class Recent:
    """A ring of the last answers, refusals too; without source text."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._ring: deque[Outcome] = deque(maxlen=capacity)

    def answered(self, outcome: Outcome) -> None:
        """Remember it; the oldest is forgotten."""
        self._ring.append(outcome)

    def told(self, job_id: str, event: Event, choice: int, chars: int | None) -> None:
        """Nothing is remembered of feedback."""

    def last(self, limit: int = CAPACITY) -> list[Outcome]:
        """The last outcomes, newest first."""
        return list(reversed(self._ring))[:limit]

    def reasons(self) -> Mapping[str, int]:
        """How many of them have each reason, the most frequent first."""
        return dict(Counter(each.reason for each in self._ring).most_common())


def router(recent: Recent) -> APIRouter:
    """The route that tells them."""
    routes = APIRouter()

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
