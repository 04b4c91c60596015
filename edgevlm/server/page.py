"""The pages: one file each, to which the browser lets nothing be added."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

_FOLDER = Path(__file__).parent.parent / "assets" / "server"


async def ask_page(_: Request) -> Response:
    """GET / where models answer."""
    return _page("page.html")


async def photos_page(_: Request) -> Response:
    """GET /photos"""
    return _page("photos.html")


def _page(name: str) -> Response:
    html, headers = _content(name)
    return Response(html, media_type="text/html", headers=headers)


@functools.cache
def _content(name: str) -> tuple[str, dict[str, str]]:
    """A page, and headers that allow its own script and style and this server, and no more."""
    html = (_FOLDER / name).read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hash(html, 'script')}",
        f"style-src {_hash(html, 'style')}",
        "img-src blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return html, {
        "Content-Security-Policy": "; ".join(policy),
        "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _hash(html: str, element: str) -> str:
    """The source expression of the page's one inline element of a kind."""
    found = re.search(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    assert found
    digest = hashlib.sha256(found[1].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
