"""`GET /`: one page that shows a canvas being refined, and what it may do in a browser.

The page is one file that needs nothing else. It holds no secret: the token comes in the address's
fragment, which no browser sends, or is pasted.
"""

import hashlib
import re
from base64 import b64encode
from collections.abc import Mapping
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

HTML = files(__package__).joinpath("index.html").read_text(encoding="utf-8")


def _hashes(html: str, name: str) -> list[str]:
    """The sources of a policy for the elements of a name, in order."""
    texts = re.findall(rf"<{name}>(.*?)</{name}>", html, re.DOTALL)
    return [
        f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts
    ]


def policy_of(html: str) -> str:
    """The Content-Security-Policy that lets a page run its own script and style, and no other.

    Requests may go to the page's own origin alone; text cannot become markup (trusted types).
    """
    own = {name: " ".join(_hashes(html, name)) for name in ("script", "style")}
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {own['script']}",
            f"style-src {own['style']}",
            "connect-src 'self'",
            # Its own icon.
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": policy_of(HTML),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A daemon of another version has another page.
    "Cache-Control": "no-store",
}


def router() -> APIRouter:
    """The route of the page."""
    routes = APIRouter()

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        """The page; it needs no token."""
        return HTMLResponse(HTML, headers=dict(HEADERS))

    return routes
