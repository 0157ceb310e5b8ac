"""A worker without a model: the interface of `infilld.engine.worker.Worker`, scripted by a test.

Every job runs on a thread of its own through the canvases of its script and then its result.
`hold()` makes jobs wait before each canvas and before the result; `release()` lets them go on.
"""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from infilld.engine.conversation import ChatAnswer, ChatRequest, ChatResult, ChatUpdate, Finish
from infilld.engine.errors import Busy, Cancelled, InfilldError, Loading, UnknownId
from infilld.engine.request import (
    Alternative,
    CanvasToken,
    CanvasUpdate,
    DraftSpan,
    InfillRequest,
    InfillResult,
    Reason,
    ScoredToken,
    SpanFill,
    Timings,
    Usage,
)

OnCanvas = Callable[[Any], None]
AnyRequest = InfillRequest | ChatRequest
Event = Literal["shown", "inserted", "partly", "dismissed", "retained"]


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a job does.

    Attributes:
        texts: the best first; every span gets the same text, or each its own where they are
            several in a list. Empty: no suggestion.
        drafts: the canvases shown before, whole text each; settled is what the next one shares.
        reason, why: of the result.
        error: raised instead of a result.
        pass_s: seconds before each canvas.
        thoughts, finish: of every answer in a conversation, whose text is final word by word.
    """

    texts: Sequence[str | list[str]] = ("return 1",)
    drafts: Sequence[str | list[str]] = ("rxturn q", "return q")
    reason: Reason = "ok"
    why: str = ""
    error: InfilldError | None = None
    pass_s: float = 0.0
    thoughts: str = ""
    finish: Finish = "stop"


Scripting = Script | Callable[[Any], Script]


class FakeJob:
    """One scripted job."""

    def __init__(self, job_id: str, request: AnyRequest, script: Script) -> None:
        self.id, self.request, self.script = job_id, request, script
        self.future: Future[Any] = Future()
        self.is_cancelled = threading.Event()
        self.is_superseded = threading.Event()

    def cancel(self) -> None:
        self.is_cancelled.set()


class FakeWorker:
    """Runs scripted jobs; `script` may depend on the request."""

    def __init__(
        self, script: Scripting | None = None, *, is_loading: bool = False, capacity: int = 8
    ) -> None:
        self.script: Scripting = script or Script()
        self.state = "loading" if is_loading else "ready"
        self.failure: InfilldError | None = None
        self.jobs: list[FakeJob] = []
        self.told: list[tuple[str, str, int, int | None]] = []
        self.switched: list[Path | None] = []
        # What `describe` says beside, or in place of, the usual.
        self.facts: dict[str, object] = {}
        self._capacity = capacity
        self._is_open = threading.Event()
        self._is_open.set()
        self._ids = itertools.count()
        self._changed = threading.Condition()
        self._counts = {"done": 0, "cancelled": 0, "superseded": 0}

    def start(self) -> None:
        pass

    def close(self) -> None:
        for job in self.jobs:
            job.cancel()

    def finish_loading(self, failure: InfilldError | None = None) -> None:
        self.failure = failure
        self.state = "ready" if failure is None else "failed"

    def wait_ready(self, timeout_s: float) -> None:
        if self.failure is not None:
            raise self.failure
        if self.state != "ready":
            raise Loading(f"not loaded after {timeout_s} s")

    def hold(self) -> None:
        self._is_open.clear()

    def release(self) -> None:
        self._is_open.set()

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until a job's progress makes the condition true."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "the fake worker never got there"

    def switch(self, folder: Path | None) -> None:
        self.switched.append(folder)

    def unload(self) -> None:
        self.state = "unloaded"

    def submit(self, request: AnyRequest, on_canvas: OnCanvas | None = None) -> FakeJob:
        if self.failure is not None:
            raise self.failure
        if self.state == "loading":
            raise Loading("the model is still being loaded")
        running = [job for job in self.jobs if not job.future.done()]
        if len(running) >= self._capacity:
            raise Busy(f"{len(running)} jobs are waiting")
        for job in running:
            if request.document is not None and job.request.document == request.document:
                job.is_superseded.set()
        script = self.script(request) if callable(self.script) else self.script
        job = FakeJob(f"job-{next(self._ids)}", request, script)
        self.jobs.append(job)
        threading.Thread(target=self._run, args=(job, on_canvas), daemon=True).start()
        self._note()
        return job

    def feedback(
        self, job_id: str, event: Event, *, choice: int = 0, chars: int | None = None
    ) -> None:
        if all(job.id != job_id for job in self.jobs):
            raise UnknownId(f"no job {job_id!r}")
        self.told.append((job_id, event, choice, chars))

    def describe(self) -> dict[str, object]:
        return {
            "model": "fake",
            "folder": None,
            "state": self.state,
            "device": "cpu",
            "dtype": "float32",
            "parameters": 0,
            "memory_bytes": 0,
            "canvas_tokens": 256,
            "max_tokens": 4096,
            **self.facts,
        }

    def stats(self) -> dict[str, object]:
        return dict(self._counts)

    def _note(self, count: str | None = None) -> None:
        with self._changed:
            if count is not None:
                self._counts[count] += 1
            self._changed.notify_all()

    def _run(self, job: FakeJob, on_canvas: OnCanvas | None) -> None:
        updates = _updates(job)
        for update in updates:
            if self._has_ended(job):
                return
            if on_canvas is not None:
                on_canvas(update)
        if self._has_ended(job):
            return
        if job.script.error is not None:
            job.future.set_exception(job.script.error)
        else:
            job.future.set_result(_result(job))
        self._note("done")

    def _has_ended(self, job: FakeJob) -> bool:
        """Wait for the gate; True when the job was cancelled or superseded meanwhile."""
        time.sleep(job.script.pass_s)
        while not self._is_open.wait(0.005) and not (
            job.is_cancelled.is_set() or job.is_superseded.is_set()
        ):
            pass
        if job.is_cancelled.is_set():
            job.future.set_exception(Cancelled("cancelled by the client"))
            self._note("cancelled")
            return True
        if job.is_superseded.is_set():
            kind = ChatResult if isinstance(job.request, ChatRequest) else InfillResult
            job.future.set_result(kind(id=job.id, seed=0, reason="superseded", why="newer"))
            self._note("superseded")
            return True
        return False


def _for_span(texts: str | list[str], number: int) -> str:
    return texts if isinstance(texts, str) else texts[number]


def _updates(job: FakeJob) -> list[CanvasUpdate | ChatUpdate]:
    drafts, asked = job.script.drafts, job.request
    if isinstance(asked, InfillRequest):
        return [_update(job, asked, seq, draft) for seq, draft in enumerate(drafts)]
    words = str(next(iter(job.script.texts), "")).split(" ")
    return [
        ChatUpdate(
            seq=seq,
            canvas=seq,
            passes=seq + 1,
            text=" ".join(words[: seq + 1]),
            thoughts=job.script.thoughts,
            draft=" ".join(words[seq + 1 :]).upper(),
        )
        for seq in range(len(words))
    ]


def _update(job: FakeJob, asked: InfillRequest, seq: int, draft: str | list[str]) -> CanvasUpdate:
    after = [*job.script.drafts, *job.script.texts[:1]][seq + 1 :]
    spans = []
    for number in range(len(asked.spans)):
        text = _for_span(draft, number)
        pairs = zip(text, _for_span(after[0], number) if after else text, strict=False)
        settled = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        spans.append(DraftSpan(text, settled))
    tokens = _tokens(asked, spans, after) if asked.shows_tokens else ()
    return CanvasUpdate(seq=seq, canvas=0, passes=seq + 1, spans=tuple(spans), tokens=tokens)


def _tokens(
    asked: InfillRequest, drafts: Sequence[DraftSpan], after: Sequence[str | list[str]]
) -> tuple[CanvasToken, ...]:
    """Every span's words, a filler, and what stands behind it.

    A word that the next canvas shares is accepted, and settled where it is part of what is final.
    """
    tokens: list[CanvasToken] = []
    for number, (span, draft) in enumerate(zip(asked.spans, drafts, strict=True)):
        later = _words(_for_span(after[0], number)) if after else []
        end = 0
        for place, word in enumerate(_words(draft.text)):
            end += len(word)
            if end <= draft.settled:
                tokens.append(CanvasToken(word, 0.05, "settled", number))
            elif later[place : place + 1] == [word]:
                tokens.append(CanvasToken(word, 0.75, "accepted", number))
            else:
                tokens.append(CanvasToken(word, 3.5, "noise", number))
        tokens.append(CanvasToken("", 0.5, "accepted", number, is_filler=True))
        tokens.append(CanvasToken(asked.text[span.end : span.end + 8], 0.0, "given"))
    return tuple(tokens)


def _result(job: FakeJob) -> InfillResult | ChatResult:
    script, asked = job.script, job.request
    seed = 7 if asked.seed is None else asked.seed
    usage = Usage(prompt_tokens=10, canvas_tokens=16, passes=len(script.drafts), text_tokens=2)
    timings = Timings(denoise_ms=1.0, total_ms=1.5)
    texts = script.texts[: asked.alternatives] if script.reason == "ok" else ()
    if isinstance(asked, ChatRequest):
        return ChatResult(
            id=job.id,
            seed=seed,
            answers=tuple(ChatAnswer(str(text), script.thoughts, script.finish) for text in texts),
            reason=script.reason,
            why=script.why,
            usage=usage,
            timings=timings,
        )
    alternatives = tuple(
        Alternative(
            tuple(_fill(span.start, span.end, _for_span(text, i)) for i, span in spans),
            -0.1 - rank,
        )
        for spans in [list(enumerate(asked.spans))]
        for rank, text in enumerate(() if asked.warm else texts)
    )
    return InfillResult(
        id=job.id,
        seed=seed,
        alternatives=alternatives,
        reason=script.reason,
        why=script.why,
        usage=usage,
        timings=timings,
    )


def _fill(start: int, end: int, text: str) -> SpanFill:
    """A fill whose tokens are its words."""
    scored = tuple(ScoredToken(word, -0.25) for word in _words(text))
    return SpanFill(start, end, text, 0.9, scored)


def _words(text: str) -> list[str]:
    return [word for word in text.replace(" ", " \0").split("\0") if word]
