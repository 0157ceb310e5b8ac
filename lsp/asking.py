"""Requests to the daemon, whatever the editor asked for: a reply in time, or why there is none."""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from infilld.lsp.daemon import DaemonLink
from infilld.lsp.documents import Snapshot
from infilld.lsp.filters import Silence
from infilld.lsp.options import Options

if TYPE_CHECKING:
    from infilld.server import wire
    from infilld.server.client import AsyncClient, ServerProblem

_GRACE_S = 0.25
"""What the way to the daemon and back may add to its deadline."""
_KEPT_OUTCOMES = 50

log = logging.getLogger(__name__)


class Asker:
    """Asks the daemon on behalf of one editor, and remembers how that went."""

    def __init__(self, link: DaemonLink) -> None:
        self._link = link
        # Several editors share one daemon and may have the same file open.
        self._editor = secrets.token_hex(8)
        self.options = Options()
        self.roots: list[str] = []
        self.outcomes: deque[dict[str, object]] = deque(maxlen=_KEPT_OUTCOMES)

    async def ask(
        self,
        snapshot: Snapshot,
        content: Callable[[], dict[str, Any]],
        *,
        deadline_ms: int,
        wait_s: float,
    ) -> "wire.InfillReply | Silence":
        """Return the daemon's reply, or why there is none in time.

        Args:
            snapshot: the document; names the request.
            content: what is asked, as keyword arguments of the wire's request. Called late.
            deadline_ms: how long the daemon may take.
            wait_s: how long to wait for a daemon that is not ready.
        """
        limit_s = wait_s + deadline_ms / 1000
        until_s = time.monotonic() + limit_s
        try:
            async with asyncio.timeout(limit_s + _GRACE_S):
                client = await self._link.client(wait_s)
                reply = await self._send(client, snapshot, content, deadline_ms)
                if reply is not None:
                    return reply
                # The daemon is gone, perhaps restarted: find it, and ask once more.
                client = await self._link.client(max(0.0, until_s - time.monotonic()))
                left_ms = max(1, round((until_s - time.monotonic()) * 1000))
                reply = await self._send(client, snapshot, content, min(deadline_ms, left_ms))
                return reply or Silence("no_daemon", self._link.why)
        except TimeoutError:
            return Silence("deadline", f"No answer within {deadline_ms} ms.")

    def note(self, what: str, reason: str, why: str, started_s: float) -> None:
        """Remember how a request ended."""
        took_ms = round((time.monotonic() - started_s) * 1000, 1)
        self.outcomes.append({"what": what, "reason": reason, "why": why, "took_ms": took_ms})
        log.info("%s: %s in %s ms: %s", what, reason, took_ms, why)

    async def _send(
        self,
        client: "AsyncClient | None",
        snapshot: Snapshot,
        content: Callable[[], dict[str, Any]],
        deadline_ms: int,
    ) -> "wire.InfillReply | Silence | None":
        """Ask the daemon; None when it turns out to be gone."""
        if client is None:
            return Silence("no_daemon", self._link.why)
        # Loaded by now, on the link's thread; at the top they would delay the start by 0.1 s.
        from infilld.server import wire
        from infilld.server.client import ServerProblem

        request = wire.InfillRequest.model_validate(
            {
                "document": f"{self._editor}:{snapshot.uri}",
                "path": self._path(snapshot.uri),
                "language": snapshot.language or None,
                "boldness": self.options.boldness,
                "deadline_ms": deadline_ms,
                **content(),
            }
        )
        try:
            # The time for waiting is not the daemon's to use.
            async with asyncio.timeout(deadline_ms / 1000 + _GRACE_S):
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


def _is_gone(problem: "ServerProblem") -> bool:
    """Whether this daemon, or its token, is not the one that was found."""
    return problem.code in {"unreachable", "cut_off", "not_infilld"} or problem.status == 401
