"""The requests that are being answered: at most one a document."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

from infilld.lsp.documents import Snapshot
from infilld.lsp.filters import Silence

if TYPE_CHECKING:
    from infilld.server import wire

Stop = Literal["superseded", "stale", "closed"]


@dataclass(eq=False)
class Job:
    """One request that is being answered.

    Attributes:
        task: asks the daemon.
        fits: whether the answer will still be of use to the document as it is then.
        is_edit: the user asked for it by hand and waits for it.
        stopped: why nobody waits for it any more.
    """

    task: "asyncio.Task[wire.InfillReply | Silence]"
    fits: Callable[[Snapshot], bool]
    is_edit: bool = False
    stopped: Stop | None = None

    def stop(self, why: Stop) -> None:
        """Let the daemon off: the connection closes, and with it the job."""
        self.stopped = self.stopped or why
        self.task.cancel()


class LiveJobs:
    """The live job of each document; used on the bridge's event loop alone."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}

    async def run(self, uri: str, job: Job) -> None:
        """Wait until the job is done or stopped; being cancelled cancels it."""
        key = unquote(uri)
        self.stop(uri, "superseded")
        self._jobs[key] = job
        try:
            await asyncio.wait({job.task})
        finally:
            job.task.cancel()
            if self._jobs.get(key) is job:
                del self._jobs[key]

    def stop(self, uri: str, why: Stop) -> None:
        """Stop the job of a document, if there is one."""
        job = self._jobs.pop(unquote(uri), None)
        if job is not None:
            job.stop(why)

    def changed(self, uri: str, now: Snapshot) -> None:
        """Stop the job of a document whose answer would no longer fit."""
        job = self._jobs.get(unquote(uri))
        if job is not None and not job.fits(now):
            job.stop("stale")

    def has_edit(self, uri: str) -> bool:
        """Whether somebody waits for an edit of this document."""
        job = self._jobs.get(unquote(uri))
        return job is not None and job.is_edit
