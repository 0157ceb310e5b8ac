"""Who answers a job: the service, the service once more, or the local model."""

import asyncio
from collections.abc import Callable

from infilld.engine.conversation import ChatRequest
from infilld.engine.errors import InfilldError
from infilld.engine.scheduler import AnyJob, AnyResult, OnCanvas
from infilld.server.remote.asking import Remote
from infilld.server.remote.faults import KeyRefused, Unreachable, down, key_refused
from infilld.server.remote.forwarding import Forwarding
from infilld.server.remote.health import Health
from infilld.server.remote.infilling import Infilling
from infilld.server.remote.standby import Standby
from infilld.server.remote.talking import Talking
from infilld.server.remote.telling import Telling

_ATTEMPTS = 2

_Work = Forwarding | Infilling | Talking


class Route:
    """The way of jobs to their answers; used on one event loop.

    Args:
        remote: is asked while `health` says that it answers. standby: answers else; None: nobody.
        count: is told `remote`, `local` or `retries`.
    """

    def __init__(
        self,
        remote: Remote,
        health: Health,
        standby: Standby | None,
        count: Callable[[str], None],
    ) -> None:
        self._remote, self._health, self._standby = remote, health, standby
        self._count = count

    async def answer(self, job: AnyJob, known_as: Callable[[str], None]) -> AnyResult:
        """The answer of whoever gives one.

        Args:
            job: that has begun. known_as: gets the local model's id of it.

        Raises:
            InfilldError: it cannot be served, or nobody answers. TimeoutError: the deadline
            struck before the local model was loaded.
        """
        problem = self._health.problem
        telling = None if job.on_canvas is None else Telling(job.on_canvas)
        for attempt in range(_ATTEMPTS):
            if not self._health.is_up:
                break
            found = await self._attempted(job, telling, is_last=attempt + 1 == _ATTEMPTS)
            if not isinstance(found, _Failed):
                self._count("remote")
                return found
            problem = found.problem
            if telling is not None:
                telling.begin_anew()
            if found.is_final:
                raise problem
            if not found.may_retry:
                break
            self._count("retries")
        if self._standby is None:
            raise problem or down(self._remote.url, "it went away")
        result = await self._standby.answer(job, telling, known_as)
        self._count("local")
        return result

    async def _attempted(
        self, job: AnyJob, on_canvas: OnCanvas | None, *, is_last: bool
    ) -> "AnyResult | _Failed":
        """Ask the service; what comes of it is known of its health, too."""
        work = self._begun(job, on_canvas)
        url = self._remote.url
        try:
            result = await self._unless_gone(work)
        except KeyRefused:
            problem = key_refused(url)
            self._health.suspect(problem)
            return _Failed(problem, may_retry=False)
        except Unreachable as error:
            problem = down(url, str(error))
            may_retry = error.may_retry and not is_last
            if error.is_down and not may_retry:
                self._health.suspect(problem)
            # A text that somebody reads already is not taken back.
            is_final = isinstance(work, Talking) and work.has_spoken
            return _Failed(problem, may_retry=may_retry, is_final=is_final)
        if result is None:
            return _Failed(self._health.problem or down(url, "it went away"), may_retry=False)
        if result.reason == "deadline":
            self._health.doubt()
        return result

    async def _unless_gone(self, work: _Work) -> AnyResult | None:
        """The answer; None: the service is found to be down, and the local model can answer."""
        if self._standby is None:
            return await work.answer()
        answer: asyncio.Future[AnyResult] = asyncio.ensure_future(work.answer())
        gone = asyncio.ensure_future(self._health.gone())
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not (isinstance(work, Talking) and work.has_spoken):
                return None
            return await answer
        finally:
            answer.cancel()
            gone.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    def _begun(self, job: AnyJob, on_canvas: OnCanvas | None) -> _Work:
        request = job.request
        if isinstance(request, ChatRequest):
            return Talking(self._remote, request, job.id, job.deadline_at, on_canvas)
        # Its own route has no grammars.
        if self._remote.is_infilld and request.grammar is None:
            return Forwarding(self._remote, request, job.id, job.deadline_at, on_canvas)
        return Infilling(self._remote, request, job.id, job.deadline_at, on_canvas)


class _Failed:
    """An attempt without an answer.

    Args:
        problem: why. may_retry: another attempt may help. is_final: nobody else may answer.
    """

    def __init__(self, problem: InfilldError, *, may_retry: bool, is_final: bool = False) -> None:
        self.problem, self.may_retry, self.is_final = problem, may_retry, is_final
