"""Requests that run or wait, of all endpoints: room for them, their time, and their end."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgevlm.server.bodies import ClientGone, read_body
from edgevlm.server.limits import Limits
from edgevlm.server.problems import Json, Problem, problem_of

# The weight of the last request in the mean by which clients are told when to come back.
_LAST = 0.2
_LONGEST_RETRY_S = 60


class Requests:
    """The requests of a server. While it is `ending` it takes no more; `end` stops those that
    run.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._running: set[anyio.CancelScope] = set()
        self._mean_s = 1.0
        self.ending = False

    @property
    def n_running(self) -> int:
        """Requests that run or wait."""
        return len(self._running)

    def end(self) -> None:
        """Ends running requests, each with an error, and takes no more."""
        self.ending = True
        for scope in self._running:
            scope.cancel()

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does a request's work. Raises Problem where there is no room for it, where it takes too
        long, and at the end of the server.
        """
        self._check_room()
        start = time.monotonic()
        with anyio.move_on_after(self._limits.seconds) as patience:
            self._running.add(patience)
            try:
                await work()
            finally:
                self._running.discard(patience)
            self._mean_s += _LAST * (time.monotonic() - start - self._mean_s)
        if patience.cancelled_caught:
            raise self._out_of_time()

    def _check_room(self) -> None:
        if self.ending:
            raise Problem(503, "the server is ending", code="server_ending")
        if len(self._running) >= self._limits.requests:
            after = min(_LONGEST_RETRY_S, math.ceil(self._mean_s * len(self._running)))
            raise Problem(
                429,
                f"the server already has {len(self._running)} requests; ask again in {after} s",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(after)},
            )

    def _out_of_time(self) -> Problem:
        if self.ending:
            return Problem(503, "the server is ending", code="server_ending")
        return Problem(
            503, f"the answer took longer than {self._limits.seconds:g} seconds", code="timeout"
        )


class JsonEndpoint:
    """An endpoint, an ASGI application, that answers a body in JSON with an object: `answer` makes
    it of the body; it is cancelled where the client hangs up.
    """

    def __init__(
        self,
        requests: Requests,
        limits: Limits,
        answer: Callable[[bytes], Awaitable[dict[str, Any]]],
    ) -> None:
        self._requests, self._limits, self._answer = requests, limits, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        answered: dict[str, Any] = {}

        async def work() -> None:
            body = await json_body(scope, receive, self._limits)

            async def answer() -> None:
                answered.update(await self._answer(body))

            await while_connected(receive, answer)

        try:
            await self._requests.run(work)
            response: Response = Json(answered)
        except ClientGone:
            return
        except Exception as e:
            response = problem_of(e).response()
        await response(scope, receive, send)


async def json_body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The body of a request that says it is JSON. Raises Problem, ClientGone."""
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other origins cannot send this type without being allowed to.
        raise Problem(415, "send the request as application/json", code="unsupported_content_type")
    return await read_body(receive, headers.get("content-length"), limits)


async def while_connected(receive: Receive, work: Callable[[], Awaitable[None]]) -> None:
    """Does the work; where the client hangs up first it is cancelled, and ClientGone raised."""
    failed: Exception | None = None
    gone = False
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            await work()
        except Exception as e:
            failed = e
        group.cancel_scope.cancel()
    if failed:
        raise failed
    if gone:
        raise ClientGone
