"""`make demo`: one gap, filled from the shell, over REST and through the bridge, by real processes.

The demo keeps its own state folder and a free port, and stops its daemon: nothing of yours is
touched. What the model writes is shown as it is.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# PYTHONSAFEPATH keeps a script's own folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

import httpx
from fake_editor import INVOKED, FakeEditor, position

MARKED = """\
class Basket:
    def __init__(self, postage: float) -> None:
        self.postage = postage
        self.prices: list[float] = []

    def add(self, price: float) -> None:
        if price < 0:
            raise ValueError(f"negative price: {price}")
        self.prices.append(price)

    def remove(self, price: float) -> None:
        if price < 0:
            ▮
        self.prices.remove(price)
"""
GAP = MARKED.index("▮")
SOURCE = MARKED.replace("▮", "")
MODEL = Path(__file__).resolve().parents[2] / "engine/starter"


def main() -> int:
    """Run the three ways; the exit status is 1 when one of them did not answer."""
    home = Path(tempfile.mkdtemp(prefix="infilld-demo-"))
    environ = {**os.environ, "INFILLD_STATE_DIR": str(home / "state"), "INFILLD_PORT": "0"}
    try:
        return _shown(home, environ)
    finally:
        _infilld(environ, "stop", quiet=True)
        shutil.rmtree(home, ignore_errors=True)


def _shown(home: Path, environ: dict[str, str]) -> int:
    file = home / "basket.py"
    file.write_text(SOURCE, encoding="utf-8")
    line, column = position(SOURCE, GAP, "utf-32")
    say(f"A file with a gap at {line + 1}:{column + 1}, marked ▮:\n")
    say(_indented(MARKED))

    title(
        "1. From the shell: infilld fill basket.py --at "
        f"{line + 1}:{column + 1} --watch   (starts the daemon)"
    )
    began = time.monotonic()
    shell = _infilld(environ, "fill", str(file), "--at", f"{line + 1}:{column + 1}", "--watch")
    say(f"\n[with starting the daemon and loading the model: {time.monotonic() - began:.1f} s]")

    title("2. Over REST: POST /v1/infill")
    reply, ms = _rest(environ)
    shown = {key: reply[key] for key in ("choices", "reason", "usage")}
    say(_indented(json.dumps(shown, indent=1)))
    say(
        f"[answered in {ms:.0f} ms, {reply['usage']['cached_tokens']} of "
        f"{reply['usage']['prompt_tokens']} prompt tokens were cached]"
    )

    title("3. Through the bridge: textDocument/inlineCompletion")
    text, ms = _bridge(home, file, line, column)
    say(_indented(SOURCE[:GAP] + text + SOURCE[GAP:]))
    say(f"[the bridge answered in {ms:.0f} ms; ghost text: {text!r}]")

    title("How good the model is")
    say(_figures())
    title("Connect your editor")
    say(
        "  editor-configs/README.md has the lines for Neovim and others; the bridge is\n"
        "  `infilld lsp` on stdin and stdout, and starts the daemon when none runs.\n"
        "  Try your own file:  .venv/bin/infilld fill FILE --at LINE:COL --watch"
    )
    # 3: the model chose to be silent, which is an answer too.
    return 0 if shell in (0, 3) else 1


def _infilld(environ: dict[str, str], *words: str, quiet: bool = False) -> int:
    command = [sys.executable, "-P", "-m", "infilld.server", *words]
    where = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, env=environ, stdout=where, stderr=where, check=False).returncode


def _rest(environ: dict[str, str]) -> tuple[dict[str, Any], float]:
    state = Path(environ["INFILLD_STATE_DIR"])
    url = json.loads((state / "daemon.json").read_text())["url"]
    token = (state / "token").read_text().strip()
    body = {"text": SOURCE, "spans": [{"start": GAP, "end": GAP}], "path": "basket.py", "seed": 1}
    began = time.monotonic()
    reply = httpx.post(
        f"{url}/v1/infill", json=body, headers={"Authorization": f"Bearer {token}"}, timeout=60
    )
    reply.raise_for_status()
    return reply.json(), 1e3 * (time.monotonic() - began)


def _bridge(home: Path, file: Path, line: int, column: int) -> tuple[str, float]:
    with FakeEditor(home, state_dir=home / "state", environ={"INFILLD_PORT": "0"}) as editor:
        editor.initialize()
        editor.open(file.as_uri(), SOURCE)
        editor.wait_state("ready")
        began = time.monotonic()
        items = editor.items(file.as_uri(), line, column, INVOKED)
        ms = 1e3 * (time.monotonic() - began)
    # An item replaces its range, which begins before what was typed on the line.
    if not items:
        return "", ms
    start = items[0]["range"]["start"]["character"]
    return str(items[0]["insertText"])[column - start :], ms


def _figures() -> str:
    path = MODEL / "evaluation.json"
    if not path.exists():
        return "  not measured yet"
    report = json.loads(path.read_text())
    canvas = report["rest_of_line"]["canvas"]
    return (
        f"  starter model, {report['items']} random rest-of-line gaps in {report['held_out_files']}"
        " files of packages it never saw:\n"
        f"  exact match {100 * canvas['exact_match']:.1f} %, edit similarity "
        f"{canvas['edit_similarity']:.3f}, file still parses {100 * canvas['parse_rate']:.1f} %.\n"
        "  It is small, and best where code resembles code nearby; where it does not know, it is\n"
        "  silent. engine/starter/MODEL_CARD.md says how it was made and how it compares."
    )


def title(text: str) -> None:
    say(f"\n\033[1m{text}\033[0m\n" if sys.stdout.isatty() else f"\n== {text}\n")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
