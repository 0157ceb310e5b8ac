"""The application: routes over one worker, behind the guard."""

import asyncio
import threading
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from infilld.server.compat import (
    chat,
    llamacpp,
    mercury,
    mistral,
    ollama,
    ollama_models,
    openai,
)
from infilld.server.http import openapi, problems
from infilld.server.http.bodies import Limits
from infilld.server.http.guard import Guard
from infilld.server.jobs import Jobs, Worker
from infilld.server.keeping.metrics import Metrics
from infilld.server.keeping.outcomes import Records
from infilld.server.keeping.recent import Recent
from infilld.server.keeping.statistics import Statistics
from infilld.server.page import page
from infilld.server.process.token import TokenFile
from infilld.server.routes import health, native, reports, switching

CLOSE_WAIT_S = 0.5


def create_app(
    worker: Worker,
    *,
    token: TokenFile | str | None,
    statistics: Statistics | None = None,
    allowed_hosts: Collection[str] = (),
    limits: Limits | None = None,
    log_prompts: bool = False,
) -> FastAPI:
    """The application over a worker, which it starts and closes.

    `token`, `allowed_hosts` and `limits` are those of `Guard`, `log_prompts` that of `Jobs`.
    `statistics` are begun and closed with it; None: none are kept. `app.state.jobs` are the live
    jobs.
    """
    last, counted = Recent(), Metrics()
    kept = [] if statistics is None else [statistics]
    jobs = Jobs(worker, Records([last, counted, *kept]), log_prompts=log_prompts)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        for each in kept:
            each.start()
        try:
            yield
        finally:
            jobs.cancel_all()
            await _close(worker)
            for each in kept:
                await asyncio.to_thread(each.close)

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
    app.include_router(page.router())
    for dialect in (openai, mistral, mercury, chat, llamacpp, ollama, ollama_models):
        app.include_router(dialect.router(jobs))
    app.include_router(reports.router(jobs, counted, last, statistics))
    app.include_router(switching.router(jobs))
    app.add_middleware(Guard, token=token, allowed_hosts=allowed_hosts, limits=limits)
    return app


async def _close(worker: Worker) -> None:
    """Close the worker, but let no long load keep the daemon from ending."""
    closing = threading.Thread(target=worker.close, daemon=True)
    closing.start()
    await asyncio.to_thread(closing.join, CLOSE_WAIT_S)
