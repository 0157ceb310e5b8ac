"""The model a worker serves, coming and going: it is loaded, dropped while idle, loaded again."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from infilld.engine.errors import InfilldError, ModelError
from infilld.engine.infill import Infiller
from infilld.engine.loading import free_memory, load_infiller, starter_folder
from infilld.engine.placement import Limits

log = logging.getLogger(__name__)

# A model this small, or one on a CPU, is in nobody's way.
_LARGE_BYTES = 1 << 30
_IDLE_UNLOAD_S = 15 * 60.0

State = Literal["loading", "ready", "unloaded", "failed"]
IdleUnload = float | Literal["auto"]


class Resident:
    """A checkpoint that is loaded when somebody needs it; the lock is held around every call.

    It is loaded on a thread of its own: whoever waits for it can still be cancelled.

    Args:
        folder: checkpoint; None: the embedded starter model. device, limits: as for `Worker`.
        idle_wish: minutes without a job after which it is dropped; see `Worker`.
        lock: notified when it has been loaded, or could not be.
        lost: told, without the lock, why those who wait for it wait in vain.

    Attributes:
        engine: serves requests; None: not loaded. state: see `Worker`.
        failure: why it never was loaded. about: sizes, once they are known.
        loads: how often it was loaded. loaded: set when that was tried for the first time.
    """

    def __init__(
        self,
        folder: Path | None,
        device: str,
        limits: Limits,
        idle_wish: IdleUnload,
        lock: threading.Condition,
        lost: Callable[[InfilldError], None],
    ) -> None:
        self.folder = starter_folder() if folder is None else folder
        self.name = "starter" if folder is None else self.folder.name
        self.engine: Infiller | None = None
        self.state: State = "loading"
        self.failure: InfilldError | None = None
        self.about: dict[str, object] = {}
        self.loads = 0
        self.loaded = threading.Event()
        self._device, self._limits, self._idle_wish = device, limits, idle_wish
        self._lock, self._lost = lock, lost
        self._idle_s = self._idle_since = 0.0
        self._loader: threading.Thread | None = None

    def load_soon(self) -> None:
        """Begin to load, unless that has begun."""
        if self._loader is None:
            self._loader = threading.Thread(target=self._load, name="infilld-load", daemon=True)
            self._loader.start()

    @property
    def loader(self) -> threading.Thread | None:
        """The thread that loads it now."""
        return self._loader

    def used(self) -> None:
        """A job has ended: from now on it is idle, if no other is open."""
        self._idle_since = time.monotonic()

    def idle_left_s(self) -> float | None:
        """Seconds until it is dropped if no job comes; None: never."""
        if self.engine is None or not self._idle_s:
            return None
        return self._idle_since + self._idle_s - time.monotonic()

    def unload(self) -> None:
        """Drop the model; no job is open."""
        log.info("%s is unloaded after %g s without a request", self.name, self._idle_s)
        self.engine, self.state = None, "unloaded"
        free_memory()

    def describe(self) -> dict[str, object]:
        """What is loaded, for people."""
        told = {"model": self.name, "folder": str(self.folder), "state": self.state}
        is_gone = self.engine is None and bool(self.about)
        return told | self.about | ({"memory_bytes": 0} if is_gone else {})

    def _load(self) -> None:
        error: InfilldError | None = None
        engine: Infiller | None = None
        try:
            engine = load_infiller(self.folder, self._device, self._limits)
        except InfilldError as found:
            error = found
        except Exception as found:
            log.exception("loading %s failed", self.folder)
            error = ModelError(f"{self.folder}: {type(found).__name__}: {found}")
        is_lost = False
        with self._lock:
            self._loader = None
            self.used()
            if engine is not None:
                self.engine, self.state = engine, "ready"
                self.about = _about(engine)
                self._idle_s = _idle_s(engine, self._idle_wish)
                self.loads += 1
            elif self.state == "unloaded":
                # It was loaded once: what is in the way, memory say, may be gone next time.
                is_lost = True
            else:
                self.failure, self.state = error, "failed"
            self._lock.notify_all()
        if is_lost:
            self._lost(error or ModelError("not loaded"))
        self.loaded.set()


def _about(engine: Infiller) -> dict[str, object]:
    model = engine.model
    return {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.parameter_count,
        "memory_bytes": model.nbytes,
        "canvas_tokens": model.config.canvas_tokens,
        "prompt_tokens": engine.prompt_tokens,
    }


def _idle_s(engine: Infiller, wish: IdleUnload) -> float:
    """Seconds after which an idle model is dropped; 0: never."""
    if wish != "auto":
        return 60.0 * wish
    is_large = engine.model.device.type != "cpu" and engine.model.nbytes >= _LARGE_BYTES
    return _IDLE_UNLOAD_S if is_large else 0.0
