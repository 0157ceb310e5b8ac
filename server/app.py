"""The application: routes over one worker, behind the guard."""

import asyncio
import threading
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from infilld.server import health, native, openapi, problems
from infilld.server.bodies import Limits
from infilld.server.guard import Guard
from infilld.server.jobs import Jobs, Worker
from infilld.server.token import TokenFile

CLOSE_WAIT_S = 5.0


def create_app(
    worker: Worker,
    *,
    token: TokenFile | str | None,
    allowed_hosts: Collection[str] = (),
    limits: Limits | None = None,
) -> FastAPI:
    """The application over a worker, which it starts and closes.

    `token`, `allowed_hosts` and `limits` are those of `Guard`. `app.state.jobs` are the live jobs.
    """
    jobs = Jobs(worker)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            jobs.cancel_all()
            await _close(worker)

    app = FastAPI(
        title="infilld",
        version=version("infilld"),
        lifespan=lifespan,
        # Their pages load scripts from the network; /openapi.json stays.
        docs_url=None,
        redoc_url=None,
    )
    app.state.jobs = jobs
    problems.install(app)
    openapi.install(app)
    app.include_router(native.router(jobs))
    app.include_router(health.router(jobs))
    app.add_middleware(Guard, token=token, allowed_hosts=allowed_hosts, limits=limits)
    return app


async def _close(worker: Worker) -> None:
    """Close the worker, but let no long load keep the daemon from ending."""
    closing = threading.Thread(target=worker.close, daemon=True)
    closing.start()
    await asyncio.to_thread(closing.join, CLOSE_WAIT_S)
