"""The updates of a job to whoever watches it, as one row however often it is asked."""

from dataclasses import replace
from typing import Any

from infilld.engine.request import CanvasUpdate
from infilld.engine.scheduler import OnCanvas


class Telling:
    """Takes the updates of one attempt after another; attempts do not overlap.

    Args:
        on_canvas: gets them, numbered over all attempts.
    """

    def __init__(self, on_canvas: OnCanvas) -> None:
        self._on_canvas = on_canvas
        self._told = 0
        self._has_settled = self._is_void = False

    def begin_anew(self) -> None:
        """What was settled up to here is void: another attempt follows."""
        self._is_void, self._has_settled = self._is_void or self._has_settled, False

    def __call__(self, update: Any) -> None:
        """Pass a `CanvasUpdate` or a `ChatUpdate` on."""
        update = replace(update, seq=self._told)
        self._told += 1
        if isinstance(update, CanvasUpdate):
            update = replace(update, revised=update.revised or self._is_void)
            self._is_void = False
            self._has_settled = any(span.settled for span in update.spans)
        self._on_canvas(update)
