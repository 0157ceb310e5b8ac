"""What the figures of a report are held against."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["met", "missed", "not measured"]
Report = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A figure with a limit.

    Attributes:
        name: what is measured. unit: of it. limit: see `is_least`.
        find: the figure in a report, or None.
        is_least: whether the limit is the least it should be, or the most.
        device: part of the name of the device that the aim is for; "": any.
    """

    name: str
    unit: str
    limit: float
    find: Callable[[Report], float | None]
    is_least: bool = False
    device: str = "H200"


def rows(report: Report, section: str, table: str, **like: Any) -> list[dict[str, Any]]:
    """Rows of a table in which these columns have these values."""
    found = report["sections"].get(section, {}).get("tables", {}).get(table, [])
    return [row for row in found if all(row.get(key) == value for key, value in like.items())]


def figure(section: str, table: str, column: str, **like: Any) -> Callable[[Report], float | None]:
    """Finds a number in a report."""

    def find(report: Report) -> float | None:
        for row in rows(report, section, table, **like):
            if row.get(column) is not None:
                return float(row[column])
        return None

    return find


def _ratio(
    above: Callable[[Report], float | None], below: Callable[[Report], float | None]
) -> Callable[[Report], float | None]:
    def find(report: Report) -> float | None:
        first, second = above(report), below(report)
        return first / second if first is not None and second else None

    return find


def _in_gb(find_bytes: Callable[[Report], float | None]) -> Callable[[Report], float | None]:
    def find(report: Report) -> float | None:
        count = find_bytes(report)
        return None if count is None else count / 1e9

    return find


def _failed_tests(report: Report) -> float | None:
    outcomes = rows(report, "tests", "files")
    steps = report["sections"].get("tests", {}).get("steps", {})
    if not outcomes or any(step.get("state") != "done" for step in steps.values()):
        return None
    return float(sum(row["failed"] for row in outcomes))


_OURS = figure("model", "forced passes", "tokens_per_s", canvas=256)
_THEIRS = figure("transformers", "forced passes", "tokens_per_s", canvas=256)
_HOME = {"rows": 1, "prefix": 2048}

AIMS = (
    Aim(name="kernel tests that fail", unit="", limit=0, find=_failed_tests, device=""),
    Aim(
        name="pass over 256 positions",
        unit="ms",
        limit=6.0,
        find=figure("model", "passes", "ms", canvas=256, **_HOME),
    ),
    Aim(
        name="pass over 64 positions",
        unit="ms",
        limit=4.5,
        find=figure("model", "passes", "ms", canvas=64, **_HOME),
    ),
    Aim(
        name="canvases of 256 in 16 forced passes, with their commits",
        unit="tokens/s",
        limit=2500.0,
        find=_OURS,
        is_least=True,
    ),
    Aim(
        name="those, against transformers in bf16",
        unit="times",
        limit=5.0,
        find=_ratio(_OURS, _THEIRS),
        is_least=True,
    ),
    Aim(
        name="a fill of 64 tokens, warm prefix, 11 passes",
        unit="ms",
        limit=60.0,
        find=figure("model", "fills", "ms", canvas=64, passes=11, weighed=False),
    ),
    Aim(
        name="peak of memory, 32,768 tokens of context",
        unit="GB",
        limit=18.0,
        find=_in_gb(
            figure("model", "memory measured", "device_peak", context_tokens=32_768, of="all")
        ),
        device="",
    ),
)


def judged(report: Report) -> list[dict[str, Any]]:
    """Every aim with its figure; those of other shapes and devices are not measured."""
    name = str(report["facts"].get("device", ""))
    found = []
    for aim in AIMS:
        fits = report["model"] == "26b" and aim.device in name
        value = aim.find(report) if report["model"] == "26b" else None
        status: Status = "not measured"
        if fits and value is not None:
            is_met = value >= aim.limit if aim.is_least else value <= aim.limit
            status = "met" if is_met else "missed"
        found.append(
            {
                "aim": aim.name,
                "limit": f"{'at least' if aim.is_least else 'at most'} {aim.limit:g} {aim.unit}",
                "for": aim.device or "any GPU",
                "measured": None if value is None else round(value, 3),
                "status": status,
            }
        )
    return found
