"""The page, the real daemon and the starter model: what a user sees."""

from collections.abc import Iterator

import pytest
from browser import Page
from live_server import serving
from picture import at_pass_two, finish

from infilld.engine.worker import Worker
from infilld.server import discovery
from infilld.server.settings import STARTER, Settings
from infilld.server.verbs import models

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (models.folder_of(STARTER) / "config.json").is_file(),
        reason="this checkout has no starter model yet",
    ),
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[discovery.Daemon]:
    settings = Settings(state_dir=tmp_path_factory.mktemp("page") / "state", port=0)
    worker = Worker(models.folder_of(STARTER), device="cpu")
    with serving(settings, worker) as found:
        # A browser writes every 503 to its console.
        worker.wait_ready(60)
        yield found


def test_the_example_is_refined_answered_and_inserted(page: Page, daemon: discovery.Daemon) -> None:
    at_pass_two(page, daemon)
    assert page.run("location.href") == f"{daemon.url}/"
    words = page.run(
        "[...document.querySelectorAll('#canvas .t:not(.filler)')].map((e) => e.className)"
    )
    assert {"t given", "t settled"} < set(words)
    assert {"t noise", "t accepted"} & set(words)
    drafted = page.run("document.querySelector('#preview').textContent")
    assert 'raise KeyError(f"missing setting: {name}")' in drafted
    finish(page)
    assert "sure" in page.text("#sure")
    assert "passes 4" in " ".join(page.text("#facts").split())
    page.click("#insert")
    text = page.run("document.querySelector('#text').value")
    assert text.count("value = self.values.get(name)") == 3
    assert text.count('raise KeyError(f"missing setting: {name}")') == 2
    assert "<|gap|>" not in text


def test_a_place_it_does_not_know_stays_silent(page: Page, daemon: discovery.Daemon) -> None:
    page.open(f"{daemon.url}/#token={daemon.token}")
    page.wait("document.querySelector('#dot.ready') && health.textContent.includes('starter')")
    page.run("setFile('point.py', EXAMPLES['point.py (it may stay silent)'])")
    page.run("document.querySelector('#seed').value = '3'; void start()")
    page.wait("!document.querySelector('#answer').hidden")
    assert page.text("#verdict") == "No suggestion: low_confidence"
    assert "chance" in page.text("#why")
