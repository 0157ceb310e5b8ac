"""The bridge's link to the daemon: finds or starts it in the background, and finds it again.

Nothing here blocks the event loop, and nothing heavy is imported before the editor has its answer
to `initialize`: httpx, pydantic and the discovery module are loaded on the link's own thread.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from infilld.server.client import AsyncClient
    from infilld.server.discovery import Daemon

T = TypeVar("T")
State = Literal["stopped", "starting", "loading", "ready", "failed"]

START_WAIT_S = 60.0
"""How long a daemon may take to listen."""
LOAD_WAIT_S = 900.0
"""How long a model may take to load; tens of gigabytes come from a disk."""
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
_TELL_S = 5.0
"""A failed search is repeated after a pause that doubles between these two."""

log = logging.getLogger(__name__)


class DaemonLink:
    """Knows whether the daemon is there; hands out a client when its model is loaded.

    Lives on one event loop. `notify` is called with each new state and one sentence about it.
    `may_start` says whether to start a daemon when none runs; else one is only looked for.
    """

    def __init__(self, notify: Callable[[State, str], None]) -> None:
        self._notify = notify
        self._search: asyncio.Task[None] | None = None
        self._client: AsyncClient | None = None
        self._failures = 0
        self._next_try_s = 0.0
        self.may_start = True
        self.daemon: Daemon | None = None
        self.state: State = "stopped"
        self.why = "The daemon has not been looked for yet."

    def begin(self) -> None:
        """Look for the daemon before the first request needs it."""
        self._look()

    async def client(self, wait_s: float) -> "AsyncClient | None":
        """Return a client of a daemon that is ready; None when there is none after `wait_s`."""
        if self.state != "ready":
            # Who is willing to wait is not told to come back later.
            self._look(is_urgent=wait_s > 0)
            if self._search is not None and wait_s > 0:
                await asyncio.wait({self._search}, timeout=wait_s)
        return self._client if self.state == "ready" else None

    def lost(self, client: "AsyncClient", why: str) -> None:
        """Forget a daemon that does not answer any more, and look again."""
        if client is not self._client:
            return
        self._forget()
        self._failures += 1
        # The first loss is a restart; a daemon lost again and again is left alone for a while.
        if self._failures > 1:
            self._next_try_s = time.monotonic() + self._pause_s()
        self._set("stopped", f"The daemon went away: {why}")
        self._look()

    def answered(self) -> None:
        """Note that the daemon does its work; the next loss counts as the first."""
        self._failures = 0

    async def model(self, wait_s: float) -> str | None:
        """Return the name of the loaded model; None when the daemon is not ready to say."""
        if self._client is None or self.state != "ready":
            return None
        from infilld.server.client import ServerProblem

        try:
            async with asyncio.timeout(wait_s):
                models = await self._client.models()
        except (ServerProblem, TimeoutError):
            return None
        return str(models[0].get("id")) if models else None

    async def inserted(self, reply_id: str, choice: int) -> None:
        """Tell the daemon that a suggestion was inserted; where that fails, it is left."""
        if self._client is None or self.state != "ready":
            return
        from infilld.server import wire
        from infilld.server.client import ServerProblem

        try:
            async with asyncio.timeout(_TELL_S):
                told = wire.Feedback(id=reply_id, choice=choice, event="inserted")
                await self._client.feedback(told)
        except (ServerProblem, TimeoutError, ValueError) as problem:
            log.debug("feedback was lost: %s", problem)

    async def close(self) -> None:
        """Stop looking and close the connections. The daemon goes on."""
        if self._search is not None:
            self._search.cancel()
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    def _look(self, *, is_urgent: bool = False) -> None:
        is_looking = self._search is not None and not self._search.done()
        is_pausing = time.monotonic() < self._next_try_s and not is_urgent
        if is_looking or is_pausing or self.state == "ready":
            return
        self._search = asyncio.get_running_loop().create_task(self._find())

    async def _find(self) -> None:
        self._set("starting", "Looking for the daemon.")
        try:
            found, client = await _in_thread(lambda: _connect(self.may_start))
            self.daemon, self._client = found, client
            self._set("loading", f"The daemon at {found.url} is loading its model.")
            await client.wait_ready(LOAD_WAIT_S)
        except Exception as problem:
            self._forget()
            self._failures += 1
            self._next_try_s = time.monotonic() + self._pause_s()
            remedy = getattr(problem, "remedy", "")
            self._set("failed", f"{str(problem).rstrip('.')}. {remedy}".strip())
            if not remedy:
                log.exception("looking for the daemon failed")
        else:
            self._set("ready", f"The daemon at {found.url} is ready.")

    def _forget(self) -> None:
        client, self._client, self.daemon = self._client, None, None
        if client is not None:
            closing = asyncio.get_running_loop().create_task(client.close())
            closing.add_done_callback(lambda done: done.cancelled() or done.exception())

    def _pause_s(self) -> float:
        return min(FIRST_PAUSE_S * 2.0 ** min(self._failures - 1, 10), LONGEST_PAUSE_S)

    def _set(self, state: State, why: str) -> None:
        is_news = (state, why) != (self.state, self.why)
        self.state, self.why = state, why
        if is_news:
            self._notify(state, why)


def _connect(may_start: bool) -> "tuple[Daemon, AsyncClient]":
    """Return the daemon and a client of it. Blocks; runs on a thread of its own.

    Raises:
        Problem: the settings are wrong, or there is no daemon and none could be started.
    """
    import httpx  # noqa: F401  # the client imports it late; here nobody waits

    from infilld.server import discovery, settings
    from infilld.server.client import AsyncClient

    chosen = settings.load()
    if may_start:
        found: Daemon | None = discovery.ensure(chosen, START_WAIT_S)
    else:
        found = discovery.find(chosen)
    if found is None:
        raise discovery.DaemonProblem("No daemon runs.", remedy="Start it with: infilld serve")
    return found, AsyncClient(found.url, found.token)


def _in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Run `function` on a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(act: Callable[[], None]) -> None:
        if not future.done():
            act()

    def work() -> None:
        try:
            act = partial(future.set_result, function())
        except BaseException as problem:
            act = partial(future.set_exception, problem)
        # A closed loop means that nobody waits any more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, act)

    threading.Thread(target=work, name="infilld-link", daemon=True).start()
    return future
