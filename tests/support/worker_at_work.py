"""A worker over tiny random models: jobs that stop at a gate, loads that wait until they may."""

import gc
import threading
import weakref
from pathlib import Path

import pytest
from tiny_infill import tiny_infiller

from infilld.engine import resident
from infilld.engine.infill import Infiller
from infilld.engine.passes import CanvasModel
from infilld.engine.placement import Limits
from infilld.engine.request import CanvasUpdate, InfillRequest, InfillResult, Span

WAIT_S = 20


class Gate:
    """Holds the worker after a pass until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open, self.passes = threading.Event(), threading.Event(), 0

    def __call__(self, update: CanvasUpdate) -> None:
        self.passes += 1
        self.reached.set()
        assert self.open.wait(WAIT_S)


def request(document: str | None = None, **fields: object) -> InfillRequest:
    known = {"text": "a = \n", "spans": (Span(4, 4),), "seed": 1, "max_tokens": 8}
    return InfillRequest(document=document, **{**known, **fields})  # type: ignore[arg-type]


def texts_of(result: InfillResult) -> list[str]:
    return [each.spans[0].text for each in result.alternatives]


class Loads:
    """Loads tiny models, when it is let to; folders named in `failures` and `unfit` it refuses.

    Attributes:
        begun: somebody loads. open: it may go on. freed: memory was given back.
        folders: that were loaded, in turn. alive: models that there were when that began.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.open, self.freed = (threading.Event() for _ in range(3))
        self.open.set()
        self.failures: dict[str, Exception] = {}
        self.unfit: dict[str, Exception] = {}
        self.folders: list[str] = []
        self.alive: list[int] = []
        self._models: list[weakref.ref[CanvasModel]] = []
        monkeypatch.setattr(resident, "load_infiller", self)
        monkeypatch.setattr(resident, "refuse_unfit", self.refuse_unfit)
        monkeypatch.setattr(resident, "free_memory", self.free)

    def __call__(self, folder: Path, device: str, limits: Limits) -> Infiller:
        self.alive.append(sum(model() is not None for model in self._models))
        self.begun.set()
        assert self.open.wait(WAIT_S)
        if folder.name in self.failures:
            raise self.failures[folder.name]
        self.folders.append(folder.name)
        made = tiny_infiller()
        self._models.append(weakref.ref(made.model))
        return made

    def refuse_unfit(self, folder: Path, device: str) -> None:
        if folder.name in self.unfit:
            raise self.unfit[folder.name]

    def free(self) -> None:
        gc.collect()
        self.freed.set()
