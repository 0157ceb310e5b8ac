"""What a run reports, as JSON and as a table; how a model's figures changed."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SIDES = ("before", "after", "change")


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Both reports, and what the figures of the later one have more; counts stay out of that."""
    return {"before": dict(before), "after": dict(after), "change": _change(before, after)}


def is_comparison(report: Mapping[str, Any]) -> bool:
    """Whether `compared` made this report."""
    return report.keys() == set(_SIDES)


def table(report: Mapping[str, Any]) -> str:
    """A report for people: a line for each figure, in columns where two were compared."""
    lines: list[tuple[str, ...]]
    if is_comparison(report):
        lines = [("", *_SIDES), *rows(report)]
    else:
        lines = [(name, _shown(value)) for name, value in _flat(report)]
    widths = [max(map(len, column)) + 2 for column in zip(*lines, strict=True)]
    return "".join(_aligned(line, widths) + "\n" for line in lines)


def rows(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Name, before, after and change of everything in a comparison; "" where no change is given."""
    before, after, change = (dict(_flat(report[side])) for side in _SIDES)
    for name, value in after.items():
        more = f"{change[name]:+.4f}" if name in change else ""
        yield name, _shown(before.get(name)), _shown(value), more


def to_json(content: Any, indent: int | None = 2) -> str:
    """Content as JSON; a number that JSON does not have becomes null."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False) + "\n"


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, new in after.items():
        old = before.get(name)
        if isinstance(new, Mapping) and isinstance(old, Mapping):
            if inner := _change(old, new):
                changes[name] = inner
        elif _is_figure(new) and _is_figure(old):
            # No more digits than the figures themselves are given with.
            changes[name] = round(new - old, 6)
    return changes


def _is_figure(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _flat(report: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in report.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """The name to the left, figures to the right."""
    name, *figures = line
    cells = (f"{cell:>{width}}" for cell, width in zip(figures, widths[1:], strict=True))
    return f"{name:<{widths[0]}}{''.join(cells)}".rstrip()


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if math.isfinite(value) else "-"
    return "-" if value is None else str(value)


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content if not isinstance(content, float) or math.isfinite(content) else None
