"""Whether the remote engine answers: asked now and then, and at once when a request fails."""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass

from infilld.engine.errors import InfilldError, Unavailable
from infilld.server.remote.faults import KeyRefused, Unreachable, down, key_refused
from infilld.server.remote.service import Model, Service

log = logging.getLogger(__name__)

AUTO = "auto"
# Of its models so many are named in an error.
_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds between looks: while it is well; while it is not, the first and the longest pause.

    `patience_s` is how long a look may take. `doubt_s`: who waits so long has it looked at.
    """

    well_s: float = 30.0
    first_s: float = 1.0
    most_s: float = 30.0
    patience_s: float = 10.0
    doubt_s: float = 5.0


class Health:
    """What is known of a service; written on its event loop, read from anywhere.

    Args:
        service: it is of. url: for people. wanted: name of a model, or `AUTO`: its first.
        pace: of looking.

    Attributes:
        is_up: requests are answered; None: nobody has looked yet.
        problem: why they are not. model: that answers; the last one known while it is down.
        recovered: how often it came back. looks: how often it was looked at.
    """

    def __init__(self, service: Service, url: str, wanted: str, pace: Pace) -> None:
        self.is_up: bool | None = None
        self.problem: InfilldError | None = None
        self.model: Model | None = None if wanted == AUTO else Model(wanted)
        self.recovered = self.failed = 0
        self.up_since = 0.0
        self._service, self._url, self._wanted, self._pace = service, url, wanted, pace
        self._wake, self._went_down = asyncio.Event(), asyncio.Event()
        self._pause_s = pace.first_s
        self._looked_at = 0.0

    async def watch(self) -> None:
        """Look for ever."""
        while True:
            # Cleared before looking: what fails meanwhile has it looked at again.
            self._wake.clear()
            await self.look()
            pause_s = self._pace.well_s if self.is_up else self._pause_s
            if not self.is_up:
                self._pause_s = min(2 * self._pause_s, self._pace.most_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._wake.wait()

    def suspect(self, problem: InfilldError) -> None:
        """A request found it down."""
        self._set_down(problem)
        self._pause_s = self._pace.first_s
        self._wake.set()

    def hurry(self) -> None:
        """Somebody asks while it is down: look soon, though not at every request."""
        if not self.is_up and time.monotonic() - self._looked_at >= self._pace.first_s:
            self._wake.set()

    def doubt(self) -> None:
        """A request waits in vain: look, though not again at once."""
        if time.monotonic() - self._looked_at >= self._pace.patience_s:
            self._wake.set()

    async def gone(self) -> None:
        """Wait until it is found to be down, and have it looked at: it may hang."""
        while not self._went_down.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._pace.doubt_s):
                    await self._went_down.wait()
            self.doubt()

    async def look(self) -> None:
        """Look once."""
        self._looked_at = time.monotonic()
        try:
            async with asyncio.timeout(self._pace.patience_s):
                model = self._chosen(await self._service.models(self._pace.patience_s))
        except TimeoutError:
            self._set_down(down(self._url, "/v1/models takes too long"))
        except Unreachable as error:
            self._set_down(down(self._url, str(error)))
        except KeyRefused:
            self._set_down(key_refused(self._url))
        except InfilldError as error:
            self._set_down(error)
        else:
            self._set_up(model)

    def _chosen(self, models: list[Model]) -> Model:
        """The model to ask."""
        if not models:
            if self._wanted == AUTO:
                raise Unavailable(
                    f"the remote engine at {self._url} names no model",
                    remedy="Set `engine_model` to the name of its model.",
                )
            return Model(self._wanted)
        found = next(
            (each for each in models if self._wanted in (AUTO, each.name)),
            None,
        )
        if found is None:
            names = ", ".join(each.name[:80] for each in models[:_NAMED])
            raise Unavailable(
                f"the remote engine at {self._url} has no model {self._wanted!r}, but {names}",
                remedy="Set `engine_model` to one of these, or to auto.",
            )
        if not found.is_ready:
            raise down(self._url, "its model is not loaded yet")
        return found

    def _set_up(self, model: Model) -> None:
        if not self.is_up:
            self.recovered += self.is_up is False
            self.up_since = time.monotonic()
            log.info("the remote engine at %s answers with %s", self._url, model.name)
        self.is_up, self.problem, self.model = True, None, model
        self._went_down.clear()
        self._pause_s = self._pace.first_s

    def _set_down(self, problem: InfilldError) -> None:
        if self.is_up is not False:
            self.failed += 1
            log.warning("%s", problem)
        self.is_up, self.problem = False, problem
        self._went_down.set()
