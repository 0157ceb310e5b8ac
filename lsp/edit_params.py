"""Parameters of the edit requests, read by hand: what is wrong with them is said by its name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lsprotocol import types


@dataclass(frozen=True, kw_only=True)
class EditParams:
    """What an edit request asks for.

    Attributes:
        uri: of the document.
        ranges: what may change; None: every placeholder of the document.
        instruction: what to do with it.
        suspects: what the editor says is wrong there; None: this is no repair.
    """

    uri: str
    ranges: tuple[types.Range, ...] | None
    instruction: str | None = None
    suspects: tuple[types.Range, ...] | None = None


def read_rewrite(raw: object) -> EditParams:
    """`{textDocument, range, instruction, token?}`.

    Raises:
        ValueError: names the part that is missing or wrong, without its value.
    """
    found = _object(raw, "params")
    instruction = found.get("instruction")
    if not isinstance(instruction, str):
        raise ValueError("instruction: expected a string")
    _check_token(found)
    return EditParams(
        uri=_uri(found),
        ranges=(_range(found.get("range"), "range"),),
        instruction=instruction if instruction.strip() else None,
    )


def read_fill_gaps(raw: object) -> EditParams:
    """`{textDocument, ranges?, token?}`.

    Raises:
        ValueError: names the part that is missing or wrong, without its value.
    """
    found = _object(raw, "params")
    _check_token(found)
    ranges = found.get("ranges")
    return EditParams(uri=_uri(found), ranges=None if ranges is None else _ranges(ranges, "ranges"))


def read_repair(raw: object) -> EditParams:
    """`{textDocument, range, diagnostics?, token?}`.

    Raises:
        ValueError: names the part that is missing or wrong, without its value.
    """
    found = _object(raw, "params")
    _check_token(found)
    suspects = found.get("diagnostics")
    return EditParams(
        uri=_uri(found),
        ranges=(_range(found.get("range"), "range"),),
        suspects=() if suspects is None else _ranges(suspects, "diagnostics"),
    )


READERS: Mapping[str, Callable[[object], EditParams]] = {
    "rewrite": read_rewrite,
    "fillGaps": read_fill_gaps,
    "repair": read_repair,
}


def _object(raw: object, name: str) -> Mapping[str, object]:
    # Lua writes an empty table as an empty list; here nothing empty is of use.
    if not isinstance(raw, Mapping):
        raise ValueError(f"{name}: expected an object")
    return raw


def _uri(found: Mapping[str, object]) -> str:
    uri = _object(found.get("textDocument"), "textDocument").get("uri")
    if not isinstance(uri, str):
        raise ValueError("textDocument.uri: expected a string")
    return uri


def _check_token(found: Mapping[str, object]) -> None:
    token = found.get("token")
    if token is not None and (not isinstance(token, str | int) or isinstance(token, bool)):
        raise ValueError("token: expected a string or an integer")


def _ranges(raw: object, name: str) -> tuple[types.Range, ...]:
    if not isinstance(raw, list | tuple):
        raise ValueError(f"{name}: expected a list of ranges")
    return tuple(_range(item, f"{name}.{number}") for number, item in enumerate(raw))


def _range(raw: object, name: str) -> types.Range:
    found = _object(raw, name)
    start, end = (_position(found.get(side), f"{name}.{side}") for side in ("start", "end"))
    if (end.line, end.character) < (start.line, start.character):
        raise ValueError(f"{name}: it ends before it starts")
    return types.Range(start, end)


def _position(raw: object, name: str) -> types.Position:
    found = _object(raw, name)
    numbers = [found.get(part) for part in ("line", "character")]
    for part, number in zip(("line", "character"), numbers, strict=True):
        # The bound is the protocol's, for an unsigned integer.
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise ValueError(f"{name}.{part}: expected an integer from 0 to 2147483647")
    line, character = numbers
    assert isinstance(line, int)
    assert isinstance(character, int)
    return types.Position(line, character)
