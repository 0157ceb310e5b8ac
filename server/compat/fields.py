"""Types of the fields that clients of other servers send.

Unknown keys are ignored, every optional key may be null, and a count may be written 1 or 1.0.
"""

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from infilld.engine.errors import UnknownOption
from infilld.server.wire import Text

MAX_STOPS = 64
MAX_STOP_CHARS = 1024


class Body(BaseModel):
    """A request's body."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("expected a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("expected a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number")
    # Nothing is computed with it; and no float has room for every int.
    return value if isinstance(value, float) else float(max(min(value, 1 << 62), -(1 << 62)))


def _texts(value: Any) -> Any:
    if not isinstance(value, (str, list)):
        raise ValueError("expected a text, or a list of texts")
    return [value] if isinstance(value, str) else value


Whole = Annotated[int, BeforeValidator(_whole)]
"""A count of any size and sign."""
Number = Annotated[float, BeforeValidator(_number)]
Flag = Annotated[bool, Field(strict=True)]
Stop = Annotated[list[Text], BeforeValidator(_texts, json_schema_input_type=str | list[str])]
"""One text or several before which an answer ends."""


def stops(stop: list[str] | None) -> tuple[str, ...]:
    """The texts before which an answer ends; an empty one ends nothing.

    Raises:
        UnknownOption: more, or longer ones, than anybody looks for after every pass.
    """
    texts = tuple(text for text in stop or () if text)
    if len(texts) > MAX_STOPS or any(len(text) > MAX_STOP_CHARS for text in texts):
        raise UnknownOption(
            f"{len(texts)} stop texts of up to {max(map(len, texts))} characters",
            remedy=f"Give up to {MAX_STOPS} of up to {MAX_STOP_CHARS} characters.",
        )
    return texts


def seed_of(number: int | None) -> int | None:
    """A seed the engine takes, for any number; negative ones ask for a drawn seed."""
    return None if number is None or number < 0 else number % 2**63


def bound(number: int | None) -> int | None:
    """A bound on tokens; a negative one is none, as some clients write it."""
    return None if number is None or number < 0 else number
