"""What `GET /` sends, whoever asks."""

import hashlib
import html.parser
import re
from base64 import b64encode

import httpx
import pytest
from live_server import LiveServer

from infilld.server.page.page import HTML, policy_of


@pytest.fixture
def answer(server: LiveServer) -> httpx.Response:
    return httpx.get(f"{server.url}/")


def directives(policy: str) -> dict[str, str]:
    return {part.split(" ", 1)[0]: part.partition(" ")[2] for part in policy.split("; ")}


def test_needs_no_token_and_holds_none(server: LiveServer, answer: httpx.Response) -> None:
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == HTML
    assert server.token not in answer.text


def test_head_is_answered_alike(server: LiveServer, answer: httpx.Response) -> None:
    head = httpx.head(f"{server.url}/")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-security-policy"] == answer.headers["content-security-policy"]


def test_tells_browsers_to_be_strict(answer: httpx.Response) -> None:
    wanted = {
        "x-content-type-options": ["nosniff"],
        "x-frame-options": ["DENY"],
        "referrer-policy": ["no-referrer"],
        "cache-control": ["no-store"],
        "cross-origin-opener-policy": ["same-origin"],
        "cross-origin-resource-policy": ["same-origin"],
    }
    assert {name: answer.headers.get_list(name) for name in wanted} == wanted
    assert "access-control-allow-origin" not in answer.headers


def test_the_policy_names_exactly_what_the_file_holds(answer: httpx.Response) -> None:
    said = directives(answer.headers["content-security-policy"])
    for name in ("script", "style"):
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", answer.text, re.DOTALL)
        digest = b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert said.pop(f"{name}-src") == f"'sha256-{digest}'"
    assert said == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }


def test_a_changed_script_has_another_policy() -> None:
    assert policy_of(HTML) != policy_of(HTML.replace("'use strict';", "'use strict' ;", 1))


class Outside(html.parser.HTMLParser):
    """Collects what a browser would load or run from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href", "action", "srcset", "data", "poster"):
                self.found.append(value or "")
            assert not name.startswith("on"), f"{tag} {name}: the policy forbids it"
            assert name != "style", f"{tag} {name}: the policy forbids it"


def test_is_one_file_that_needs_nothing_else() -> None:
    outside = Outside()
    outside.feed(HTML)
    assert [url[:19] for url in outside.found] == ["data:image/svg+xml,"]
    assert "@import" not in HTML
    assert not re.search(r"\burl\(", HTML)
    # A name space and what a user may paste are no addresses that are asked.
    named = set(re.findall(r"https?://[^/'\"\s]+", HTML))
    assert named == {"http://www.w3.org", "http://127.0.0.1:8741"}


def test_is_small() -> None:
    assert len(HTML.encode()) < 60_000


def test_never_makes_markup_of_text() -> None:
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
    ):
        assert sink not in HTML
