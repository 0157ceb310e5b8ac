"""`initializationOptions`: types, defaults and validation in one place."""

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an editor may set, in camelCase on the wire.

    Attributes:
        alternatives: fills asked for when the user invokes inline completion by hand.
        automatic_deadline_ms: longest time an answer to typing may take.
        invoked_deadline_ms: longest time the daemon may take over an answer asked for by hand.
        edit_deadline_ms: longest time the daemon may take over a rewrite, a repair or gaps.
        daemon_wait_ms: how long what is asked for by hand waits for the daemon to start and load.
        start_daemon: start the daemon when none runs; else only look for one.
        before_chars: about how much text before the gap the daemon gets to read.
        after_chars: about how much text after the gap it gets to read.
        max_document_chars: longer documents get no suggestions.
        boldness: 0 shows only what is nearly certain, 1 whatever is not broken; None: the model's.
    """

    alternatives: int = 3
    automatic_deadline_ms: int = 1_000
    invoked_deadline_ms: int = 10_000
    edit_deadline_ms: int = 30_000
    daemon_wait_ms: int = 5_000
    start_daemon: bool = True
    before_chars: int = 48_000
    after_chars: int = 12_000
    max_document_chars: int = 2_000_000
    boldness: float | None = None


_BOUNDS: Mapping[str, tuple[int, int]] = {
    "alternatives": (1, 8),
    "automatic_deadline_ms": (1, 600_000),
    "invoked_deadline_ms": (1, 600_000),
    "edit_deadline_ms": (1, 600_000),
    "daemon_wait_ms": (0, 600_000),
    "before_chars": (0, 10_000_000),
    "after_chars": (0, 10_000_000),
    "max_document_chars": (0, 1_000_000_000),
}


def parse_options(raw: object) -> tuple[Options, list[str]]:
    """Return the options and one sentence for each value that was replaced by its default."""
    # Lua writes an empty table as an empty list.
    if raw is None or raw == []:
        return Options(), []
    if not isinstance(raw, Mapping):
        return Options(), [f"initializationOptions is {raw!r}, expected an object."]
    names = {_camel(field.name): field.name for field in fields(Options)}
    values: dict[str, float | None] = {}
    problems: list[str] = []
    for key, value in raw.items():
        name = names.get(key)
        if name is None:
            problems.append(f"{key} is unknown; known options are {', '.join(names)}.")
        elif (expected := _expected(name, value)) is not None:
            default = getattr(Options, name)
            used = "the model's own" if default is None else default
            problems.append(f"{key} is {value!r}, expected {expected}; using {used}.")
        else:
            values[name] = value
    return Options(**values), problems  # type: ignore[arg-type]  # each was checked


def _expected(name: str, value: object) -> str | None:
    """Say what the option expects; None when `value` is it."""
    if name == "boldness":
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
            return None
        return "a number from 0 to 1"
    if name not in _BOUNDS:
        return None if isinstance(value, bool) else "true or false"
    low, high = _BOUNDS[name]
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return None
    return f"a number from {low} to {high}"


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)
