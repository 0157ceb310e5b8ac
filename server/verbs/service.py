"""`infilld service`: files by which systemd or launchd starts the daemon for this user.

Only files that this wrote are changed or removed. What is still to be done is printed, and done
with `--now` alone.
"""

import argparse
import json
import os
import plistlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from infilld.server import discovery
from infilld.server.process import files
from infilld.server.settings import KEYS, Problem, Settings

Kind = Literal["systemd", "launchd"]
KINDS: Sequence[Kind] = ("systemd", "launchd")
UNIT = "infilld.service"
LABEL = "local.infilld.daemon"
MARK = "Written by infilld service install"
# Where settings and state are found; a service manager does not know the shell's.
_PASSED_ON = ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")
_COMMAND_S = 60.0
_DIFFERS = "installed with other content; it would be"
_INSTEAD = "Run it where your own service manager runs, or without it: infilld serve --detach"


class ServiceProblem(Problem):
    """The service cannot be installed or removed."""

    code = "service"


@dataclass(frozen=True)
class Service:
    """A file for a service manager.

    Attributes:
        kind: of the manager. path: where its file belongs. content: what belongs there.
        start: commands that follow an installation. halt: those before the file is removed.
        end: those after.
    """

    kind: Kind
    path: Path
    content: bytes
    start: Sequence[Sequence[str]]
    halt: Sequence[Sequence[str]]
    end: Sequence[Sequence[str]]

    @property
    def found(self) -> bytes | None:
        """What stands there now."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    @property
    def is_foreign(self) -> bool:
        """Whether somebody else's file stands there."""
        found = self.found
        return found is not None and MARK.encode() not in found


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("action", choices=("install", "uninstall", "show"))
    parser.add_argument("--kind", choices=KINDS, help="of the service manager; this system's")
    parser.add_argument("--now", action="store_true", help="also start it, or stop it, now")
    parser.add_argument("--force", action="store_true", help="also replace a file of another")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, wanted: Settings) -> int:
    """Do it; returns the exit code. Settings given as flags become part of the service.

    Raises:
        ServiceProblem: there is a file of another, it cannot be written, or a command failed.
    """
    given = {name for name in KEYS if getattr(options, name, None) is not None}
    service = service_of(options.kind or _own_kind(), wanted, given)
    try:
        if options.action == "show":
            return _show(service, as_json=options.json)
        if service.is_foreign and not options.force:
            raise ServiceProblem(
                f"{service.path} was not written by infilld", remedy="Replace it with --force."
            )
        if options.action == "install":
            return _install(service, wanted, is_now=options.now, as_json=options.json)
        return _uninstall(service, is_now=options.now, as_json=options.json)
    except OSError as error:
        raise ServiceProblem(f"{service.path}: {error.strerror}") from error


def service_of(kind: Kind, wanted: Settings, given: set[str]) -> Service:
    """The service that starts this interpreter's daemon.

    Args:
        kind: of the manager. wanted: the settings. given: those of them that are to be passed on
            as flags; the others are read from the configuration at every start.
    """
    flags = iter(wanted.flags())
    pairs = [(flag, next(flags)) for flag in flags]
    chosen = [pair for name, pair in zip(KEYS, pairs, strict=True) if name in given]
    words = [*discovery.COMMAND, *(word for pair in chosen for word in pair)]
    environment = {name: os.environ[name] for name in _PASSED_ON if os.environ.get(name)}
    if kind == "systemd":
        _refuse_unsafe(words[0])
        control = ("systemctl", "--user")
        return Service(
            kind,
            _config_home() / "systemd" / "user" / UNIT,
            unit(words, environment).encode(),
            start=((*control, "daemon-reload"), (*control, "enable", "--now", UNIT)),
            halt=((*control, "disable", "--now", UNIT),),
            end=((*control, "daemon-reload"),),
        )
    path = Path.home() / "Library" / "LaunchAgents" / f"{LABEL}.plist"
    domain = f"gui/{os.getuid()}"
    return Service(
        kind,
        path,
        property_list(words, environment, wanted.log_file),
        start=(("launchctl", "bootstrap", domain, str(path)),),
        halt=(("launchctl", "bootout", f"{domain}/{LABEL}"),),
        end=(),
    )


def unit(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """A systemd user unit. Source: systemd.service(5), systemd.exec(5).

    Left out: PrivateDevices and DevicePolicy, which hide the GPU; MemoryDenyWriteExecute, because
    torch and Triton compile; ProtectSystem, PrivateTmp and the like, which need rights that a
    user's manager lacks on many systems.
    """
    # The colon: no $ is replaced in what follows.
    command = " ".join(_quoted(word) for word in (f":{words[0]}", *words[1:]))
    variables = "".join(
        f"Environment={_quoted(f'{name}={value}')}\n" for name, value in environment.items()
    )
    return f"""\
# {MARK}; infilld service uninstall removes it.
[Unit]
Description=infilld, code infilling on this machine
StartLimitIntervalSec=120
StartLimitBurst=5

[Service]
Type=notify
ExecStart={command}
{variables}Restart=on-failure
RestartSec=5
TimeoutStartSec=90
TimeoutStopSec=10
UMask=0077
NoNewPrivileges=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
# A GPU needs its devices: nothing here hides /dev.

[Install]
WantedBy=default.target
"""


def property_list(words: Sequence[str], environment: Mapping[str, str], log_file: Path) -> bytes:
    """A launchd agent. Source: launchd.plist(5)."""
    told: dict[str, object] = {
        "Label": LABEL,
        "ProgramArguments": list(words),
        "RunAtLoad": True,
        # Ended by `infilld stop` it stays ended; after a crash it comes back.
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        # Somebody waits for each answer.
        "ProcessType": "Interactive",
        "Umask": 0o077,
        "StandardOutPath": str(log_file),
        "StandardErrorPath": str(log_file),
    }
    if environment:
        told["EnvironmentVariables"] = dict(environment)
    first, _, rest = plistlib.dumps(told).partition(b"\n")
    return b"%s\n<!-- %s; infilld service uninstall removes it. -->\n%s" % (
        first,
        MARK.encode(),
        rest,
    )


def _refuse_unsafe(program: str) -> None:
    """Refuse what systemd would. Source: systemd's string_is_safe, asked of every program."""
    if any(c in "\"'\\\x7f" or c < " " for c in program):
        raise ServiceProblem(
            f"systemd starts no program with a quote or a backslash in its path: {program!r}",
            remedy="Install infilld into a folder without them.",
        )


def _quoted(word: str) -> str:
    """A word of a unit file. Source: systemd.syntax(7), systemd.unit(5) on specifiers."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + escaped.replace("\t", "\\t").replace("%", "%%") + '"'


def _config_home() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(base) if base.startswith("/") else Path.home() / ".config"


def _own_kind() -> Kind:
    if sys.platform == "darwin":
        return "launchd"
    if sys.platform == "linux":
        return "systemd"
    raise ServiceProblem(
        f"no service manager is known for {sys.platform}",
        remedy="Have `infilld serve` started at login by other means.",
    )


def _show(service: Service, *, as_json: bool) -> int:
    found = service.found
    if as_json:
        told = {
            "kind": service.kind,
            "path": str(service.path),
            "installed": found is not None and not service.is_foreign,
            "current": found == service.content,
            "content": service.content.decode(),
        }
        sys.stdout.write(json.dumps(told) + "\n")
        return 0
    states = {None: "not installed", service.content: "installed"}
    state = "a file of another" if service.is_foreign else states.get(found, _DIFFERS)
    sys.stderr.write(f"{service.path}: {state}\n")
    sys.stdout.write(service.content.decode())
    return 0


def _install(service: Service, wanted: Settings, *, is_now: bool, as_json: bool) -> int:
    is_news = service.found != service.content
    # launchd opens the log before the daemon could make its folder.
    discovery.make_private_folder(wanted.state_dir)
    if is_news:
        service.path.parent.mkdir(parents=True, exist_ok=True)
        files.put(service.path, service.content, mode=0o644)
    if is_now:
        *before, start = service.start
        # Where no manager answers, the daemon that runs is left alone.
        _do(before)
        pid = discovery.running_pid(wanted)
        if pid is not None:
            # Two daemons of one state folder cannot be.
            discovery.stop(wanted)
            sys.stderr.write(f"stopped the daemon that ran (pid {pid})\n")
        _do((start,))
    state = "written" if is_news else "up to date already"
    _say(service, state, () if is_now else service.start, as_json=as_json)
    return 0


def _uninstall(service: Service, *, is_now: bool, as_json: bool) -> int:
    if service.found is None:
        _say(service, "not there", (), as_json=as_json)
        return 0
    if is_now:
        _do(service.halt)
    service.path.unlink()
    # What `enable` made of it, which is of no use without it.
    link = service.path.parent / "default.target.wants" / service.path.name
    if link.is_symlink() and link.readlink() in (service.path, Path("..") / service.path.name):
        link.unlink()
    if is_now:
        _do(service.end)
    # Without its file only a running service is left.
    stop = (("systemctl", "--user", "stop", UNIT),) if service.kind == "systemd" else service.halt
    _say(service, "removed", () if is_now else (*stop, *service.end), as_json=as_json)
    return 0


def _say(service: Service, state: str, left: Sequence[Sequence[str]], *, as_json: bool) -> None:
    lines = [shlex.join(words) for words in left]
    if as_json:
        told = {"kind": service.kind, "path": str(service.path), "state": state, "next": lines}
        sys.stdout.write(json.dumps(told) + "\n")
        return
    sys.stdout.write(f"{service.path}: {state}\n")
    if lines:
        sys.stdout.write("Now run:\n" + "".join(f"  {line}\n" for line in lines))


def _do(commands: Sequence[Sequence[str]]) -> None:
    for words in commands:
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=_COMMAND_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ServiceProblem(f"{shlex.join(words)}: {error}", remedy=_INSTEAD) from error
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
            raise ServiceProblem(f"{shlex.join(words)}: {said}", remedy=_INSTEAD)
