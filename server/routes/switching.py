"""Another model without a restart."""

import os
from pathlib import Path

from fastapi import APIRouter

from infilld.engine.errors import UnknownOption
from infilld.server import wire
from infilld.server.http.problems import short
from infilld.server.jobs import Jobs
from infilld.server.settings import STARTER


def router(jobs: Jobs) -> APIRouter:
    """The route over one engine."""
    routes = APIRouter()

    @routes.post("/v1/model", status_code=202, response_model=wire.SwitchReply)
    async def switch(asked: wire.SwitchRequest) -> wire.SwitchReply:
        """Load another checkpoint in place of this one; answers before that is done.

        Running requests end first, new ones wait for the new model. Where it cannot be loaded, the
        old one comes back, and `switch_failure` of `GET /v1/models` says why.
        """
        folder = None if asked.model == STARTER else Path(asked.model)
        if folder is not None and (not folder.is_absolute() or "\0" in asked.model):
            raise UnknownOption(
                "model is no absolute path",
                remedy=f'Give the absolute path of a checkpoint folder, or "{STARTER}".',
            )
        if folder is not None and not os.path.exists(folder):
            raise UnknownOption(
                f"there is no {short(asked.model)}",
                remedy="Give a folder with config.json, or a GGUF file, of this machine.",
            )
        jobs.worker.switch(folder)
        told = jobs.worker.describe()
        return wire.SwitchReply(model=str(told["model"]), state=str(told["state"]))

    return routes
