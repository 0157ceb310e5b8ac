"""Tracebacks that tell where a fault is and quote nothing that a client sent.

The message of an exception often quotes a value: a key, an input that was refused, a part of a
text. So only the messages of kinds that speak of this machine are kept.
"""

import traceback

from infilld.engine.errors import ModelError, Unavailable

# Files and devices, our own installation, and sizes of tensors.
_HARMLESS = (OSError, MemoryError, ImportError, ModelError, Unavailable)
_LONGEST_CHARS = 500


def of(error: BaseException, *, with_messages: bool = False) -> str:
    """The frames of an error and of what led to it, the oldest first; no values of variables.

    Args:
        error: what was raised.
        with_messages: also of kinds that may quote source text.
    """
    parts = []
    for each in _chain(error):
        frames = "".join(traceback.format_tb(each.__traceback__))
        kind = type(each)
        said = f": {_message(each)}" if with_messages or _is_harmless(each) else ""
        parts.append(f"{frames}{kind.__module__}.{kind.__qualname__}{said}")
        if isinstance(each, BaseExceptionGroup):
            parts += [of(inner, with_messages=with_messages) for inner in each.exceptions]
    return "\n".join(parts)


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in found:
        found.append(step)
        step = step.__cause__ or (None if step.__suppress_context__ else step.__context__)
    return found[::-1]


def _is_harmless(error: BaseException) -> bool:
    # What torch raises is a RuntimeError and no subclass, or its own OutOfMemoryError.
    kind = type(error)
    return isinstance(error, _HARMLESS) or kind is RuntimeError or kind.__module__ == "torch"


def _message(error: BaseException) -> str:
    said = str(error)
    return said if len(said) <= _LONGEST_CHARS else f"{said[:_LONGEST_CHARS]}…"
