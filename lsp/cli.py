"""The command `infilld-lsp`: the bridge on standard input and output."""

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from infilld.server.settings import LOG_LEVELS, Settings, SettingsProblem, load

_LOG_LIMIT_BYTES = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the bridge until the editor is done with it; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="infilld-lsp", description="Language server of infilld; an editor starts it."
    )
    parser.add_argument("--version", action="version", version=f"infilld {version('infilld')}")
    parser.add_argument(
        "--stdio", action="store_true", help="the only transport, accepted because editors add it"
    )
    parser.add_argument(
        "--log-level",
        choices=LOG_LEVELS,
        help="debug also logs every message, with the text of your documents",
    )
    chosen = parser.parse_args(arguments)
    try:
        settings = load({"log_level": chosen.log_level})
    except SettingsProblem as problem:
        # The link to the daemon meets the same problem and tells the editor.
        sys.stderr.write(f"infilld-lsp: {problem} {problem.remedy}\n")
        settings = Settings(log_level=chosen.log_level or "info")
    if sys.stdin.isatty():
        sys.stderr.write("infilld-lsp speaks LSP on its pipes and is started by an editor.\n")
    _log_to(settings.state_dir / "lsp.log", settings.log_level)
    return _run(_take_stdout())


def _run(output: BinaryIO) -> int:
    # What is imported here stays for good; looking for garbage meanwhile costs 30 of 500 ms.
    gc.disable()
    from infilld.lsp.server import create_server

    server = create_server()
    gc.freeze()
    gc.enable()
    server.start_io(sys.stdin.buffer, output)
    # The protocol asks for 1 when the editor left without a shutdown request.
    return 0 if server.protocol.is_shut_down else 1


def _take_stdout() -> BinaryIO:
    """Return standard output for the protocol alone; what is printed goes to standard error."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return output


def _log_to(path: Path, level: str) -> None:
    """Send the log to a file, to standard error when it cannot be written."""
    handler: logging.Handler
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LOG_LIMIT_BYTES:
            path.replace(path.with_suffix(".log.1"))
        handler = logging.FileHandler(path, encoding="utf-8", delay=False)
        path.chmod(0o600)
    except OSError as error:
        handler = logging.StreamHandler(sys.stderr)
        sys.stderr.write(f"infilld-lsp: cannot write {path}: {error.strerror}\n")
    logging.basicConfig(
        level=level.upper(),
        handlers=[handler],
        format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s",
    )
    if level != "debug":
        # pygls logs whole messages, document text included; what matters is logged by us.
        logging.getLogger("pygls").setLevel(logging.CRITICAL)
        logging.getLogger("httpx").setLevel(logging.WARNING)
