"""Pictures and videos that were read, on their way to the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest

import numpy as np

from edgevlm.errors import PromptError
from edgevlm.films import Film
from edgevlm.image import ImageSource, Picture, Pixels, cut, read_picture
from edgevlm.image.plan import plan
from edgevlm.image.planned import Plan
from edgevlm.runtimes.cache import fingerprint
from edgevlm.runtimes.engines import Float
from edgevlm.specs import ImageSpec
from edgevlm.video import Video


@dataclass(frozen=True)
class Bitmap:
    """A picture that was read.

    `made` are embeddings, by their key, that were computed before anybody asked, and `took` are
    milliseconds by the names of Timings' fields, for these and for reading it; the first request
    that is about it counts both as its own. `source` is what it was read from. `then` is the frame
    of a video that the encoder sees together with it, of the same size.
    """

    picture: Picture
    made: dict[str, Float] = field(default_factory=dict, compare=False)
    took: dict[str, float] = field(default_factory=dict, compare=False)
    source: ImageSource | None = field(default=None, compare=False)
    then: Picture | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.picture.rgb.shape[:2]
        return width, height

    @cached_property
    def _fingerprint(self) -> str:
        own = fingerprint(self.picture)
        return f"{own} {fingerprint(self.then)}" if self.then else own

    def key(self, spec: ImageSpec) -> str:
        """The key of its embeddings; one that is among others may have another plan than alone."""
        return f"{self._fingerprint} {spec}"

    def cut(self, spec: ImageSpec) -> Pixels:
        """Its pixels float32 [tiles, 3, height, width], or of two frames [1, 6, height, width]."""
        pixels = cut(self.picture, spec)
        return np.concatenate([pixels, cut(self.then, spec)], 1) if self.then else pixels

    def plan(self, spec: ImageSpec) -> Plan:
        """Its way to the encoder; raises ImageError where there is none."""
        return plan(*self.size, spec)


@dataclass(frozen=True)
class Clip:
    """A video whose frames were read; `source` is the file that it was read from."""

    frames: Sequence[Bitmap]
    film: Film
    source: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, video: Video) -> Clip:
        """The frames of a video; raises ImageError."""
        frames = [Bitmap(read_picture(frame), source=frame) for frame in video.frames]
        return cls(frames, Film(tuple(video.times), video.duration, video.fps), video.source)

    @cached_property
    def pairs(self) -> list[Bitmap]:
        """The frames two by two, the last one of an odd number twice; raises PromptError where they
        are not of one size.
        """
        first = self.frames[0].size
        for i, frame in enumerate(self.frames):
            if frame.size != first:
                raise PromptError(
                    f"frame {i + 1} of the video has {frame.size[0]} x {frame.size[1]} pixels, the "
                    f"first one {first[0]} x {first[1]}; make them of one size"
                )
        pairs = zip_longest(self.frames[::2], self.frames[1::2], fillvalue=self.frames[-1])
        return [replace(one, then=other.picture) for one, other in pairs]

    @property
    def video(self) -> Video:
        """It as users have it."""
        film, frames = self.film, [frame.picture.rgb for frame in self.frames]
        return Video(frames, film.times, film.duration, film.fps, self.source)


# What comes with a question, read, and as users give it.
Shown = Bitmap | Clip
ShownSource = ImageSource | Video | Shown


def read(images: Sequence[ShownSource]) -> list[Shown]:
    """The pictures and videos, each read if it was not; raises ImageError."""
    return [_read(image) for image in images]


def _read(image: ShownSource) -> Shown:
    if isinstance(image, Bitmap | Clip):
        return image
    if isinstance(image, Video):
        return Clip.of(image)
    return Bitmap(read_picture(image), source=_lasting(image))


def is_film(image: ShownSource) -> bool:
    """True for a video."""
    return isinstance(image, Video | Clip)


def still(shown: Sequence[Shown]) -> Bitmap:
    """The one picture among these; raises PromptError for a video."""
    (picture,) = shown
    if isinstance(picture, Clip):
        raise PromptError("a picture is wanted here; a video comes with a question")
    return picture


def _lasting(source: ImageSource) -> ImageSource | None:
    """A source as replies keep it, who may be pickled: a file that was read is at its end."""
    if hasattr(source, "read"):
        return None
    return bytes(source) if isinstance(source, memoryview) else source
