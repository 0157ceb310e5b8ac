"""A report for people: Markdown, and the short form that ends a run."""

from collections.abc import Mapping, Sequence
from typing import Any

# Long lists are for the JSON.
_MOST_CHARS = 100
_MOST_ROWS = 200
# Told in the short form, of a section.
_FAILURES = 10


def as_markdown(report: Mapping[str, Any]) -> str:
    """All of a report."""
    facts = report["facts"]
    lines = [
        "# GPU report",
        "",
        f"Model shapes: {report['model']}. {report['made_at']}. "
        f"The run {'ended' if report['is_finished'] else 'did not end'}.",
        "",
        *_table([{"fact": key, "value": value} for key, value in facts.items()]),
        "",
        "## Aims",
        "",
        *_table(report["aims"]),
    ]
    for name, section in report["sections"].items():
        lines += ["", f"## {name}", "", _said(section)]
        troubled = [
            {"step": step, "state": found["state"], "error": found.get("error", "")}
            for step, found in section["steps"].items()
            if found["state"] != "done"
        ]
        if troubled:
            lines += ["", *_table(troubled)]
        for title, rows in section["tables"].items():
            if rows:
                lines += ["", f"### {title}", "", *_table(rows[:_MOST_ROWS])]
    return "\n".join(lines) + "\n"


def as_summary(report: Mapping[str, Any]) -> str:
    """What to look at first."""
    lines = [f"{key}: {value}" for key, value in report["facts"].items()]
    for name, section in report["sections"].items():
        lines.append(f"{name:<14} {_said(section)}")
        lines += [
            f"    {step}: {found['state']}{': ' if found.get('error') else ''}"
            f"{found.get('error', '')}"
            for step, found in section["steps"].items()
            if found["state"] != "done"
        ]
        failures = section["tables"].get("failures", [])
        lines += [f"    {' '.join(map(str, row.values()))[:200]}" for row in failures[:_FAILURES]]
    lines += ["", *_aligned(_passes(report)), "", *_aligned(report["aims"])]
    return "\n".join(lines) + "\n"


def _passes(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = ("rows", "canvas", "prefix", "ms", "device_ms", "host_ms", "floor_ms", "experts")
    found = report["sections"].get("model", {}).get("tables", {}).get("passes", [])
    return [{name: row.get(name) for name in names} for row in found]


def _said(section: Mapping[str, Any]) -> str:
    text = f"{section['status']}, {section['seconds']} s of {section['limit_s']} s"
    return f"{text}: {section['error']}" if section.get("error") else text


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    text = f"{value:,}" if type(value) is int else str(value)
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = _columns(rows)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [
        f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows
    ]


def _aligned(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = _columns(rows)
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]
