"""Downloads from public addresses only, for servers: what is in their own network is not for those
who ask them.

The address that was checked is the one that is connected to, at each redirect anew, so that no
answer of a name server can come in between. Proxies of the environment are passed by: they would
look names up themselves.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.request
from collections.abc import Sequence
from typing import Any

from edgevlm.errors import ImageError
from edgevlm.image.fetch import download
from edgevlm.image.urls import Address

# All that is routed on the internet today; the rest of IPv6 is reserved or local.
_ROUTED = ipaddress.ip_network("2000::/3")


def is_public(address: str) -> bool:
    """True for an IP address that belongs to the internet, not to this machine or its network.

    >>> is_public("8.8.8.8"), is_public("192.168.0.1"), is_public("::ffff:127.0.0.1")
    (True, False, False)
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # Tunnels to an IPv4 address, which may be a private one.
        tunnelled = ip.ipv4_mapped or ip.sixtofour or ip.teredo
        return not tunnelled and ip in _ROUTED and ip.is_global and not ip.is_multicast
    return ip.is_global and not ip.is_multicast


def download_public(url: str, *, max_bytes: int, seconds: float) -> tuple[bytes, str]:
    """Downloads a http or https URL, redirects followed, within so many seconds: the body, and its
    name for messages.

    Raises ImageError, also where a host has an address that is not public.
    """
    calls = _Calls()
    timer = threading.Timer(seconds, calls.hang_up)
    timer.daemon = True
    timer.start()
    try:
        return download(url, calls.handlers, max_bytes)
    except ImageError as e:
        if calls.late:
            shown = Address.of(url).shown
            raise ImageError(shown, f"was not downloaded within {seconds:g} seconds") from None
        raise e
    finally:
        timer.cancel()


class _Calls:
    """The connections of one download."""

    def __init__(self) -> None:
        self.late = False
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    def handlers(self) -> Sequence[urllib.request.BaseHandler]:
        """Handlers whose connections are made here."""
        return [_Http(self), _Https(self)]

    def connect(self, host: str, port: int, timeout: Any, *, tls: bool) -> socket.socket:
        """A connection to a host's first address that answers; OSError where one is not public."""
        found = [
            str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        ]
        if not all(map(is_public, found)):
            raise OSError("the address is not a public one")
        refused: OSError = OSError("the host has no address")
        for address in found:
            try:
                made = socket.create_connection((address, port), timeout)
            except OSError as e:
                refused = e
            else:
                return self._under_tls(made, host) if tls else self._kept(made)
        raise refused

    def _under_tls(self, made: socket.socket, host: str) -> socket.socket:
        context = ssl.create_default_context()
        kept = context.wrap_socket(made, server_hostname=host, do_handshake_on_connect=False)
        self._kept(kept)
        kept.do_handshake()
        return kept

    def _kept(self, made: socket.socket) -> socket.socket:
        with self._lock:
            self._sockets.append(made)
            if self.late:
                _shut(made)
        return made

    def hang_up(self) -> None:
        """Ends all connections, from another thread."""
        with self._lock:
            self.late = True
            for made in self._sockets:
                _shut(made)


def _shut(made: socket.socket) -> None:
    try:
        # TLS's own would pull the connection from under the thread that reads.
        socket.socket.shutdown(made, socket.SHUT_RDWR)
    except OSError:
        pass  # It has ended by itself.


class _Plain(http.client.HTTPConnection):
    """A connection that one of `calls` makes."""

    calls: _Calls

    def connect(self) -> None:
        self.sock = self.calls.connect(self.host, self.port, self.timeout, tls=False)


class _Tls(_Plain):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        self.sock = self.calls.connect(self.host, self.port, self.timeout, tls=True)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_made_by(self._calls, _Plain), req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_made_by(self._calls, _Tls), req)


def _made_by(calls: _Calls, kind: type[_Plain]) -> Any:
    def make(host: str, **options: Any) -> _Plain:
        connection = kind(host, **options)
        connection.calls = calls
        return connection

    return make
