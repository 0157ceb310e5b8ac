import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Page, executable
from live_server import LiveServer, live_server


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium; where none is installed the test is skipped, but not where CI promised one."""
    if executable() is None:
        reason = "no Chromium is installed: apt-get install chromium"
        if os.environ.get("CI_BROWSER"):
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path / "state") as running:
        yield running


@pytest.fixture
def page(browser: Browser, server: LiveServer) -> Iterator[Page]:
    """A tab that complains of nothing, and asks nobody but the daemon.

    It is closed before the server is: a request that is refused then would be a complaint.
    """
    with browser.page() as tab:
        tab.prefer(reduced_motion="reduce")
        yield tab
        tab.leave()
    assert tab.complaints == []
    asked = {url.split("/")[2] for url in tab.requests}
    assert len(asked) <= 1
    assert all(host.startswith("127.0.0.1:") for host in asked)
