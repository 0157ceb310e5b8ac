"""`textDocument/inlineCompletion`: one live request per document, fresh or silent."""

import asyncio
import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

from lsprotocol import types

from infilld.lsp.daemon import DaemonLink
from infilld.lsp.documents import Documents, Snapshot, has_lone_surrogate
from infilld.lsp.filters import Silence, silence_for
from infilld.lsp.gap import Gap, gap_at, item_for, typed_since, window
from infilld.lsp.options import Options

if TYPE_CHECKING:
    from infilld.server import wire
    from infilld.server.client import AsyncClient, ServerProblem

_GRACE_S = 0.25
"""What the way to the daemon and back may add to its deadline."""
_KEPT_OUTCOMES = 50

log = logging.getLogger(__name__)


@dataclass
class _Job:
    """One request that is being answered; `stopped` says why nobody waits for it any more."""

    gap: Gap
    task: "asyncio.Task[wire.InfillReply | Silence]"
    stopped: Literal["superseded", "stale", "closed"] | None = None

    def stop(self, why: Literal["superseded", "stale", "closed"]) -> None:
        """Let the daemon off: the connection closes, and with it the job."""
        self.stopped = self.stopped or why
        self.task.cancel()


class InlineCompletions:
    """Answers inline completion requests; lives on the bridge's event loop."""

    def __init__(self, documents: Documents, link: DaemonLink) -> None:
        self._documents = documents
        self._link = link
        self._live: dict[str, _Job] = {}
        # Several editors share one daemon and may have the same file open.
        self._editor = secrets.token_hex(8)
        self.options = Options()
        self.roots: list[str] = []
        self.outcomes: deque[dict[str, object]] = deque(maxlen=_KEPT_OUTCOMES)

    async def answer(
        self, params: types.InlineCompletionParams
    ) -> types.InlineCompletionList | None:
        """Return items; an empty list when there is nothing to show, None when superseded.

        Cancelling this coroutine closes the request to the daemon.
        """
        # No await before this job is registered: the snapshot is the document at receipt.
        key = unquote(params.text_document.uri)
        started_s = time.monotonic()
        self._stop(key, "superseded")
        job_or_silence = self._begin(params)
        if isinstance(job_or_silence, Silence):
            return self._silent(job_or_silence, started_s)
        job = self._live[key] = job_or_silence
        try:
            await asyncio.wait({job.task})
        finally:
            job.task.cancel()
            if self._live.get(key) is job:
                del self._live[key]
        if job.stopped == "superseded":
            return None
        if job.stopped is not None:
            return self._silent(Silence(job.stopped, "The document changed meanwhile."), started_s)
        reply = job.task.result()
        if isinstance(reply, Silence):
            return self._silent(reply, started_s)
        return self._shaped(job.gap, reply, started_s)

    def changed(self, uri: str, now: Snapshot) -> None:
        """Stop the live request of a document unless the change only types into its gap."""
        job = self._live.get(unquote(uri))
        if job is not None and typed_since(job.gap, now) is None:
            job.stop("stale")

    def closed(self, uri: str) -> None:
        """Stop the live request of a document that is no longer open."""
        self._stop(unquote(uri), "closed")

    def _stop(self, key: str, why: Literal["superseded", "stale", "closed"]) -> None:
        job = self._live.pop(key, None)
        if job is not None:
            job.stop(why)

    def _begin(self, params: types.InlineCompletionParams) -> _Job | Silence:
        snapshot = self._documents.get(params.text_document.uri)
        if snapshot is None:
            return Silence("not_open", "The editor has not opened this document.")
        silence = silence_for(snapshot, self.options)
        if silence is not None:
            return silence
        gap = gap_at(snapshot, params)
        if gap is None:
            return Silence("filtered", "The selected menu entry replaces more than one line.")
        if has_lone_surrogate(gap.lead):
            return Silence("filtered", "The selected menu entry holds half a surrogate pair.")
        is_invoked = params.context.trigger_kind is types.InlineCompletionTriggerKind.Invoked
        return _Job(gap, asyncio.get_running_loop().create_task(self._ask(gap, is_invoked)))

    async def _ask(self, gap: Gap, is_invoked: bool) -> "wire.InfillReply | Silence":
        """Return the daemon's reply, or why there is none in time."""
        options = self.options
        deadline_ms = options.invoked_deadline_ms if is_invoked else options.automatic_deadline_ms
        wait_s = options.daemon_wait_ms / 1000 if is_invoked else 0.0
        limit_s = wait_s + deadline_ms / 1000
        until_s = time.monotonic() + limit_s
        try:
            async with asyncio.timeout(limit_s + _GRACE_S):
                client = await self._link.client(wait_s)
                reply = await self._send(client, gap, is_invoked, deadline_ms)
                if reply is not None:
                    return reply
                # The daemon is gone, perhaps restarted: find it, and ask once more.
                client = await self._link.client(max(0.0, until_s - time.monotonic()))
                left_ms = max(1, round((until_s - time.monotonic()) * 1000))
                reply = await self._send(client, gap, is_invoked, min(deadline_ms, left_ms))
                return reply or Silence("no_daemon", self._link.why)
        except TimeoutError:
            return Silence("deadline", f"No answer within {deadline_ms} ms.")

    async def _send(
        self, client: "AsyncClient | None", gap: Gap, is_invoked: bool, deadline_ms: int
    ) -> "wire.InfillReply | Silence | None":
        """Ask the daemon; None when it turns out to be gone."""
        if client is None:
            return Silence("no_daemon", self._link.why)
        # Loaded by now, on the link's thread; at the top they would delay the start by 0.1 s.
        from infilld.server import wire
        from infilld.server.client import ServerProblem

        part = window(gap, self.options.before_chars, self.options.after_chars)
        request = wire.InfillRequest(
            text=part.text,
            spans=[wire.Span(start=part.gap, end=part.gap)],
            document=f"{self._editor}:{gap.snapshot.uri}",
            path=self._path(gap.snapshot.uri),
            language=gap.snapshot.language or None,
            n=self.options.alternatives if is_invoked else 1,
            deadline_ms=deadline_ms,
        )
        try:
            reply = await client.infill(request)
        except ServerProblem as problem:
            if not _is_gone(problem):
                return Silence(problem.code, problem.message)
            # What another program answered is not repeated: it may quote the document.
            is_other = problem.code == "not_infilld"
            self._link.lost(client, "its answers are not infilld's" if is_other else str(problem))
            return None
        self._link.answered()
        return reply

    def _path(self, uri: str) -> str | None:
        """The document's path below its workspace folder, or its name alone."""
        address = unquote(uri)
        if not address.startswith("file://"):
            return None
        for root in self.roots:
            below = unquote(root).rstrip("/") + "/"
            if address.startswith(below):
                return address.removeprefix(below)
        return PurePath(address).name

    def _shaped(
        self, gap: Gap, reply: "wire.InfillReply", started_s: float
    ) -> types.InlineCompletionList:
        if not reply.choices:
            return self._silent(Silence(reply.reason, reply.why), started_s)
        now = self._documents.get(gap.snapshot.uri)
        items: dict[str, types.InlineCompletionItem] = {}
        for choice in reply.choices:
            item = item_for(gap, choice.spans[0].text, now) if now and choice.spans else None
            if item is not None:
                items.setdefault(str(item.insert_text), item)
        if not items:
            return self._silent(Silence("stale", "The document has moved on."), started_s)
        self._note("ok", f"alternatives: {len(items)}", started_s)
        return types.InlineCompletionList(items=list(items.values()))

    def _silent(self, silence: Silence, started_s: float) -> types.InlineCompletionList:
        self._note(silence.reason, silence.why, started_s)
        return types.InlineCompletionList(items=[])

    def _note(self, reason: str, why: str, started_s: float) -> None:
        took_ms = round((time.monotonic() - started_s) * 1000, 1)
        self.outcomes.append({"reason": reason, "why": why, "took_ms": took_ms})
        log.info("inline completion: %s in %s ms: %s", reason, took_ms, why)


def _is_gone(problem: "ServerProblem") -> bool:
    """Whether this daemon, or its token, is not the one that was found."""
    return problem.code in {"unreachable", "cut_off", "not_infilld"} or problem.status == 401
