"""What a remote engine's worker says of itself: who answers now, and where."""

from infilld.server.jobs import Worker
from infilld.server.remote.asking import MAX_LIVE
from infilld.server.remote.health import Health
from infilld.server.settings import Settings


def described(
    settings: Settings, state: str, health: Health | None, local: Worker | None
) -> dict[str, object]:
    """As `Worker.describe`, and `engine` (`remote` or `local`), `url`, `reachable`, `problem`.

    Args:
        settings: of the daemon. state: of the worker. health: of the service, once it is known.
        local: the model to fall back on, once it is made.
    """
    model = None if health is None else health.model
    problem = None if health is None else health.problem
    told: dict[str, object] = {
        "model": settings.engine_model if model is None else model.name,
        "folder": None,
        "device": "remote",
        # It does not say; an instruction is what it is asked with.
        "dtype": "",
        "parameters": 0,
        "memory_bytes": 0,
        "canvas_tokens": 0,
        "prompt_tokens": 0 if model is None else model.context_tokens,
        "max_live": MAX_LIVE,
        "follows_instructions": True,
        "thinks": True,
    }
    is_local = settings.fail_over and health is not None and health.is_up is False
    if is_local and local is not None:
        told = local.describe()
    elif is_local:
        told |= {"model": settings.model, "device": settings.device}
    return told | {
        "state": state,
        "engine": "local" if is_local else "remote",
        "url": settings.engine_url,
        "reachable": health is not None and health.is_up is True,
        "problem": None if problem is None else str(problem),
    }
