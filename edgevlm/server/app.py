"""The application: routes, and what every request passes on its way to one."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

import edgevlm
from edgevlm.errors import EdgeVLMError
from edgevlm.manifest import MANIFEST, read_manifest
from edgevlm.models import is_dual
from edgevlm.server.access import Access, Guard
from edgevlm.server.bodies import Draining
from edgevlm.server.chat import ChatCompletions
from edgevlm.server.embeddings import Embeddings
from edgevlm.server.limits import Limits
from edgevlm.server.metrics import CONTENT_TYPE, Counting, Metrics
from edgevlm.server.page import ask_page, photos_page
from edgevlm.server.photos import Photos
from edgevlm.server.pool import Pool
from edgevlm.server.problems import Json, Problem, problem_of, quoted
from edgevlm.server.requests import JsonEndpoint, Requests


@dataclass(frozen=True)
class Server:
    """The application with what runs in it."""

    app: Starlette
    requests: Requests


class _Views:
    """The endpoints that answer at once."""

    def __init__(self, pool: Pool, metrics: Metrics, requests: Requests, photos: bool) -> None:
        self._pool, self._metrics, self._requests = pool, metrics, requests
        self._photos = photos

    async def page(self, request: Request) -> Response:
        """GET /: the page to ask models or, where none answers, the one to search pictures."""
        answering = not all(map(is_dual, self._pool.offered().values()))
        if self._photos and not answering:
            return RedirectResponse("/photos")
        return await ask_page(request)

    async def models(self, _: Request) -> Response:
        """GET /v1/models"""
        data = [found for name in self._pool.offered() if (found := self._model(name))]
        return Json({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}"""
        name = request.path_params["id"]
        found = self._model(name) if name in self._pool.offered() else None
        if not found:
            raise Problem(
                404,
                f"the model {quoted(name)} does not exist here; GET /v1/models lists those that do",
                code="model_not_found",
                param="model",
            )
        return Json(found)

    def _model(self, name: str) -> dict[str, object] | None:
        """A model as the list has it; None for one whose bundle cannot be read."""
        folder = self._pool.offered()[name]
        try:
            manifest = read_manifest(folder)
            created = int(os.stat(folder / MANIFEST).st_mtime)
        except (EdgeVLMError, OSError):
            return None
        tasks, templates = manifest.prompt.tasks, manifest.prompt.task_templates
        extras = {
            "family": manifest.family,
            "loaded": name in self._pool.loaded,
            "pictures": manifest.image.max_pictures,
            "embeddings": manifest.text.width if manifest.text else None,
            "photos": self._photos,
            "videos": manifest.prompt.video is not None,
            "conversations": bool(manifest.prompt.turn),
            "system": bool(manifest.prompt.system_template),
            # What a message can ask for; some models write a task as no message can.
            "tasks": {t: text for t, text in tasks.items() if t not in templates},
        }
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "edgevlm",
            "edgevlm": extras,
        }

    async def health(self, _: Request) -> Response:
        """GET /health"""
        status, code = ("ending", 503) if self._requests.ending else ("ok", 200)
        return Json({"status": status, "version": edgevlm.__version__}, code)

    async def metrics(self, _: Request) -> Response:
        """GET /metrics"""
        return Response(self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})


def make_server(pool: Pool, access: Access, limits: Limits, photos: Photos | None = None) -> Server:
    """The server of a pool's models, and of a folder's pictures."""
    requests = Requests(limits)
    metrics = Metrics(lambda: requests.n_running, lambda: len(pool.loaded))
    views = _Views(pool, metrics, requests, photos is not None)

    def endpoint(answer: Callable[[bytes], Awaitable[dict[str, Any]]]) -> JsonEndpoint:
        return JsonEndpoint(requests, limits, answer)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        pool.begin()
        async with photos.open(pool) if photos else nullcontext():
            yield
        await pool.close()

    middleware = [Middleware(Counting, metrics=metrics), Middleware(Draining, limits=limits)]
    if access.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=access.origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        )
    middleware.append(Middleware(Guard, access=access))
    chat = ChatCompletions(pool, limits, metrics, requests)
    searched = (
        (
            Route("/photos", photos_page),
            Route("/photos/status", photos.status),
            Route("/photos/update", endpoint(photos.update), methods=["POST"]),
            Route("/photos/search", endpoint(photos.search), methods=["POST"]),
            Route("/photos/duplicates", endpoint(photos.duplicates), methods=["POST"]),
            Route("/photos/{id}/{size}", photos.picture),
        )
        if photos
        else ()
    )
    app = Starlette(
        routes=[
            Route("/", views.page),
            Route("/health", views.health),
            Route("/metrics", views.metrics),
            Route("/v1/models", views.models),
            Route("/v1/models/{id:path}", views.model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/embeddings", endpoint(Embeddings(pool, limits).answer), methods=["POST"]),
            *searched,
        ],
        middleware=middleware,
        exception_handlers={
            Problem: _problem,
            HTTPException: _http_problem,
            Exception: _defect,
        },
        lifespan=lifespan,
    )
    return Server(app, requests)


async def _problem(_: Request, error: Exception) -> Response:
    return problem_of(error).response()


async def _defect(*_: object) -> Response:
    """A defect of the server's; uvicorn writes it into the log."""
    return Problem(500, "the server failed on this request; its log says why").response()


async def _http_problem(request: Request, error: Exception) -> Response:
    """A path or a method that no route has."""
    assert isinstance(error, HTTPException)
    known = {404: "no such path", 405: f"the method {request.method} is not for this path"}
    message = f"{known.get(error.status_code, error.detail)}: {quoted(request.url.path)}"
    return Problem(error.status_code, message, headers=error.headers).response()
