"""The verbs of `infilld`.

Only the verbs that run a model import torch, and only when they run.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version

from infilld.server import settings
from infilld.server.client import ServerProblem
from infilld.server.process import logs, token
from infilld.server.settings import Problem, Settings, SettingsProblem
from infilld.server.verbs import evaluate, fill, models, operate, overview, service, train
from infilld.server.verbs.document import PositionProblem
from infilld.server.verbs.flags import MANY, whole

DONE, FAILED, BAD_USAGE = 0, 1, 2
_SETTING = "VALUE"


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


class _ShortUsage(argparse.HelpFormatter):
    """Leaves the settings out of the usage, which stands above every error; help lists them."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[argparse._MutuallyExclusiveGroup],
        prefix: str | None = None,
    ) -> None:
        """As argparse's own."""
        shown = [each for each in actions if each.metavar != _SETTING]
        super().add_usage(usage, shown, groups, prefix)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="infilld", description="Code infilling on your own machine.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"infilld {version('infilld')}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[..., int], help_text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            help=help_text,
            description=help_text,
            allow_abbrev=False,
            formatter_class=_ShortUsage,
        )
        made.set_defaults(run=run)
        _add_settings(made)
        return made

    fill.add_flags(verb("fill", fill.run, "fill gaps, rewrite or repair selections"))
    operate.add_serve_flags(verb("serve", operate.serve, "run the daemon"))
    verb("stop", operate.stop, "stop the daemon")
    token.add_flags(verb("token", token.run, "say where the token is, print it, or change it"))
    _add_json(verb("status", overview.status, "say whether the daemon runs"))
    overview.add_why_flags(verb("why", overview.why, "say why the last answers are as they are"))
    _add_json(verb("stats", overview.stats, "print what is kept of answers: counts and times"))
    logs.add_flags(verb("logs", logs.run, "print the end of the daemon's log"))
    service.add_flags(verb("service", service.run, "have the system start the daemon"))
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
        group.add_argument(f"--{name.replace('_', '-')}", help=text, metavar=_SETTING)


def _settings(options: argparse.Namespace) -> Settings:
    return settings.load({name: getattr(options, name, None) for name in settings.KEYS})


def _become_bridge(words: Sequence[str]) -> None:
    os.execv(sys.executable, [sys.executable, "-P", "-m", "infilld.lsp", *words])


def _doctor(options: argparse.Namespace, wanted: Settings) -> int:
    from infilld.server.verbs import doctor

    return doctor.run(wanted, as_json=options.json)


def _train(options: argparse.Namespace, wanted: Settings) -> int:
    operate.wait_passively()
    return train.run(options, wanted)


def _eval(options: argparse.Namespace, wanted: Settings) -> int:
    operate.wait_passively()
    return evaluate.run(options, wanted)


def _bench(options: argparse.Namespace, wanted: Settings) -> int:
    operate.wait_passively()
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
