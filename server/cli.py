"""The verbs of `infilld`.

Only the verbs that run a model import torch, and only when they run.
"""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from infilld.server import discovery, evaluate, fill, models, settings, token, train
from infilld.server.client import Client, ServerProblem
from infilld.server.document import PositionProblem
from infilld.server.flags import MANY, whole
from infilld.server.settings import Problem, Settings, SettingsProblem

DONE, FAILED, BAD_USAGE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns 0 done, 1 failed, 2 bad usage, 3 no suggestion."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["lsp"]:
        _become_bridge(words[1:])
    try:
        options = _parser(words).parse_args(words)
        code: int = options.run(options, _settings(options))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has left, and must not find a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from infilld.engine.errors import InfilldError

        if not isinstance(error, (Problem, ServerProblem, InfilldError)):
            raise
        sys.stderr.write(f"infilld: {error}\n" + (f"  {error.remedy}\n" if error.remedy else ""))
        is_usage = isinstance(error, (fill.UsageProblem, PositionProblem, SettingsProblem))
        return BAD_USAGE if is_usage else FAILED
    return code


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="infilld", description="Code infilling on your own machine.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"infilld {version('infilld')}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[..., int], help_text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        made.set_defaults(run=run)
        _add_settings(made)
        return made

    fill.add_flags(verb("fill", fill.run, "fill gaps, rewrite or repair selections"))
    verb("serve", _serve, "run the daemon in the foreground")
    verb("stop", _stop, "stop the daemon")
    token.add_flags(verb("token", token.run, "say where the token is, print it, or change it"))
    _add_json(verb("status", _status, "say whether the daemon runs"))
    logs = verb("logs", _logs, "print the end of the daemon's log")
    logs.add_argument(
        "-n", "--lines", type=whole(0, MANY), default=100, metavar="N", help="how many lines"
    )
    # Only listed here: main has handled it already.
    verbs.add_parser("lsp", help="the bridge for editors, on stdin and stdout")
    models.add_flags(verb("models", models.run, "what is configured, what a checkpoint holds"))
    _add_json(verb("doctor", _doctor, "check this machine"))
    bench = verb("bench", _bench, "measure encode, pass and infill times")
    bench.add_argument(
        "--repeats", type=whole(1, MANY), default=15, metavar="N", help="runs of each measurement"
    )
    bench.add_argument(
        "--load",
        type=whole(0, MANY),
        default=0,
        metavar="SECONDS",
        help="also let 1, 4 and 8 clients ask at once, so long for each figure",
    )
    bench.add_argument(
        "--compare", action="store_true", help="also time transformers on the same checkpoint"
    )
    bench.add_argument(
        "--busy", action="store_true", help="also time passes while another process is busy"
    )
    _add_json(bench)
    evaluate.add_flags(verb("eval", _eval, "measure how good the model is"))
    train.add_flags(verb("train", _train, "make a starter model from source code"))
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings", "override the environment and config.toml")
    for name, text in settings.HELP.items():
        group.add_argument(f"--{name.replace('_', '-')}", help=text, metavar="X")


def _settings(options: argparse.Namespace) -> Settings:
    return settings.load({name: getattr(options, name, None) for name in settings.KEYS})


def _become_bridge(words: Sequence[str]) -> None:
    os.execv(sys.executable, [sys.executable, "-P", "-m", "infilld.lsp", *words])


def _serve(options: argparse.Namespace, wanted: Settings) -> int:
    import logging

    logging.basicConfig(
        level=wanted.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    _wait_passively()
    from infilld.server import daemon

    daemon.serve(wanted, _make_worker)
    return DONE


def _make_worker(wanted: Settings) -> Any:
    from infilld.engine.worker import Worker

    return Worker(
        wanted.model_folder,
        device=wanted.device,
        idle_unload_minutes=wanted.idle_unload_minutes,
        limits=models.limits_of(wanted),
    )


def _wait_passively() -> None:
    # Read when torch is loaded.
    for name, value in discovery.WAITING.items():
        os.environ.setdefault(name, value)


def _stop(options: argparse.Namespace, wanted: Settings) -> int:
    was_running = discovery.stop(wanted)
    sys.stdout.write("stopped\n" if was_running else "no daemon was running\n")
    return DONE


def _status(options: argparse.Namespace, wanted: Settings) -> int:
    told = _told(wanted)
    if options.json:
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        for name, value in told.items():
            sys.stdout.write(f"{name:<12}{'-' if value is None else value}\n")
    return DONE


def _told(wanted: Settings) -> dict[str, object]:
    """What `status` prints; model and device are those configured until a daemon says its own."""
    told: dict[str, object] = {
        "state": "stopped",
        "pid": discovery.running_pid(wanted),
        "url": None,
        "token_file": str(wanted.token_file),
        "model": wanted.model,
        "device": wanted.device,
        "loaded": False,
    }
    found = discovery.find(wanted)
    if found is None:
        return told | {"state": "starting"} if told["pid"] is not None else told
    with Client(found.url, found.token, timeout_s=5.0) as client:
        entry = client.models()[0]
        # Ready is also a daemon that has to load its model again first.
        is_loaded = client.health().state == "ready" and entry.get("state") != "unloaded"
    return told | {
        "state": "running",
        "pid": found.pid,
        "url": found.url,
        "model": entry["model"],
        "device": entry.get("device", wanted.device),
        "loaded": is_loaded,
    }


def _logs(options: argparse.Namespace, wanted: Settings) -> int:
    try:
        with wanted.log_file.open(encoding="utf-8", errors="replace") as log:
            sys.stdout.writelines(deque(log, maxlen=options.lines))
    except FileNotFoundError:
        sys.stderr.write(f"infilld: no log at {wanted.log_file}\n")
    return DONE


def _doctor(options: argparse.Namespace, wanted: Settings) -> int:
    from infilld.server import doctor

    return doctor.run(wanted, as_json=options.json)


def _train(options: argparse.Namespace, wanted: Settings) -> int:
    _wait_passively()
    return train.run(options, wanted)


def _eval(options: argparse.Namespace, wanted: Settings) -> int:
    _wait_passively()
    return evaluate.run(options, wanted)


def _bench(options: argparse.Namespace, wanted: Settings) -> int:
    _wait_passively()
    from infilld.engine.bench import format_bench, run_bench
    from infilld.engine.worker import starter_folder

    folder = wanted.model_folder or starter_folder()
    report = run_bench(
        folder,
        wanted.device,
        repeats=options.repeats,
        load_s=options.load,
        compares=options.compare,
        is_busy=options.busy,
    )
    sys.stdout.write(
        (json.dumps(report, indent=2) if options.json else format_bench(report)) + "\n"
    )
    return DONE
