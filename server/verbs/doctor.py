"""`infilld doctor`: every line says ok, or what to do."""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from infilld.server import discovery
from infilld.server.client import Client
from infilld.server.process import ports
from infilld.server.settings import Problem, Settings
from infilld.server.verbs import models

_PACKAGES = ("torch", "safetensors", "tokenizers", "fastapi", "uvicorn", "pydantic", "pygls")


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, whether it is well, what was found, what to do."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def run(wanted: Settings, *, as_json: bool) -> int:
    """Print every check; returns 0 when all are well."""
    checks = list(examine(wanted))
    if as_json:
        sys.stdout.write(json.dumps([asdict(check) for check in checks], indent=2) + "\n")
    else:
        for check in checks:
            said = f"ok    {check.name}: {check.found}"
            if not check.ok:
                said = f"FAIL  {check.name}: {check.found}\n      {check.remedy}".rstrip()
            sys.stdout.write(said + "\n")
    return 0 if all(check.ok for check in checks) else 1


def examine(wanted: Settings) -> Iterator[Check]:
    """Yield every check, cheapest first."""
    yield from (_guarded(name, look, wanted) for name, look in _LOOKS)


def _guarded(name: str, look: Callable[[Settings], str], wanted: Settings) -> Check:
    from infilld.engine.errors import InfilldError

    try:
        return Check(name, True, look(wanted))
    except (Problem, InfilldError) as error:
        return Check(name, False, str(error), error.remedy)
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _versions(wanted: Settings) -> str:
    found = [f"Python {sys.version.split()[0]}", f"infilld {version('infilld')}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise Problem(f"{package} is absent", remedy=f"pip install {package}") from None
    return ", ".join(found)


def _state(wanted: Settings) -> str:
    folder = wanted.state_dir
    discovery.make_private_folder(folder)
    mode = folder.stat().st_mode & 0o777
    if mode & 0o077:
        raise Problem(f"{folder} is open to others ({mode:o})", remedy=f"chmod 700 {folder}")
    # A full disk lets a file be made, and takes nothing into it.
    with discovery.writing_in(folder), tempfile.NamedTemporaryFile(dir=folder, buffering=0) as file:
        file.write(b"\0" * 4096)
    return str(folder)


def _daemon(wanted: Settings) -> str:
    found = discovery.find(wanted)
    if found is None:
        pid = discovery.running_pid(wanted)
        if pid is not None:
            raise Problem(f"process {pid} does not answer", remedy="infilld stop")
        with ports.door(wanted):
            pass
        return f"stopped; {wanted.socket or f'port {wanted.port}'} is free"
    with Client(found.url, found.token, timeout_s=5.0) as client:
        stats = client.stats()
    if stats.get("failure"):
        raise Problem(f"the model could not be loaded: {stats['failure']}", remedy="infilld logs")
    return f"pid {found.pid} at {found.url}, {stats['state']}"


def _engine(wanted: Settings) -> str:
    if wanted.engine_url is None:
        return "this machine's own"
    from infilld.server.remote import checking

    return checking.checked(wanted)


def _device(wanted: Settings) -> str:
    import torch

    from infilld.engine.worker import pick_device

    chosen = pick_device(wanted.device)
    if chosen.type == "cuda":
        free_bytes, all_bytes = torch.cuda.mem_get_info(chosen)
        name = torch.cuda.get_device_name(chosen)
        return f"{chosen} ({name}), {free_bytes / 1e9:.1f} of {all_bytes / 1e9:.1f} GB free"
    return f"{chosen}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _model(wanted: Settings) -> str:
    folder = models.folder_of(wanted.model)
    report = models.inspect_usable(folder, wanted.device)
    needed, parameters = report["needed_bytes"], report["parameters"]
    assert isinstance(needed, int)
    assert isinstance(parameters, int)
    if not report["fits"]:
        raise Problem(
            f"{folder} needs {needed / 1e9:.1f} GB on {report['device']}, more than is free",
            remedy="Close other programs, or choose a smaller model.",
        )
    return f"{wanted.model}, {parameters / 1e6:.1f} M parameters, {needed / 1e6:.0f} MB"


def _editors(wanted: Settings) -> str:
    found = [name for name in ("nvim", "code", "hx", "zed", "emacs") if shutil.which(name)]
    return f"{', '.join(found) or 'none found'}; the bridge is `infilld lsp`"


_LOOKS = (
    ("versions", _versions),
    ("state folder", _state),
    ("daemon and port", _daemon),
    ("editors", _editors),
    ("engine", _engine),
    ("device", _device),
    ("model", _model),
)
