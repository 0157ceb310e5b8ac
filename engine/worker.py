"""Owns the device and the loaded model; runs jobs one at a time on its own thread.

A newer job for the same document supersedes the older one, queued or running. Everything that
ends a job early takes effect between two passes.
"""

import logging
import secrets
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch

from infilld.engine.config import ModelConfig, SamplerConfig
from infilld.engine.errors import (
    Busy,
    Cancelled,
    CheckpointMismatch,
    InfilldError,
    Loading,
    ModelError,
    NotEnoughMemory,
    UnsupportedDevice,
)
from infilld.engine.infill import Hooks, Infiller
from infilld.engine.ranking import Calibration
from infilld.engine.request import CanvasUpdate, InfillRequest, InfillResult
from infilld.engine.tokenizer import Tokenizer
from infilld.engine.weights import load_model
from infilld.kernels._launch import KernelUnavailable, require_triton

log = logging.getLogger(__name__)

MAX_QUEUED = 32
_TIMED_JOBS = 512

OnCanvas = Callable[[CanvasUpdate], None]


class _Superseded(Exception):
    """A newer job of the same document took over."""


@dataclass(eq=False)
class Job:
    """A request on its way. `future` ends with a result, or raises an InfilldError.

    Attributes:
        id: names the job and its result.
        request: what was asked. on_canvas: called on the worker's thread after every pass.
        future: the answer. arrived_at: `time.monotonic()` reading, seconds.
    """

    request: InfillRequest
    on_canvas: OnCanvas | None
    _withdraw: Callable[["Job"], None]
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    future: "Future[InfillResult]" = field(default_factory=Future)
    arrived_at: float = field(default_factory=time.monotonic)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _superseded: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give the job up: takes effect within one pass, then `future` raises Cancelled."""
        self._cancelled.set()
        self._withdraw(self)

    def supersede(self) -> None:
        """End the job with the reason `superseded`."""
        self._superseded.set()

    def check(self) -> None:
        """Raise if the job is no longer wanted."""
        if self._cancelled.is_set():
            raise Cancelled("the client went away")
        if self._superseded.is_set():
            raise _Superseded

    @property
    def deadline_at(self) -> float | None:
        """`time.monotonic()` reading at which the deadline strikes."""
        ms = self.request.deadline_ms
        return None if ms is None else self.arrived_at + ms / 1e3


def starter_folder() -> Path:
    """Folder of the embedded model."""
    return Path(str(files("infilld.engine") / "starter"))


class Worker:
    """One model on one device, behind a queue.

    Args:
        folder: checkpoint; None: the embedded starter model.
        device: "cpu", "cuda", "cuda:N", or "auto": CUDA where there is one.
    """

    def __init__(self, folder: Path | None = None, *, device: str = "auto") -> None:
        self.folder = starter_folder() if folder is None else folder
        self.model_name = "starter" if folder is None else self.folder.name
        self.state: Literal["loading", "ready", "failed"] = "loading"
        self.failure: InfilldError | None = None
        self._device_wish = device
        self._engine: Infiller | None = None
        self._queue: deque[Job] = deque()
        self._running: Job | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._loaded = threading.Event()
        self._thread = threading.Thread(target=self._work, name="infilld-worker", daemon=True)
        self._reasons: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._job_ms: deque[float] = deque(maxlen=_TIMED_JOBS)

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the model is loaded.

        Raises:
            InfilldError: why it could not be loaded; Loading: not within the time.
        """
        if not self._loaded.wait(timeout_s):
            raise Loading(f"{self.model_name} is still loading after {timeout_s:g} s")
        if self.failure is not None:
            raise self.failure.with_traceback(None)

    def submit(self, request: InfillRequest, on_canvas: OnCanvas | None = None) -> Job:
        """Queue a request; a live one of the same document is superseded.

        Raises:
            Loading: the model is not there yet; ModelError: it never will be.
            Busy: the queue is full.
        """
        if self.failure is not None:
            # Without its traceback: that would grow, and hold every request, at each raise.
            raise self.failure.with_traceback(None)
        if self.state != "ready":
            raise Loading(f"{self.model_name} is still loading")
        job = Job(request, on_canvas, self._withdraw)
        with self._wake:
            if self._closing:
                raise Busy("the daemon is stopping")
            older = self._queued_of(request.document)
            if len(self._queue) - len(older) >= MAX_QUEUED:
                raise Busy(f"{len(self._queue)} requests are waiting")
            for old in older:
                self._queue.remove(old)
            running = self._running
            if running is not None and self._is_same(running, request.document):
                running.supersede()
            self._queue.append(job)
            self._wake.notify()
        for old in older:
            self._answer(old, _superseded(old))
        return job

    def describe(self) -> dict[str, object]:
        """What is loaded, for people and for `/v1/models`."""
        about: dict[str, object] = {"model": self.model_name, "folder": str(self.folder)}
        if self._engine is None:
            return about | {"state": self.state}
        model = self._engine.model
        numbers = [*model.parameters(), *model.buffers()]
        return about | {
            "state": self.state,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "memory_bytes": sum(n.nbytes for n in numbers),
            "canvas_tokens": model.config.canvas_tokens,
            "prompt_tokens": self._engine.prompt_tokens,
        }

    def stats(self) -> dict[str, object]:
        """Counts since the start and times of the last jobs, in ms."""
        with self._wake:
            queued, times = len(self._queue), sorted(self._job_ms)
            totals, reasons = dict(self._totals), dict(self._reasons)
        centiles = statistics.quantiles(times, n=20) if len(times) > 1 else times * 19
        return {
            "queued": queued,
            "jobs": sum(reasons.values()),
            "reasons": reasons,
            **{name: totals.get(name, 0) for name in ("passes", "prompt_tokens", "cached_tokens")},
            "p50_ms": centiles[9] if times else None,
            "p95_ms": centiles[18] if times else None,
        }

    def close(self) -> None:
        """Stop after the running pass; every open job ends with Cancelled."""
        with self._wake:
            self._closing = True
            open_jobs = [*self._queue, *([self._running] if self._running else [])]
            self._wake.notify()
        for job in open_jobs:
            job.cancel()
        if self._thread.is_alive():
            self._thread.join()

    def _is_same(self, job: Job, document: str | None) -> bool:
        return document is not None and job.request.document == document

    def _queued_of(self, document: str | None) -> list[Job]:
        return [job for job in self._queue if self._is_same(job, document)]

    def _withdraw(self, job: Job) -> None:
        """End a job that has not begun; one that runs ends at its next check."""
        with self._wake:
            if job not in self._queue:
                return
            self._queue.remove(job)
        self._answer(job, Cancelled("the client went away"))

    def _work(self) -> None:
        try:
            self._engine = load_infiller(self.folder, self._device_wish)
        except InfilldError as error:
            self._fail(error)
            return
        except Exception as error:
            log.exception("loading %s failed", self.folder)
            self._fail(ModelError(f"{self.folder}: {type(error).__name__}: {error}"))
            return
        self.state = "ready"
        self._loaded.set()
        try:
            while (job := self._next()) is not None:
                self._answer(job, self._outcome(self._engine, job))
                with self._wake:
                    self._running = None
        except BaseException as error:
            # Nobody may wait for a thread that is gone.
            log.exception("the worker's thread died")
            self._fail(ModelError(f"the engine broke: {type(error).__name__}: {error}"))

    def _fail(self, error: InfilldError) -> None:
        with self._wake:
            self.failure, self.state = error, "failed"
            open_jobs = [*self._queue, *([self._running] if self._running else [])]
            self._queue.clear()
        for job in open_jobs:
            if not job.future.done():
                self._answer(job, error)
        self._loaded.set()

    def _next(self) -> Job | None:
        with self._wake:
            while not self._queue:
                if self._closing:
                    return None
                self._wake.wait()
            self._running = self._queue.popleft()
            return self._running

    def _outcome(self, engine: Infiller, job: Job) -> InfillResult | BaseException:
        """Run a job; whatever goes wrong is its answer, never the thread's end."""
        try:
            queue_ms = 1e3 * (time.monotonic() - job.arrived_at)
            hooks = Hooks(on_canvas=job.on_canvas, check=job.check, deadline_at=job.deadline_at)
            result = replace(engine.infill(job.request, hooks), id=job.id)
            total_ms = 1e3 * (time.monotonic() - job.arrived_at)
            timings = replace(result.timings, queue_ms=queue_ms, total_ms=total_ms)
            return replace(result, timings=timings)
        except _Superseded:
            return _superseded(job)
        except InfilldError as error:
            return error
        except torch.OutOfMemoryError as error:
            return NotEnoughMemory(str(error))
        except Exception as error:
            log.exception("job %s failed", job.id)
            return error

    def _answer(self, job: Job, outcome: InfillResult | BaseException) -> None:
        """Resolve a job that nobody else resolves: it was taken from the queue, or has run."""
        if isinstance(outcome, InfillResult):
            self._count(outcome.reason, outcome)
            job.future.set_result(outcome)
            return
        self._count(outcome.code if isinstance(outcome, InfilldError) else InfilldError.code)
        job.future.set_exception(outcome)

    def _count(self, reason: str, result: InfillResult | None = None) -> None:
        with self._wake:
            self._reasons[reason] += 1
            if result is not None and result.reason != "superseded":
                self._job_ms.append(result.timings.total_ms)
                for name in ("passes", "prompt_tokens", "cached_tokens"):
                    self._totals[name] += getattr(result.usage, name)


def _superseded(job: Job) -> InfillResult:
    return InfillResult(
        id=job.id,
        seed=job.request.seed or 0,
        reason="superseded",
        why="A newer request for the same document took over.",
    )


def load_infiller(folder: Path, device: str = "auto") -> Infiller:
    """The engine over a checkpoint folder.

    Args:
        folder: checkpoint with tokenizer.json.
        device: as for `Worker`.

    Raises:
        ModelError: the folder or the device will not do.
    """
    chosen = pick_device(device)
    # Before the weights: what cannot be used is refused in a moment, not after minutes.
    tokenizer = Tokenizer.from_folder(folder, ModelConfig.from_folder(folder).vocab_tokens)
    # bfloat16 products are 4 to 5 times as fast as float32 only on CPUs that have them, and a
    # starter-sized model is bound by launches, not products: float32 is exact everywhere.
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    try:
        model = load_model(folder, device=chosen, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"{folder} does not fit on {chosen}: {error}") from None
    if chosen.type == "cuda":
        _refuse_without_kernels(model.config)
    return Infiller(
        model,
        tokenizer,
        SamplerConfig.from_folder(folder),
        calibration=Calibration.from_folder(folder),
    )


def _refuse_without_kernels(config: ModelConfig) -> None:
    """Say at load, not at the first request, that the GPU's kernels cannot run."""
    try:
        require_triton("accept")
    except KernelUnavailable as error:
        raise UnsupportedDevice(f"CUDA without kernels: {error}") from None
    from infilld.kernels.gpu.accept import LARGEST_CANVAS_TOKENS

    if config.canvas_tokens > LARGEST_CANVAS_TOKENS:
        raise CheckpointMismatch(
            f"config.json: a canvas of {config.canvas_tokens} positions, "
            f"the GPU's kernels take {LARGEST_CANVAS_TOKENS}"
        )


def pick_device(wish: str) -> torch.device:
    """The device a wish stands for.

    Raises:
        UnsupportedDevice: no such device on this machine.
    """
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError:
        raise UnsupportedDevice(f"{wish!r} is not a device") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UnsupportedDevice(f"no {device.type} device that torch can use")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UnsupportedDevice(f"{wish}: this machine has {torch.cuda.device_count()}")
    return device
