"""Flags, environment and file, merged into one frozen record.

Flags win over `INFILLD_*` variables, which win over `$XDG_CONFIG_HOME/infilld/config.toml`. An
unknown key or a value that cannot be read refuses to start and names key and source.
"""

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

STARTER = "starter"
DEFAULT_PORT = 8741
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")
LOCAL_ENGINE = "local"
REMOTE_SCHEME = "openai:"
WEIGHTS = ("auto", "plain", "int4", "int8")
KEY_VALUES = ("auto", "bf16", "fp8")
NONE = "none"
"""What stands for no path, in flags and files."""
_PREFIX = "INFILLD_"
# A year: a timer that is set for longer than this means never.
_MOST_MINUTES = 525_600
_MOST_TOKENS = 1_048_576
_MOST_GIGABYTES = 100_000.0
_A_TIME = f'expected minutes from 0 to {_MOST_MINUTES}, or "auto"'


class Problem(Exception):
    """Something on this machine must be mended: `code`, message, and `remedy` in one sentence."""

    code = "problem"

    def __init__(self, message: str, *, remedy: str = "", code: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy
        if code is not None:
            self.code = code


class SettingsProblem(Problem):
    """A key is unknown, or its value cannot be used."""

    code = "bad_settings"


def config_folder(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of `config.toml`, after the XDG rules."""
    return _xdg(os.environ if environ is None else environ, "XDG_CONFIG_HOME", ".config")


def _xdg(environ: Mapping[str, str], variable: str, default: str) -> Path:
    base = environ.get(variable, "")
    # The XDG specification says to ignore a relative path.
    root = Path(base) if base.startswith("/") else Path.home() / default
    return root / "infilld"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be configured.

    Attributes:
        model: absolute path of a checkpoint folder, or "starter" for the embedded model.
        device: "auto", or a torch device such as "cpu" or "cuda".
        host: address to listen on, a loopback one unless `allow_remote`.
        port: TCP port; 0 picks a free one.
        state_dir: folder of the lock, the daemon's address, the token and the log.
        socket: path of a Unix socket to listen on instead of TCP; None: TCP.
        allow_remote: `host` may be an address that other machines reach; needs `auth`.
        allowed_hosts: Host headers that are taken beside this machine's own, such as
            "box.lan:8741".
        auth: ask for the bearer token.
        log_level: one of `LOG_LEVELS`. log_format: one of `LOG_FORMATS`.
        log_prompts: source text may stand in the log.
        engine: "local", or "openai:URL" of a server that speaks OpenAI's protocol.
        engine_model: name of the model there; "auto": the first it has.
        engine_key_file: file with the key to send there; None: none is sent.
        fail_over: while that server does not answer, the local model does.
        context_tokens: longest prompt to keep room for; "auto": what fits, up to 32,768. On a GPU.
        memory_gb: what may be used of the GPU, in GB of 10^9 bytes; "auto": most of what is free.
        key_values: how the prompt is held on a GPU: "bf16" or "fp8"; "auto": bf16.
        weights: what a plain checkpoint's weights become on a GPU: "plain", "int4" or "int8";
            "auto": int4 from 4 GB on.
        idle_unload_minutes: after so long without a request the model is dropped, and loaded
            again at the next; 0: never; "auto": 15 for 1 GiB or more on a GPU, else never.
    """

    model: str = STARTER
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    state_dir: Path = field(
        default_factory=lambda: _xdg(os.environ, "XDG_STATE_HOME", ".local/state")
    )
    socket: Path | None = None
    allow_remote: bool = False
    allowed_hosts: tuple[str, ...] = ()
    auth: bool = True
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
    log_prompts: bool = False
    engine: str = LOCAL_ENGINE
    engine_model: str = "auto"
    engine_key_file: Path | None = None
    fail_over: bool = False
    context_tokens: int | Literal["auto"] = "auto"
    memory_gb: float | Literal["auto"] = "auto"
    key_values: Literal["auto", "bf16", "fp8"] = "auto"
    weights: Literal["auto", "plain", "int4", "int8"] = "auto"
    idle_unload_minutes: float | Literal["auto"] = "auto"

    @property
    def model_folder(self) -> Path | None:
        """The checkpoint's folder; None means the embedded starter model."""
        return None if self.model == STARTER else Path(self.model)

    @property
    def token_file(self) -> Path:
        """Where the bearer token is kept, readable by its owner only."""
        return self.state_dir / "token"

    @property
    def log_file(self) -> Path:
        """Where a daemon that was started in the background writes."""
        return self.state_dir / "daemon.log"

    def flags(self) -> list[str]:
        """The command-line flags that give another process exactly these settings."""
        words: list[str] = []
        for name in KEYS:
            words += [f"--{name.replace('_', '-')}", _as_flag(getattr(self, name))]
        return words

    @property
    def engine_url(self) -> str | None:
        """Base address of the remote engine; None: the engine is local."""
        is_remote = self.engine.startswith(REMOTE_SCHEME)
        return self.engine.removeprefix(REMOTE_SCHEME) if is_remote else None


def _as_flag(value: object) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def load(
    flags: Mapping[str, object] | None = None, *, environ: Mapping[str, str] | None = None
) -> Settings:
    """Merge file, environment and flags; a flag that is None was not given.

    Raises:
        SettingsProblem: an unknown key, or a value that cannot be used; names key and source.
    """
    env = os.environ if environ is None else environ
    values: dict[str, object] = {"state_dir": _xdg(env, "XDG_STATE_HOME", ".local/state")}
    values |= _from_file(config_folder(env) / "config.toml")
    values |= _from_environment(env)
    for name, value in (flags or {}).items():
        if value is not None:
            values[name] = _read(name, value, f"flag --{name.replace('_', '-')}", Path.cwd())
    wanted = Settings(**values)  # type: ignore[arg-type]  # _read has checked every one
    _refuse_open_door(wanted)
    return wanted


def _refuse_open_door(wanted: Settings) -> None:
    """Other machines are let in only where that is asked for, and only with the token."""
    if ip_address(wanted.host).is_loopback:
        return
    if not wanted.allow_remote:
        raise SettingsProblem(
            f"host = {wanted.host!r} can be reached from other machines",
            remedy="Listen on loopback, such as 127.0.0.1, or allow it: --allow-remote true",
        )
    if not wanted.auth:
        raise SettingsProblem(
            f"host = {wanted.host!r} without a token would serve everybody",
            remedy="Leave `auth` on, or listen on loopback.",
        )


def _from_file(path: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise SettingsProblem(f"cannot read {path}: {error}", remedy="Mend the file.") from error
    return {name: _read(name, value, str(path), path.parent) for name, value in table.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    values: dict[str, object] = {}
    for variable, text in environ.items():
        if variable.startswith(_PREFIX):
            name = variable.removeprefix(_PREFIX).lower()
            values[name] = _read(name, text, f"environment variable {variable}", Path.cwd())
    return values


def _read(name: str, value: object, source: str, folder: Path) -> object:
    """Turn one value into what `Settings` holds; relative paths count from `folder`."""
    reader = _READERS.get(name)
    if reader is None:
        raise SettingsProblem(
            f"unknown key {name!r} in {source}", remedy=f"Known keys: {', '.join(_READERS)}."
        )
    try:
        return reader(value, folder)
    except ValueError as error:
        is_secret = name == "engine" and "@" in str(value)
        shown = "..." if is_secret else repr(value)
        raise SettingsProblem(f"{name} = {shown} in {source}: {error}") from None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a text that is not empty")
    return value


def _path(value: object, folder: Path) -> Path:
    text = str(value) if isinstance(value, Path) else _text(value)
    return Path(os.path.abspath(folder / Path(text).expanduser()))


def _model(value: object, folder: Path) -> str:
    return STARTER if value == STARTER else str(_path(value, folder))


def _device(value: object, folder: Path) -> str:
    return _text(value)


def _host(value: object, folder: Path) -> str:
    text = _text(value)
    if text == "localhost":
        return "127.0.0.1"
    try:
        return str(ip_address(text))
    except ValueError:
        raise ValueError("expected an address, such as 127.0.0.1 or ::1") from None


def _maybe_path(value: object, folder: Path) -> Path | None:
    return None if value is None or value == NONE else _path(value, folder)


def _hosts(value: object, folder: Path) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError("expected hosts, such as box.lan:8741, with commas between them")
    names = tuple(part.strip().lower() for part in parts)
    if any(not name or any(c in name for c in "/@ *") for name in names if names != ("",)):
        raise ValueError("expected hosts, such as box.lan:8741, without scheme or path")
    return () if names == ("",) else names


def _engine(value: object, folder: Path) -> str:
    text = _text(value)
    if text == LOCAL_ENGINE:
        return text
    url = text.removeprefix(REMOTE_SCHEME)
    # Before it is taken apart: what does that may quote it.
    if "@" in url.partition("//")[2].partition("/")[0]:
        raise ValueError("expected no name or key in the address; a key has its engine_key_file")
    where = urlsplit(url)
    is_url = where.scheme in ("http", "https") and bool(where.hostname)
    if not text.startswith(REMOTE_SCHEME) or not is_url or "?" in url or "#" in url:
        raise ValueError('expected "local", or "openai:" and an address such as http://host:8000')
    return text.rstrip("/")


def _name(value: object, folder: Path) -> str:
    return _text(value)


def _port(value: object, folder: Path) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
        raise ValueError("expected a port from 0 to 65535")
    return value


def _bool(value: object, folder: Path) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _minutes(value: object, folder: Path) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(_A_TIME)
    try:
        minutes = float(value)
    except (ValueError, OverflowError):
        raise ValueError(_A_TIME) from None
    if not 0 <= minutes <= _MOST_MINUTES:
        raise ValueError(_A_TIME)
    return minutes


def _tokens(value: object, folder: Path) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_TOKENS:
        raise ValueError(f'expected tokens from 1 to {_MOST_TOKENS}, or "auto"')
    return value


def _gigabytes(value: object, folder: Path) -> float | Literal["auto"]:
    if value == "auto":
        return "auto"
    expected = 'expected GB of 10^9 bytes above 0, or "auto"'
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(expected)
    try:
        gigabytes = float(value)
    except (ValueError, OverflowError):
        raise ValueError(expected) from None
    if not 0 < gigabytes <= _MOST_GIGABYTES:
        raise ValueError(expected)
    return gigabytes


def _one_of(words: tuple[str, ...]) -> Callable[[object, Path], str]:
    def read(value: object, folder: Path) -> str:
        if value not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return str(value)

    return read


_READERS: Mapping[str, Callable[[object, Path], object]] = {
    "model": _model,
    "device": _device,
    "host": _host,
    "port": _port,
    "state_dir": _path,
    "socket": _maybe_path,
    "allow_remote": _bool,
    "allowed_hosts": _hosts,
    "auth": _bool,
    "log_level": _one_of(LOG_LEVELS),
    "log_format": _one_of(LOG_FORMATS),
    "log_prompts": _bool,
    "engine": _engine,
    "engine_model": _name,
    "engine_key_file": _maybe_path,
    "fail_over": _bool,
    "context_tokens": _tokens,
    "memory_gb": _gigabytes,
    "key_values": _one_of(KEY_VALUES),
    "weights": _one_of(WEIGHTS),
    "idle_unload_minutes": _minutes,
}
KEYS = tuple(f.name for f in fields(Settings))
HELP: Mapping[str, str] = {
    "model": 'checkpoint folder, or "starter"',
    "device": "auto, cpu, cuda, cuda:N",
    "host": "loopback address to listen on, or another with --allow-remote true",
    "port": f"TCP port, {DEFAULT_PORT} unless told; 0 picks a free one",
    "state_dir": "folder of the lock, the token and the log",
    "socket": "Unix socket to listen on instead of TCP",
    "allow_remote": "let other machines in, with the token: true or false",
    "allowed_hosts": "Host headers taken beside this machine's own, commas between them",
    "auth": "ask for the bearer token: true or false",
    "log_level": ", ".join(LOG_LEVELS),
    "log_format": ", ".join(LOG_FORMATS),
    "log_prompts": "source text may stand in the log: true or false",
    "engine": f'"{LOCAL_ENGINE}", or "{REMOTE_SCHEME}URL" of an OpenAI-compatible server',
    "engine_model": "name of the model there; auto",
    "engine_key_file": "file with the key to send there",
    "fail_over": "the local model answers while that server does not: true or false",
    "context_tokens": "longest prompt to keep room for on a GPU; auto",
    "memory_gb": "what may be used of the GPU, GB of 10^9 bytes; auto",
    "key_values": f"how prompts are held on a GPU: {', '.join(KEY_VALUES)}",
    "weights": f"what a plain checkpoint becomes on a GPU: {', '.join(WEIGHTS)}",
    "idle_unload_minutes": "drop the model after so long without a request; 0: never; auto",
}
