"""Streams of texts that are sent when they are finished, for dialects that can only append."""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

from fastapi import Request

from infilld.engine.errors import InfilldError
from infilld.engine.request import InfillRequest
from infilld.server.compat.asking import Answered, Asked, shaped, wanted_of
from infilld.server.http import problems, sse
from infilld.server.http.answering import Stream
from infilld.server.jobs import Jobs

log = logging.getLogger(__name__)


def streamed(
    jobs: Jobs,
    asked: Sequence[Asked],
    request: Request,
    *,
    write: Callable[[int, Answered], Iterable[bytes]],
    end: Callable[[list[Answered]], Iterable[bytes]],
) -> Stream:
    """Answer gaps one after another, each as soon as its text is final.

    Args:
        jobs: over the engine. asked: the gaps. request: of the client.
        write: frames of the answer to the gap of this number. end: frames behind all of them.

    Raises:
        InfilldError: the first gap could not be submitted; later errors are frames.
    """
    path = request.url.path
    wanted = [wanted_of(jobs, each) for each in asked]
    first = jobs.submit(wanted[0], route=path, with_updates=False)

    async def result(number: int, want: InfillRequest) -> Answered:
        job = first if number == 0 else jobs.submit(want, route=path, with_updates=False)
        try:
            return shaped(asked[number], want, await job.result())
        finally:
            jobs.finish(job)

    async def chunks() -> AsyncIterator[bytes]:
        answers = []
        try:
            for number, want in enumerate(wanted):
                answers.append(await result(number, want))
                for frame in write(number, answers[-1]):
                    yield frame
            for frame in end(answers):
                yield frame
        except InfilldError as error:
            yield sse.unnamed(problems.with_remedy(problems.body_of(error)))
        except Exception:
            log.exception("a stream of %s failed", path)
            yield sse.unnamed(problems.with_remedy(problems.INTERNAL))

    return Stream(jobs, first, chunks())
