"""A real Neovim that asks `/infill`, against the daemon with the starter model.

The client is `infill_client.vim`, which sends what llama.vim sends. Where the variable LLAMA_VIM
names a folder with that plugin, the plugin itself is tested too.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from live_server import serving

from infilld.engine.worker import Worker
from infilld.server.client import Client
from infilld.server.discovery import Daemon
from infilld.server.settings import Settings

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
TIMEOUT_S = 60.0
SOURCE = "def add(a, b):\n    return a + b\n\n\ndef plus(a, b):\n    return\n\n\nprint(add(1, 2))\n"
FILLED = SOURCE.replace("    return\n", "    return a + b\n")
# Long enough for a starved machine; the plugin gives its first prediction 250 ms.
PROMPT_MS = 30_000


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    wanted = Settings(state_dir=tmp_path_factory.mktemp("vim") / "state", port=0)
    with serving(wanted, Worker(device="cpu")) as found:
        with Client(found.url, found.token) as client:
            client.wait_ready(60)
        yield found


def small_client(daemon: Daemon) -> str:
    wanted = {
        "infill_url": f"{daemon.url}/infill",
        "infill_token": daemon.token,
        "infill_prompt_ms": PROMPT_MS,
    }
    lines = [f"let g:{name} = {json.dumps(value)}" for name, value in wanted.items()]
    return "\n".join([*lines, f"source {HERE / 'infill_client.vim'}"])


def llama_vim(daemon: Daemon) -> str:
    folder = os.environ.get("LLAMA_VIM")
    if not folder:
        pytest.skip("LLAMA_VIM does not name a folder with the plugin llama.vim")
    wanted = {
        "endpoint_fim": f"{daemon.url}/infill",
        "endpoint_inst": f"{daemon.url}/v1/chat/completions",
        "api_key": daemon.token,
        "t_max_prompt_ms": PROMPT_MS,
    }
    return f"set runtimepath^={folder}\nlet g:llama_config = {json.dumps(wanted)}"


class Neovim:
    """A Neovim without a terminal that is typed into from outside."""

    def __init__(self, home: Path, config: str) -> None:
        path = shutil.which("nvim", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
        if path is None or shutil.which("curl") is None:
            pytest.skip("needs Neovim 0.11 and curl")
        self._path, self._address = path, str(home / "nvim.sock")
        self._env = {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_RUNTIME_DIR": str(home)}
        (home / "init.vim").write_text(f"{config}\n")
        (home / "add.py").write_text(SOURCE)
        command = ["--headless", "--clean", "--listen", self._address, "-u", home / "init.vim"]
        self._process = subprocess.Popen(
            [path, *command, home / "add.py"],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.wait(lambda: self.ask("1") == "1", lambda: "it does not start")

    def _remote(self, flag: str, text: str) -> str:
        command = [self._path, "--clean", "--server", self._address, flag, text]
        got = subprocess.run(
            command, env=self._env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        return got.stdout if got.returncode == 0 else f"failed: {got.stderr}"

    def type(self, keys: str) -> None:
        self._remote("--remote-send", keys)

    def ask(self, expression: str) -> str:
        return self._remote("--remote-expr", expression)

    def painted(self, row: int) -> str:
        """What stands on a line of the screen, cell by cell; rows count from 1."""
        cells = f"join(map(range(1, &columns), {{_, c -> screenstring({row}, c)}}), '')"
        return self.ask(f"execute('redraw') .. {cells}").strip("\n")

    @property
    def text(self) -> str:
        return self.ask("join(getline(1, '$'), nr2char(10))") + "\n"

    def wait(self, is_so: Callable[[], bool], otherwise: Callable[[], str]) -> None:
        until = time.monotonic() + TIMEOUT_S
        while not is_so():
            assert self._process.poll() is None, "Neovim has ended"
            assert time.monotonic() < until, otherwise()

    def close(self) -> None:
        self._remote("--remote-send", "<C-\\><C-n>:qa!<CR>")
        self._process.wait(TIMEOUT_S)


@pytest.mark.e2e
@pytest.mark.parametrize("config", [small_client, llama_vim])
def test_the_fill_is_painted_and_taken(
    daemon: Daemon, tmp_path: Path, config: Callable[[Daemon], str]
) -> None:
    neovim = Neovim(tmp_path, config(daemon))
    try:
        neovim.type("6GA ")
        neovim.wait(lambda: "return a + b" in neovim.painted(6), lambda: neovim.painted(6))
        # Behind the text stands what the six timings say.
        assert " ms" in neovim.painted(6)
        assert neovim.text == SOURCE.replace("    return\n", "    return \n")
        neovim.type("<Tab>")
        neovim.wait(lambda: neovim.text == FILLED, lambda: neovim.text)
    finally:
        neovim.close()
