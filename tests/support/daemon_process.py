"""The real daemon, over a fake worker, in a process of its own."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from infilld.server import discovery
from infilld.server.settings import Settings

FAKE = Path(__file__).with_name("fake_daemon.py")

# A busy machine takes many seconds to import what a daemon needs.
WAIT_S = 120.0


@contextmanager
def foreground(
    settings: Settings, *more: str, environ: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A daemon in a process of ours, once it listens."""
    words = [sys.executable, str(FAKE), *settings.flags(), *more]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ
    ) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == "listening\n", child.communicate()
            yield child
        finally:
            child.kill()
            child.communicate()


_NURSERY = """
import os, signal, sys
import fake_daemon
import infilld.server.app, infilld.server.keeping.statistics
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in sys.stdin:
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os._exit(fake_daemon.main())
"""


@contextmanager
def nursery(settings: Settings) -> Iterator[Callable[[], discovery.Daemon]]:
    """What starts a daemon in a process of its own each time, without the imports' seconds."""
    words = [sys.executable, "-c", _NURSERY, *settings.flags()]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        stdin, stdout = parent.stdin, parent.stdout

        def bear() -> discovery.Daemon:
            stdin.write("\n")
            assert stdout.readline() == "listening\n"
            found = discovery.find(settings)
            assert found is not None
            return found

        try:
            yield bear
        finally:
            stdin.close()
            discovery.stop(settings, WAIT_S)
            parent.wait(WAIT_S)
