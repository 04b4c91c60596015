"""Pictures and videos of a request -> the bytes of files, checked before anything is decoded."""

from __future__ import annotations

from dataclasses import dataclass

from edgevlm.errors import ImageError
from edgevlm.image import picture_size
from edgevlm.image.public import download_public
from edgevlm.image.urls import data_url_bytes
from edgevlm.server.limits import Limits
from edgevlm.server.problems import Problem, invalid


@dataclass(frozen=True)
class VideoFile:
    """The bytes of a video's file, frames a second that were asked for, and its place in the
    request.
    """

    data: bytes
    fps: float | None
    param: str


@dataclass(frozen=True)
class _Kind:
    """The kind of a URL: its name, its word in codes, and a type as an example."""

    name: str
    word: str
    type: str


_PICTURE = _Kind("picture", "image", "image/png")
_VIDEO = _Kind("video", "video", "video/mp4")


class Pictures:
    """The pictures and videos of one request, counted as they are read. `read` and `read_video`
    block while they download; `sizes` are the widths and heights of the pictures.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._count = 0
        self.sizes: list[tuple[int, int]] = []

    def read(self, url: str, param: str) -> bytes:
        """The bytes of the picture that a URL holds or names; raises Problem.

        What it names is never a file of this machine, whatever it looks like.
        """
        self._count_one(param)
        try:
            data = self._bytes(url, param, _PICTURE)
            self._check(picture_size(data), param)
        except ImageError as e:
            raise invalid(str(e), param, "invalid_image") from None
        return data

    def read_video(self, url: str, fps: float | None, param: str) -> VideoFile:
        """The video that a URL holds or names, by the same rules; raises Problem."""
        self._count_one(param)
        try:
            return VideoFile(self._bytes(url, param, _VIDEO), fps, param)
        except ImageError as e:
            raise invalid(str(e), param, "invalid_video") from None

    def _count_one(self, param: str) -> None:
        self._count += 1
        if self._count > self._limits.pictures:
            raise invalid(
                f"more than {self._limits.pictures} pictures and videos in one request; send fewer",
                param,
                "too_many_images",
            )

    def _bytes(self, url: str, param: str, kind: _Kind) -> bytes:
        scheme = url.partition(":")[0].strip().lower()
        if scheme == "data":
            return data_url_bytes(url.strip())
        if scheme not in ("http", "https"):
            raise invalid(
                f"a {kind.name} comes as a data URL, data:{kind.type};base64,...",
                param,
                f"invalid_{kind.word}_url",
            )
        if not self._limits.image_urls:
            raise invalid(
                f"this server does not fetch {kind.name}s from URLs; send a data URL, or start it "
                "with --allow-image-urls",
                param,
                "image_urls_not_allowed",
            )
        limits = self._limits
        seconds = min(limits.upload_seconds, limits.seconds)
        return download_public(url, max_bytes=limits.body_bytes, seconds=seconds)[0]

    def _check(self, size: tuple[int, int], param: str) -> None:
        width, height = size
        pixels, most = width * height, self._limits.pixels
        self.sizes.append(size)
        if pixels > most:
            raise Problem(
                413,
                f"a picture has {width} x {height} pixels, more than {most / 1e6:g} megapixels; "
                "scale it down",
                param=param,
                code="image_too_large",
            )
        if sum(w * h for w, h in self.sizes) > self._limits.pixels_together:
            raise Problem(
                413,
                "the pictures together have more than "
                f"{self._limits.pixels_together / 1e6:g} megapixels; scale them down",
                param=param,
                code="image_too_large",
            )
