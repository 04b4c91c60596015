"""The socket that the server listens on, and its end on a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Any

import uvicorn

from edgevlm.errors import EdgeVLMError
from edgevlm.server.app import Server

# Running answers have so long to end after a signal, and their clients to hear of it afterwards.
GRACE_S = 5.0
_FAREWELL_S = 2
# Clients that keep connections meet a closed one the more seldom the longer this is.
_KEEP_ALIVE_S = 75


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any that is free. Raises EdgeVLMError."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            if os.name == "posix":  # Windows would let two servers have the same port
                # A port of a server that has just ended can be used again.
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen()
        except OSError:
            made.close()
            raise
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise EdgeVLMError(
            f"cannot listen on {host} port {port} ({reason}); --host and --port choose others"
        ) from None
    return made


def url(made: socket.socket) -> str:
    """The address at which a browser on this machine finds a listening socket."""
    host, port = made.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Runner(uvicorn.Server):
    """A running server. In the main thread a signal ends it, and is raised again at its end."""

    def __init__(self, server: Server, grace_s: float = GRACE_S) -> None:
        self._requests, self._grace_s = server.requests, grace_s
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._ignored = [n for n in numbers if signal.getsignal(n) is signal.SIG_IGN]
        config = uvicorn.Config(
            server.app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            ws="none",
            timeout_graceful_shutdown=int(grace_s) + _FAREWELL_S,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server. Running answers end by themselves or with an error."""
        self._requests.ending = True
        asyncio.get_running_loop().call_later(self._grace_s, self._requests.end)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """See uvicorn.Server. A second signal waits for nothing; one that somebody ignores, as a
        shell does for its background jobs, stays ignored.
        """
        if sig in self._ignored:
            return
        if self.should_exit:
            self.force_exit = True
        super().handle_exit(sig, frame)
