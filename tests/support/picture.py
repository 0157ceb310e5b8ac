"""Takes the README's picture of the canvas page: `python -P tests/support/picture.py OUT.png`."""

import sys
import tempfile
from pathlib import Path

# PYTHONSAFEPATH keeps a script's own folder off the path.
sys.path.insert(0, str(Path(__file__).parent))

from browser import Browser, Page
from live_server import serving

from infilld.engine.worker import Worker
from infilld.server import discovery
from infilld.server.settings import STARTER, Settings
from infilld.server.verbs import models

# With it both gaps of the example are filled, and rightly.
SEED = 3


def at_pass_two(page: Page, daemon: discovery.Daemon) -> None:
    """Run the built-in example from the token's link, and stop at its second pass."""
    page.open(f"{daemon.url}/#token={daemon.token}")
    page.wait("document.querySelector('#dot.ready') && health.textContent.includes('starter')")
    # No pass is missed, however fast they come.
    page.run(f"document.querySelector('#seed').value = '{SEED}'; pace.value = '1500'")
    page.run("document.querySelector('#text').focus()")
    page.press("Enter", ctrl=True)
    page.wait("document.querySelectorAll('#strip button').length >= 2")
    page.click("#strip button:nth-child(2)")
    page.wait("progress.textContent.startsWith('pass 2')")


def finish(page: Page) -> None:
    """Let it go on to the answer."""
    page.run("pace.value = '0'")
    page.click("#pause")
    page.wait("!document.querySelector('#answer').hidden")


def main(out: Path) -> int:
    """Take it, in colours few enough for a small file."""
    # For the picture alone; tests take theirs as it is.
    from PIL import Image

    with tempfile.TemporaryDirectory() as home:
        settings = Settings(state_dir=Path(home, "state"), port=0)
        worker = Worker(models.folder_of(STARTER), device="cpu")
        with (
            serving(settings, worker) as daemon,
            Browser(Path(home, "browser")) as browser,
            browser.page() as page,
        ):
            worker.wait_ready(60)
            page.resize(1280, 800, 1.5)
            page.prefer(color_scheme="light", reduced_motion="reduce")
            at_pass_two(page, daemon)
            finish(page)
            page.click("#strip button:nth-child(2)")
            page.wait("progress.textContent.startsWith('pass 2')")
            page.run("document.activeElement.blur()")
            page.picture(out)
    with Image.open(out) as seen:
        few = seen.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(out, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
