"""The model a worker serves, coming and going: loaded, dropped while idle, switched to another.

loading ──▶ ready ◀──▶ unloaded          a switch: live jobs end, the next checkpoint is looked
   └──▶ failed  (a switch mends it)      at, the old weights go, the new ones come; if they do
                                         not, the old ones come back
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from infilld.engine.errors import Busy, InfilldError, ModelError
from infilld.engine.infill import Infiller
from infilld.engine.loading import (
    free_memory,
    load_infiller,
    refuse_unfit,
    starter_folder,
)
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
        loads: how often a model was loaded. loaded: set when that was tried for the first time.
        switch_failure: why the last switch came to nothing, and what to do.
        loader: the thread that loads now.
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
        self.folder, self.name = _named(folder)
        self.engine: Infiller | None = None
        self.state: State = "loading"
        self.failure: InfilldError | None = None
        self.about: dict[str, object] = {}
        self.loads = 0
        self.loaded = threading.Event()
        self.switch_failure: str | None = None
        self.loader: threading.Thread | None = None
        self._device, self._limits, self._idle_wish = device, limits, idle_wish
        self._lock, self._lost = lock, lost
        self._idle_s = self._idle_since = 0.0
        self._is_to_go = False
        self._load_s: float | None = None
        self._next: tuple[Path, str] | None = None

    @property
    def is_switching(self) -> bool:
        """Whether another checkpoint is about to take its place."""
        return self._next is not None

    def load_soon(self) -> None:
        """Begin to load, unless that has begun."""
        self._begin(self._load)

    def switch(self, folder: Path | None) -> None:
        """Another checkpoint is to take its place as soon as `go_on` is called.

        Raises:
            Busy: one is about to already.
        """
        if self._next is not None:
            raise Busy(f"{self._next[1]} is being loaded already")
        self._next, self.switch_failure = _named(folder), None
        if self.state == "failed":
            # Who asks now waits for the next one.
            self.state = "unloaded"

    def unload_soon(self) -> None:
        """The model is to go when no job is open."""
        self._is_to_go = self.engine is not None or self.loader is not None

    def used(self) -> None:
        """A job has ended: from now on it is idle, if no other is open."""
        self._idle_since = time.monotonic()

    def rest(self, *, is_open: bool) -> float | None:
        """What is to be done while no job is live: drop the model, or begin to switch.

        Args:
            is_open: a job waits for the model.

        Returns:
            Seconds after which to ask again; None: not before something happens.
        """
        if self._next is not None:
            self._begin(self._switch)
            return None
        if is_open or self.engine is None:
            return None
        left_s = None
        if self._idle_s:
            left_s = self._idle_since + self._idle_s - time.monotonic()
        if self._is_to_go or (left_s is not None and left_s <= 0):
            log.info("%s is unloaded", self.name)
            self._drop()
            return None
        return left_s

    def describe(self) -> dict[str, object]:
        """What is loaded, for people; needs no lock, which may be held while memory is freed."""
        following = self._next
        told: dict[str, object] = {
            "model": self.name,
            "folder": str(self.folder),
            "state": self.state if following is None else "switching",
        }
        told |= self.about
        if self.engine is None and self.about:
            told["memory_bytes"] = 0
        if self._load_s is not None:
            told["last_load_s"] = round(self._load_s, 3)
        if following is not None:
            told["switching_to"] = following[1]
        if self.switch_failure is not None:
            told["switch_failure"] = self.switch_failure
        return told

    def _begin(self, load: Callable[[], None]) -> None:
        if self.loader is None:
            self.loader = threading.Thread(target=load, name="infilld-load", daemon=True)
            self.loader.start()

    def _drop(self) -> None:
        """Forget the model, and give its memory back; no job is live."""
        self.engine, self.state, self._is_to_go = None, "unloaded", False
        free_memory()

    # On the loading thread, which holds no lock.

    def _load(self) -> None:
        found = self._read(self.folder)
        with self._lock:
            if isinstance(found, Infiller):
                self._install(found)
            elif self.state != "unloaded":
                self.failure, self.state = found, "failed"
            # Else it was loaded once: what is in the way, memory say, may be gone next time.
        if isinstance(found, InfilldError):
            # Before anybody can wait for the next attempt.
            self._lost(found)
        with self._lock:
            self.loader = None
            self.used()
            self._lock.notify_all()
        self.loaded.set()

    def _switch(self) -> None:
        """Load the next checkpoint in place of this one, or this one again."""
        assert self._next is not None
        folder, name = self._next
        # What cannot be used costs nobody the model they have.
        unfit = self._unfit(folder)
        if unfit is not None:
            self._switched(unfit)
            return
        with self._lock:
            had_model = self.engine is not None
            if had_model:
                self._drop()
        found = self._read(folder)
        if isinstance(found, Infiller):
            with self._lock:
                self.folder, self.name = folder, name
                self._install(found)
            self._switched(None)
            return
        before = self._read(self.folder) if had_model else None
        if isinstance(before, Infiller):
            with self._lock:
                self._install(before)
        if isinstance(before, InfilldError):
            self._lost(before)
        self._switched(found)

    def _switched(self, failure: InfilldError | None) -> None:
        """A switch has ended."""
        with self._lock:
            if failure is not None:
                log.warning("%s stays: %s", self.name, failure)
                self.switch_failure = _with_remedy(failure)
            never_came = self.failure
            if never_came is not None:
                self.state = "failed"
        if never_came is not None:
            self._lost(never_came)
        with self._lock:
            self.loader = self._next = None
            self.used()
            self._lock.notify_all()

    def _install(self, engine: Infiller) -> None:
        """This model serves from now on; with the lock held."""
        self.engine, self.state, self.failure = engine, "ready", None
        self.about = _about(engine)
        self._idle_s = _idle_s(engine, self._idle_wish)
        self.loads += 1
        self.used()

    def _unfit(self, folder: Path) -> InfilldError | None:
        try:
            refuse_unfit(folder, self._device)
        except Exception as found:
            return _said(folder, found)
        return None

    def _read(self, folder: Path) -> Infiller | InfilldError:
        begun = time.monotonic()
        try:
            engine = load_infiller(folder, self._device, self._limits)
            self._load_s = time.monotonic() - begun
            log.info("%s is loaded, %.1f s", folder, self._load_s)
            return engine
        except Exception as found:
            error = _said(folder, found)
        log.error("%s is not loaded: %s", folder, _with_remedy(error))
        # The frames that failed are gone, and the weights that they held.
        free_memory()
        return error


def _named(folder: Path | None) -> tuple[Path, str]:
    return (starter_folder(), "starter") if folder is None else (folder, folder.name)


def _said(folder: Path, found: Exception) -> InfilldError:
    """An error to keep: without traceback and causes, which hold what was loaded so far."""
    if isinstance(found, InfilldError):
        found.__traceback__ = found.__context__ = found.__cause__ = None
        return found
    log.error("loading %s failed", folder, exc_info=found)
    return ModelError(f"{folder}: {type(found).__name__}: {found}")


def _with_remedy(error: InfilldError) -> str:
    return ". ".join(filter(None, (str(error), error.remedy)))


def _about(engine: Infiller) -> dict[str, object]:
    model = engine.model
    return {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": model.parameter_count,
        "memory_bytes": model.nbytes,
        "canvas_tokens": model.config.canvas_tokens,
        "prompt_tokens": engine.prompt_tokens,
        "context_tokens": model.context_tokens,
        "thinking": engine.can_think,
        "follows_instructions": engine.layout.follows_instructions,
    }


def _idle_s(engine: Infiller, wish: IdleUnload) -> float:
    """Seconds after which an idle model is dropped; 0: never."""
    if wish != "auto":
        return 60.0 * wish
    is_large = engine.model.device.type != "cpu" and engine.model.nbytes >= _LARGE_BYTES
    return _IDLE_UNLOAD_S if is_large else 0.0
