"""A folder's pictures, indexed beside the requests and searched by them, for the page /photos.

Pictures go by ids that searches have handed out, and are served only as the index holds them: a
file that has changed since, or is a link to another one now, is not. Files themselves are never
sent, with what they say of places and cameras, but pictures that are drawn anew.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from PIL import Image
from starlette.requests import Request
from starlette.responses import Response

from edgevlm.errors import EdgeVLMError, ImageError
from edgevlm.image import picture_size, read_image
from edgevlm.photos import FoundPhoto, PhotoIndex
from edgevlm.photos.index import IndexUpdate
from edgevlm.server.limits import Limits
from edgevlm.server.messages import ReadPicture
from edgevlm.server.parameters import json_object
from edgevlm.server.pictures import Pictures
from edgevlm.server.pool import Pool
from edgevlm.server.problems import Json, Problem, invalid, quoted
from edgevlm.types import Progress

# Longer sides of the pictures that are sent, in pixels.
_SIDES = {"small": 360, "large": 2048}
_MOST_FOUND = 500
_KEPT = 1000
# Pictures that are decoded at the same time.
_DECODERS = 2
_NAMED = 5


class _Stopped(Exception):
    """The server ends while a folder is being indexed."""


@dataclass(frozen=True)
class PhotoQuery:
    """A checked search: words, a picture's file, or the id of a picture that was found."""

    text: str = ""
    image: bytes | None = None
    id: str = ""
    limit: int = 30


def read_query(body: bytes, read_picture: ReadPicture) -> PhotoQuery:
    """Reads the body of a search. Raises Problem."""
    given = json_object(body)
    limit = given.pop("limit", PhotoQuery.limit)
    if type(limit) is not int or not 1 <= limit <= _MOST_FOUND:
        raise invalid(f"limit must be a whole number from 1 to {_MOST_FOUND}", "limit")
    if len(given) != 1 or not given.keys() <= {"text", "image", "id"}:
        raise invalid("a search names one of text, image or id, and a limit")
    ((name, value),) = given.items()
    if not isinstance(value, str) or not value.strip():
        raise invalid(f"{name} must be a text that is not empty", name)
    if name == "image":
        return PhotoQuery(image=read_picture(value, name), limit=limit)
    text, id = (value, "") if name == "text" else ("", value)
    return PhotoQuery(text=text, id=id, limit=limit)


class Photos:
    """The endpoints of an index whose model goes by a name in the pool; that stays loaded."""

    def __init__(self, index: PhotoIndex, model: str, limits: Limits) -> None:
        self._index, self._model, self._limits = index, model, limits
        self._progress: Progress | None = None
        self._indexed: IndexUpdate | None = None
        self._problem = ""
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._ids: dict[str, Path] = {}
        self._small: OrderedDict[str, bytes] = OrderedDict()
        self._decoders: anyio.CapacityLimiter | None = None

    @asynccontextmanager
    async def open(self, pool: Pool) -> AsyncIterator[None]:
        """Begins to index, and ends that with the block."""
        self._decoders = anyio.CapacityLimiter(_DECODERS)
        async with pool.lease(self._model):
            self._begin()
            try:
                yield
            finally:
                self._stopped = True
                if self._task:
                    await asyncio.wait([self._task])
                self.close()

    def close(self) -> None:
        """Closes the index."""
        self._index.close()

    def _begin(self) -> None:
        if self._task is None or self._task.done():
            self._progress, self._problem = Progress("index", 0, 0, "pictures"), ""
            self._task = asyncio.create_task(self._updated())

    async def _updated(self) -> None:
        """Brings the index up to date; what goes wrong is for the page to show."""

        def show(progress: Progress) -> None:
            self._progress = progress
            if self._stopped:
                raise _Stopped

        try:
            self._indexed = await asyncio.to_thread(self._index.update, show)
        except _Stopped:
            pass
        except EdgeVLMError as e:
            self._problem = str(e)
        finally:
            self._progress = None

    async def status(self, _: Request) -> Response:
        """GET /photos/status"""
        now, failures = self._progress, self._indexed.failures if self._indexed else {}
        return Json(
            {
                "folder": self._index.folder.resolve().name,
                "pictures": await to_thread.run_sync(len, self._index),
                "indexing": {"done": now.done, "total": now.total} if now else None,
                "problem": self._problem,
                "failures": [
                    {"path": self._relative(file), "reason": reason}
                    for file, reason in list(failures.items())[:_NAMED]
                ],
                "n_failures": len(failures),
            }
        )

    async def update(self, _: bytes) -> dict[str, Any]:
        """POST /photos/update: looks for changes."""
        self._begin()
        return {"indexing": True}

    async def search(self, body: bytes) -> dict[str, Any]:
        """POST /photos/search"""
        asked = await to_thread.run_sync(read_query, body, Pictures(self._limits).read)
        try:
            found = await to_thread.run_sync(self._found, asked)
            return {"photos": await to_thread.run_sync(self._shown, found)}
        except ImageError as e:
            raise invalid(str(e), "image", "invalid_image") from None

    def _found(self, asked: PhotoQuery) -> list[FoundPhoto]:
        if asked.image is not None:
            return self._index.similar(asked.image, asked.limit)
        if asked.id:
            row = self._index.row(self._file(asked.id))
            if row is None:
                raise _gone()
            return self._index.search(row, asked.limit)
        return self._index.search(asked.text, asked.limit)

    async def duplicates(self, body: bytes) -> dict[str, Any]:
        """POST /photos/duplicates"""
        given = json_object(body)
        threshold = given.pop("threshold", 0.97)
        if given or isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
            raise invalid("duplicates takes a threshold, a cosine such as 0.97", "threshold")
        groups = await to_thread.run_sync(self._index.duplicates, threshold)
        kept = [await to_thread.run_sync(self._shown, group) for group in groups[:_MOST_FOUND]]
        return {"groups": kept, "n_groups": len(groups)}

    async def picture(self, request: Request) -> Response:
        """GET /photos/{id}/{size}: the picture as a JPEG, upright."""
        number, size = request.path_params["id"], request.path_params["size"]
        if size not in _SIDES:
            raise Problem(404, f"a picture is small or large, not {quoted(size)}")
        file = self._file(number)
        jpeg = self._small.get(number) if size == "small" else None
        if jpeg is None:
            jpeg = await to_thread.run_sync(self._drawn, file, _SIDES[size], limiter=self._decoders)
        if size == "small":
            self._small[number] = jpeg
            self._small.move_to_end(number)
            while len(self._small) > _KEPT:
                self._small.popitem(last=False)
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return Response(jpeg, media_type="image/jpeg", headers=headers)

    def _drawn(self, file: Path, side: int) -> bytes:
        """A JPEG of an indexed picture within a square. Raises Problem."""
        try:
            data = self._index.read(file)
            width, height = picture_size(data)
            if width * height > self._limits.pixels:
                raise Problem(
                    413, f"the picture has {width} x {height} pixels, too many to show it here",
                    code="image_too_large",
                )  # fmt: skip
            shown = Image.fromarray(read_image(data))
        except ImageError:
            raise _gone() from None
        shown.thumbnail((side, side))
        buffer = io.BytesIO()
        shown.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def _file(self, id: str) -> Path:
        """The file of an id that a search has handed out. Raises Problem."""
        try:
            return self._ids[id]
        except KeyError:
            raise _gone() from None

    def _shown(self, found: Sequence[FoundPhoto]) -> list[dict[str, Any]]:
        return [
            {"id": self._id(photo.file), "path": self._relative(photo.file), "score": photo.score}
            for photo in found
        ]

    def _id(self, file: Path) -> str:
        """An id that is another one once the picture has changed."""
        known = (os.fsencode(file), self._index.fingerprint(file))
        id = hashlib.blake2b(repr(known).encode(), digest_size=12).hexdigest()
        self._ids[id] = file
        return id

    def _relative(self, file: Path) -> str:
        path = os.path.relpath(file, self._index.folder)
        return path.encode(errors="replace").decode()


def _gone() -> Problem:
    return Problem(
        404, "the picture is not in the index, or has changed since; search again",
        code="photo_not_found",
    )  # fmt: skip
