"""Bodies of requests: read within their limits, or taken in and dropped."""

from __future__ import annotations

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgevlm.server.limits import Limits
from edgevlm.server.problems import Problem

# A client that is still sending when it is refused would see a broken connection, not the reason.
_DRAIN_SECONDS = 5.0
_DRAIN_FACTOR = 2


class ClientGone(Exception):
    """The client hung up before its request was whole."""


async def read_body(receive: Receive, content_length: str | None, limits: Limits) -> bytes:
    """The whole body of a request. Raises Problem, ClientGone."""
    most = limits.body_bytes
    too_large = Problem(
        413, f"the request is larger than {most / 2**20:g} MiB", code="request_too_large"
    )
    if content_length and content_length.isdecimal() and int(content_length) > most:
        raise too_large
    blocks, size = [], 0
    with anyio.move_on_after(limits.upload_seconds):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            blocks.append(message.get("body", b""))
            size += len(blocks[-1])
            if size > most:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(blocks)
    raise Problem(
        408,
        f"the request did not arrive within {limits.upload_seconds:g} seconds",
        code="request_timeout",
    )


class Draining:
    """Takes in the rest of a body before a response begins, within bounds."""

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self._app, self._most = app, _DRAIN_FACTOR * limits.body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Who asks first whether to send a body has not sent any yet.
        begun, asks_first = False, Headers(scope=scope).get("expect", "").lower() == "100-continue"
        ended = False

        async def watched() -> Message:
            nonlocal begun, ended
            begun = True
            message = await receive()
            ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

        async def drained(message: Message) -> None:
            sent = begun or not asks_first
            if message["type"] == "http.response.start" and sent and not ended:
                size = 0
                with anyio.move_on_after(_DRAIN_SECONDS):
                    while not ended and size <= self._most:
                        size += len((await watched()).get("body", b""))
            await send(message)

        await self._app(scope, watched, drained)
