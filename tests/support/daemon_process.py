"""The real daemon, over a fake worker, in a process of its own."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

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
