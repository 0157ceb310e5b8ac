"""What `infilld doctor` says of a remote engine."""

import asyncio
import logging

from infilld.server.remote.health import Health, Pace
from infilld.server.remote.service import Service
from infilld.server.settings import Settings


def checked(settings: Settings) -> str:
    """Address, model and key of a remote engine that answers, in one line.

    Raises:
        InfilldError: it does not, and why.
    """
    return asyncio.run(_checked(settings))


async def _checked(settings: Settings) -> str:
    assert settings.engine_url is not None, "the engine is a remote one"
    # What is wrong is a line of the report; without a handler Python would write it above, too.
    logging.getLogger("infilld").addHandler(logging.NullHandler())
    service = Service(settings.engine_url, settings.engine_key_file)
    try:
        health = Health(service, settings.engine_url, settings.engine_model, Pace(patience_s=5.0))
        await health.look()
    finally:
        await service.close()
    if health.problem is not None:
        raise health.problem
    assert health.model is not None, "what answers has a model"
    says = [f"{health.model.name} at {settings.engine_url}"]
    if health.model.context_tokens:
        says.append(f"{health.model.context_tokens} tokens of context")
    key = settings.engine_key_file
    says.append("no key is sent" if key is None else f"the key in {key}")
    if key is not None and key.stat().st_mode & 0o077:
        says.append(f"which others may read: chmod 600 {key}")
    says.append("fails over to the local model" if settings.fail_over else "nobody to fail over to")
    return ", ".join(says)
