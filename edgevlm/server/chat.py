"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
from anyio import to_thread
from starlette.types import Receive, Scope, Send

from edgevlm.runtimes.asynchronous import AsyncAnswer
from edgevlm.runtimes.messages import Message
from edgevlm.runtimes.session import VLM
from edgevlm.sampling import SamplingOptions
from edgevlm.server.bodies import ClientGone
from edgevlm.server.completion import Completion
from edgevlm.server.limits import Limits
from edgevlm.server.metrics import Metrics
from edgevlm.server.parameters import ChatRequest, read_request
from edgevlm.server.pictures import Pictures
from edgevlm.server.pool import LoadedModel, Pool
from edgevlm.server.problems import Json, problem_of
from edgevlm.server.requests import Requests, json_body, while_connected
from edgevlm.server.videos import with_frames

# Bodies that are read and pictures that are fetched at the same time, each in a thread.
_READERS = 8
_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would keep the events back
]


class ChatCompletions:
    """The endpoint, an ASGI application."""

    def __init__(self, pool: Pool, limits: Limits, metrics: Metrics, requests: Requests) -> None:
        self._pool, self._limits, self._metrics = pool, limits, metrics
        self._requests = requests
        self._readers: anyio.CapacityLimiter | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        stream, start = _Stream(send), time.monotonic()
        try:
            await self._requests.run(lambda: self._answered(scope, receive, stream, start))
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

    async def _answered(
        self, scope: Scope, receive: Receive, stream: _Stream, start: float
    ) -> None:
        """Reads a request and answers it, for as long as the client is there."""
        body = await json_body(scope, receive, self._limits)
        self._readers = self._readers or anyio.CapacityLimiter(_READERS)
        pictures = Pictures(self._limits)

        async def answer() -> None:
            nonlocal body
            asked = await to_thread.run_sync(read_request, body, pictures, limiter=self._readers)
            body = b""  # it may be large, and the wait long
            async with self._pool.lease(asked.model) as model:
                await self._drawn(asked, pictures, model, stream, start)

        await while_connected(receive, answer)

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
        async with model.turn, self._answer(asked, model.vlm) as answer:
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
    async def _answer(self, asked: ChatRequest, vlm: VLM) -> AsyncIterator[AsyncAnswer]:
        messages = await with_frames(vlm, asked.messages, self._limits)
        async with answering(vlm, messages, asked.options) as answer:
            yield answer


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
