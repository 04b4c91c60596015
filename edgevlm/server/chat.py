"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from edgevlm.runtimes.asynchronous import AsyncAnswer
from edgevlm.runtimes.messages import Message
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import SamplingOptions
from edgevlm.server.bodies import ClientGone, read_body
from edgevlm.server.completion import Completion
from edgevlm.server.limits import Limits
from edgevlm.server.metrics import Metrics
from edgevlm.server.parameters import ChatRequest, read_request
from edgevlm.server.pictures import Pictures
from edgevlm.server.pool import LoadedModel, Pool
from edgevlm.server.problems import Json, Problem, problem_of

# Bodies that are read and pictures that are fetched at the same time, each in a thread.
_READERS = 8
# The weight of the last answer in the mean by which clients are told when to come back.
_LAST = 0.2
_LONGEST_RETRY_S = 60
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep the events back
]


class ChatCompletions:
    """The endpoint, an ASGI application. While it is `ending` it takes no requests; `end` stops
    those that run.
    """

    def __init__(self, pool: Pool, limits: Limits, metrics: Metrics) -> None:
        self._pool, self._limits, self._metrics = pool, limits, metrics
        self._running: set[anyio.CancelScope] = set()
        self._readers: anyio.CapacityLimiter | None = None
        self.ending = False
        self._mean_s = 1.0

    def end(self) -> None:
        """Ends running answers, each with an error, and takes no more."""
        self.ending = True
        for scope in self._running:
            scope.cancel()

    @property
    def n_running(self) -> int:
        """Requests that run or wait."""
        return len(self._running)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        stream = _Stream(send)
        try:
            self._check_room()
            await self._within_time(scope, receive, stream)
            return
        except ClientGone:
            return
        except Exception as e:
            problem = problem_of(e)
        if stream.begun:
            await stream.event(problem.body)
            await stream.end()
        else:
            await problem.response()(scope, receive, send)

    async def _within_time(self, scope: Scope, receive: Receive, stream: _Stream) -> None:
        with anyio.move_on_after(self._limits.seconds) as patience:
            self._running.add(patience)
            try:
                await self._answered(scope, receive, stream, time.monotonic())
            finally:
                self._running.discard(patience)
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

    async def _answered(
        self, scope: Scope, receive: Receive, stream: _Stream, start: float
    ) -> None:
        """Reads a request and answers it, for as long as the client is there."""
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Pages of other origins cannot send this type without being allowed to.
            raise Problem(
                415, "send the request as application/json", code="unsupported_content_type"
            )
        body = await read_body(receive, headers.get("content-length"), self._limits)
        self._readers = self._readers or anyio.CapacityLimiter(_READERS)
        pictures = Pictures(self._limits)

        async def answer() -> None:
            nonlocal body
            asked = await to_thread.run_sync(
                read_request, body, pictures.read, limiter=self._readers
            )
            body = b""  # it may be large, and the wait long
            async with self._pool.lease(asked.model) as model:
                await self._drawn(asked, pictures, model, stream, start)

        await while_connected(receive, answer)
        self._mean_s += _LAST * (time.monotonic() - start - self._mean_s)

    async def _drawn(
        self,
        asked: ChatRequest,
        pictures: Pictures,
        model: LoadedModel,
        stream: _Stream,
        start: float,
    ) -> None:
        completion = Completion(asked.model, include_usage=asked.include_usage)
        logprobs = "logprobs" in asked.options
        # Pictures are decoded only now: those of requests that wait are files as they came.
        async with model.turn, answering(model.vlm, asked.messages, asked.options) as answer:
            first = True
            async for piece in answer:
                if first:
                    self._metrics.first_token(asked.model, time.monotonic() - start)
                    first = False
                if asked.stream and (piece.text or logprobs):
                    await stream.event(completion.next(piece, logprobs=logprobs), completion)
            reply = answer.reply
        if any(box.segment for box in reply.boxes):
            found = await to_thread.run_sync(model.vlm.masked, reply.boxes, *pictures.sizes[0])
            reply = replace(reply, boxes=tuple(found))
        self._metrics.answered(asked.model, reply)
        if asked.stream:
            for chunk in completion.last(reply):
                await stream.event(chunk, completion)
            await stream.done()
        else:
            await stream.whole(completion.whole(reply, logprobs=logprobs))


@asynccontextmanager
async def answering(
    vlm: VLM, messages: Sequence[Message], options: SamplingOptions
) -> AsyncIterator[AsyncAnswer]:
    """An answer that has ended when the block ends."""
    answer = vlm.astream(messages, **options)
    try:
        yield answer
    finally:
        with anyio.CancelScope(shield=True):
            await answer.aclose()


class _Stream:
    """The response: one body in JSON, or events one after the other."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def whole(self, body: dict[str, Any]) -> None:
        """Sends a body in JSON."""
        self.begun = True
        response = Json(body)
        await self._send(
            {"type": "http.response.start", "status": 200, "headers": response.raw_headers}
        )
        await self._send({"type": "http.response.body", "body": response.body})

    async def event(self, data: dict[str, Any], completion: Completion | None = None) -> None:
        """Sends one event; before the first one, the chunk that begins a completion."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
            if completion:
                await self._write(completion.first())
        await self._write(data)

    async def done(self) -> None:
        """Ends a whole answer."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def end(self) -> None:
        """Ends the response."""
        await self._send({"type": "http.response.body", "body": b""})

    async def _write(self, data: dict[str, Any]) -> None:
        body = f"data: {json.dumps(data, allow_nan=False)}\n\n".encode("ascii")
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        # The loop may learn now that the client hung up, before more is written to nobody.
        await anyio.lowlevel.checkpoint()


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
