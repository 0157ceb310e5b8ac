"""The verbs that run the daemon: `serve`, `stop`."""

import argparse
import os
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

from infilld.server import discovery
from infilld.server.client import Client, ServerProblem
from infilld.server.process import logs
from infilld.server.settings import Settings, SettingsProblem
from infilld.server.verbs import models
from infilld.server.verbs.flags import above_zero, warn_of_vain_flags

if TYPE_CHECKING:
    from infilld.server.jobs import Worker

START_WAIT_S = 60.0
# Only what is used of it takes memory.
_STACK_BYTES = 16 << 20
LOAD_WAIT_S = 600.0


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve`."""
    parser.add_argument(
        "--detach", action="store_true", help="start it in the background, and return once it runs"
    )
    parser.add_argument(
        "--wait",
        type=above_zero(86_400),
        nargs="?",
        const=LOAD_WAIT_S,
        metavar="SECONDS",
        help=f"with --detach: until the model is loaded, {LOAD_WAIT_S:g} s at most unless told",
    )


def serve(options: argparse.Namespace, wanted: Settings) -> int:
    """Run the daemon here, or start it in the background; returns the exit code.

    Raises:
        SettingsProblem: flags that do not go together.
        DaemonProblem: it cannot be started.
        ServerProblem: the model could not be loaded, or not in time.
    """
    if options.detach:
        warn_of_vain_flags(options, wanted)
        return _detach(wanted, options.wait)
    if options.wait is not None:
        raise SettingsProblem("--wait needs --detach", remedy="infilld serve --detach --wait")
    import faulthandler

    logs.to_stderr(wanted)
    faulthandler.enable()
    give_threads_room()
    wait_passively()
    from infilld.server.process import daemon

    daemon.serve(wanted, make_worker, on_held=partial(logs.to_file, wanted))
    return 0


def stop(options: argparse.Namespace, wanted: Settings) -> int:
    """Stop the daemon; returns the exit code."""
    was_running = discovery.stop(wanted)
    sys.stdout.write("stopped\n" if was_running else "no daemon was running\n")
    return 0


def make_worker(wanted: Settings) -> "Worker":
    """The engine that the settings ask for."""
    if wanted.engine_url is None:
        return _local(wanted)
    from infilld.server import remote

    return remote.make_worker(wanted, _local)


def give_threads_room() -> None:
    """Give the threads that are made from now on the stack that deep grammars take to compile.

    The system's own choice may be far less: 512 KiB on macOS, 2 MiB where the shell sets no limit.
    """
    threading.stack_size(_STACK_BYTES)


def wait_passively() -> None:
    """Have threads of products wait asleep; counts only before torch is loaded."""
    for name, value in discovery.WAITING.items():
        os.environ.setdefault(name, value)


def _local(wanted: Settings) -> "Worker":
    from infilld.engine.worker import Worker

    return Worker(
        wanted.model_folder,
        device=wanted.device,
        idle_unload_minutes=wanted.idle_unload_minutes,
        limits=models.limits_of(wanted),
    )


def _detach(wanted: Settings, wait_s: float | None) -> int:
    before = discovery.find(wanted)
    found = before or discovery.ensure(wanted, START_WAIT_S)
    said = "a daemon runs already" if before else "started"
    sys.stdout.write(f"{said}: {found.url} (pid {found.pid})\n")
    sys.stdout.flush()
    if wait_s is not None:
        try:
            with Client(found.url, found.token) as client:
                client.wait_ready(wait_s)
                sys.stdout.write(f"{client.models()[0]['id']} is loaded\n")
        except ServerProblem as problem:
            if before is None and problem.code == "model_error":
                # What can serve nobody must not stand in the way of the next try.
                discovery.stop(wanted)
                problem.remedy = "It was ended again; `infilld logs` says what to do."
            raise
    return 0
