"""The whole chain: the bridge starts the real daemon with the starter model, and finds it again."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from fake_editor import INVOKED, FakeEditor, apply_item

from infilld.server import discovery
from infilld.server.settings import Settings

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LOAD_S = 180.0
URI = "file:///shapes.py"
TEXT = "def area(width, height):\n    return \n\n\nprint(area(2, 3))\n"
ANSWERS = {"ok", "empty", "low_confidence", "repeats_suffix", "repeats_prefix", "repetition"}
ANSWERS |= {"unbalanced", "does_not_parse"}


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """Settings of a daemon that the bridge may start; it is stopped after the test."""
    chosen = Settings(state_dir=tmp_path / "state", port=0, device="cpu")
    try:
        yield chosen
    finally:
        discovery.stop(chosen)
        assert discovery.running_pid(chosen) is None


def bridge(home: Path, settings: Settings, **environ: str) -> FakeEditor:
    return FakeEditor(
        home,
        state_dir=settings.state_dir,
        options={"daemonWaitMs": int(LOAD_S * 1000), "invokedDeadlineMs": int(LOAD_S * 1000)},
        environ={"INFILLD_PORT": "0", "INFILLD_DEVICE": "cpu", **environ},
    )


def test_a_model_that_is_missing_is_reported(tmp_path: Path, settings: Settings) -> None:
    with bridge(tmp_path, settings, INFILLD_MODEL=str(tmp_path / "nowhere")) as editor:
        editor.initialize()
        editor.open(URI, TEXT)
        status = editor.wait_state("failed", LOAD_S)
        assert "model" in status["why"]
        assert editor.items(URI, 1, 11) == []
        assert editor.received("window/showMessage") == []


def test_the_bridge_starts_the_daemon_and_a_new_one_when_it_is_stopped(
    tmp_path: Path, settings: Settings
) -> None:
    if not (files("infilld.engine") / "starter" / "config.json").is_file():
        pytest.skip("needs the starter model, which is not in this tree")
    with bridge(tmp_path, settings) as editor:
        editor.initialize()
        editor.open(URI, TEXT)
        first = editor.reply(editor.complete(URI, 1, 11, INVOKED), LOAD_S)
        status = editor.status()
        assert status["state"] == "ready"
        assert status["model"]
        assert status["last"]["reason"] in ANSWERS, status
        for item in first["result"]["items"]:
            after = apply_item(TEXT, item, editor.encoding)
            assert after.startswith(TEXT[:36])
            assert after.endswith(TEXT[36:])
        assert discovery.stop(settings)
        editor.reply(editor.complete(URI, 1, 11, INVOKED), LOAD_S)
        again = editor.status()
        assert again["last"]["reason"] in ANSWERS, again
        assert again["url"] != status["url"]
