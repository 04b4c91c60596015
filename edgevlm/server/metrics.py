"""Counters and times for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgevlm.types import Reply

CONTENT_TYPE = CONTENT_TYPE_LATEST
# From a stage of pico's to a large picture on a small machine.
_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STAGES = ("image_decode", "preprocess", "vision", "projector", "prefill", "decode")
_ROUTES = (
    "/",
    "/health",
    "/metrics",
    "/photos",
    "/photos/duplicates",
    "/photos/search",
    "/photos/status",
    "/photos/update",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/models",
)
# As other servers count requests whose client went away.
_GONE = 499


class Metrics:
    """All that is counted; `queue` and `loaded` are asked for their numbers when those are read."""

    def __init__(self, queue: Callable[[], int], loaded: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "edgevlm_requests", "Requests by route and status.", ["route", "code"],
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "edgevlm_tokens", "Tokens by kind: image, text, cached, generated.", ["model", "kind"],
            registry=registry,
        )  # fmt: skip
        self._first_token = Histogram(
            "edgevlm_first_token_seconds", "Time from a request to its first token, waiting "
            "included.", ["model"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._stage = Histogram(
            "edgevlm_stage_seconds", "Time of each stage of an answer.", ["model", "stage"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        for name, text, ask in (
            ("edgevlm_queue_length", "Answers that run or wait.", queue),
            ("edgevlm_models_loaded", "Models in memory.", loaded),
        ):
            Gauge(name, text, registry=registry).set_function(ask)

    def first_token(self, model: str, seconds: float) -> None:
        """Counts the time to an answer's first token."""
        self._first_token.labels(model).observe(seconds)

    def answered(self, model: str, reply: Reply) -> None:
        """Counts an answer's tokens and stages."""
        n = reply.tokens
        for kind in ("image", "text", "cached", "generated"):
            self._tokens.labels(model, kind).inc(getattr(n, kind))
        for stage in _STAGES:
            ms = getattr(reply.timings, f"{stage}_ms")
            self._stage.labels(model, stage).observe(ms / 1e3)

    def text(self) -> bytes:
        """The numbers as Prometheus reads them."""
        return generate_latest(self._registry)

    def requested(self, path: str, code: int) -> None:
        """Counts a request. Paths that are not routes count as one: anybody can make them up."""
        route = path if path in _ROUTES else "other"
        if path.startswith("/v1/models/"):
            route = "/v1/models/{id}"
        elif path.startswith("/photos/") and route == "other":
            route = "/photos/{id}/{size}"
        self._requests.labels(route, str(code)).inc()


class Counting:
    """Counts every request that passes."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        code = _GONE

        async def noted(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._metrics.requested(scope["path"], code)
