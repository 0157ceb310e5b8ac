"""The model that is configured: its line in the configuration, and the daemon that runs."""

import json
import re
import sys
import time

from infilld.server import discovery, settings
from infilld.server.client import Client, ServerProblem
from infilld.server.process import files
from infilld.server.settings import Problem, Settings

SWITCH_WAIT_S = 900.0
_POLL_S = 0.1
_UNDER_WAY = ("switching", "loading")
_MODEL_LINE = re.compile(r"^[ \t]*model[ \t]*=.*$", re.MULTILINE)
_FIRST_TABLE = re.compile(r"^[ \t]*\[", re.MULTILINE)


def choose(model: str, wanted: Settings, *, is_live: bool) -> None:
    """Configure a model, and have the daemon that runs switch to it first.

    Args:
        model: absolute path of a checkpoint that can be used, or the starter's name.
        wanted: the settings. is_live: a daemon that runs is to switch now.

    Raises:
        Problem: the daemon could not load it, and the configuration stays as it is; or the
            configuration cannot be written.
        ServerProblem: the daemon refused, or went away.
    """
    found = discovery.find(wanted) if is_live else None
    is_switched = found is not None and _switch(found, model)
    path = settings.config_folder() / "config.toml"
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        files.put(path, with_model(old, model).encode())
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror}") from error
    sys.stdout.write(f"model = {model} in {path}\n")
    if is_switched:
        sys.stdout.write("The running daemon has loaded it.\n")
    elif discovery.running_pid(wanted) is not None:
        sys.stdout.write("The running daemon keeps its model until: infilld stop\n")


def with_model(toml: str, model: str) -> str:
    """A configuration with another `model`, the rest as it was."""
    # JSON's escapes are TOML's, except for DEL, which TOML wants escaped.
    line = f"model = {json.dumps(model, ensure_ascii=False)}".replace("\x7f", "\\u007f")
    tables = _FIRST_TABLE.search(toml)
    top = toml[: tables.start()] if tables else toml
    rest = toml[len(top) :]
    if _MODEL_LINE.search(top):
        return _MODEL_LINE.sub(lambda _: line, top, count=1) + rest
    return f"{line}\n{top}{rest}"


def _switch(found: discovery.Daemon, model: str) -> bool:
    """Have the daemon load it, and wait; False: this daemon has no choice of models."""
    with Client(found.url, found.token) as client:
        try:
            client.switch(model)
        except ServerProblem as refusal:
            # One that runs a remote engine, or that is older than this route.
            if refusal.code == "unsupported" or refusal.status == 404:
                return False
            raise
        entry = _wait(client, model)
    failure = entry.get("switch_failure")
    if failure:
        raise Problem(
            f"the daemon could not load {model}: {failure}",
            remedy="The old model stays, in the daemon and in the configuration.",
        )
    return True


def _wait(client: Client, model: str) -> dict[str, object]:
    """The daemon's word on its model once that is loaded, with a line on how long it takes."""
    begun, is_terminal = time.monotonic(), sys.stderr.isatty()
    if not is_terminal:
        sys.stderr.write(f"loading {model}\n")
    while (entry := client.models()[0]).get("state") in _UNDER_WAY:
        waited_s = time.monotonic() - begun
        if waited_s > SWITCH_WAIT_S:
            raise Problem(
                f"{model} was not loaded after {SWITCH_WAIT_S:g} s",
                remedy="The daemon goes on: look into infilld status.",
            )
        if is_terminal:
            sys.stderr.write(f"\rloading {model}: {waited_s:.0f} s")
            sys.stderr.flush()
        time.sleep(_POLL_S)
    if is_terminal:
        sys.stderr.write("\r\x1b[K")
    return entry
