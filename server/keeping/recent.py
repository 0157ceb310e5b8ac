"""The last answers and why they are as they are: what "why nothing?" asks for. In memory only."""

from collections import Counter, deque
from collections.abc import Mapping

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
