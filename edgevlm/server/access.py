"""Access to the server: the hosts it answers to, the pages that may ask it, and its key.

A page on the web can make a browser send requests to this machine, under the machine's own
addresses or, with a name server of its own, under any name (DNS rebinding). So a request must name
an address or a name that is known, and one that a page sends must come from the server's own page
or from one that was allowed.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from edgevlm.server.problems import Problem, quoted

# Whoever watches the server, or opens its page to type the key in, has no key yet.
_PAGES = ("/", "/photos")
_OPEN_PATHS = (*_PAGES, "/health")


@dataclass(frozen=True)
class Access:
    """Rules of who may ask.

    key: the key that clients send as a bearer token; None for none. hosts: names that the server
    answers to besides localhost, this machine's own and addresses of numbers. origins: origins of
    pages elsewhere that may ask, such as "https://app.example".
    """

    key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def refusal(self, method: str, path: str, headers: Mapping[str, str]) -> Problem | None:
        """The reason not to answer; None where there is none."""
        host = headers.get("host", "")
        if not self._is_own(host):
            return Problem(
                403,
                f"the server does not answer to the host {quoted(host)}; --allow-host adds a name",
                code="host_not_allowed",
            )
        if self._is_foreign(method, path, host, headers):
            return Problem(
                403,
                "this page may not ask the server; --allow-origin allows a page of another origin",
                code="origin_not_allowed",
            )
        if self.key is not None and path not in _OPEN_PATHS:
            return self._key_refusal(headers.get("authorization", ""))
        return None

    def _is_own(self, host: str) -> bool:
        name = _name(host)
        if name is None:
            return False
        try:
            # No name server can make these mean another machine.
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name in {"localhost", socket.gethostname().lower(), *map(str.lower, self.hosts)}

    def _is_foreign(self, method: str, path: str, host: str, headers: Mapping[str, str]) -> bool:
        origin = headers.get("origin")
        if origin is not None:
            return origin not in self.origins and _authority(origin) != host.lower()
        # Without an origin come requests of programs, and of pages that only lead here.
        leads_here = path in _PAGES and headers.get("sec-fetch-mode") == "navigate"
        elsewhere = headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
        return elsewhere and not (method in ("GET", "HEAD") and leads_here)

    def _key_refusal(self, authorization: str) -> Problem | None:
        assert self.key is not None
        scheme, _, given = authorization.partition(" ")
        # Headers are read as Latin-1; clients send a key in UTF-8.
        right = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())
        if right and scheme.lower() == "bearer":
            return None
        said = "the key is wrong" if given else "a key is missing"
        return Problem(
            401,
            f"{said}; send the server's key as `Authorization: Bearer KEY`",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class Guard:
    """Lets through what `access` does not refuse."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            refusal = self._access.refusal(scope["method"], scope["path"], headers)
            if refusal:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(host: str) -> str | None:
    """The name in a Host header, without its port; None where it is not a valid one."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host else None


def _authority(origin: str) -> str | None:
    """The host and port of an origin, as a Host header has them; None for the origin "null"."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None
