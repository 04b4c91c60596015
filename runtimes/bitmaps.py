"""Pictures that were read, on their way to the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from edgevlm.image import ImageSource, Picture, read_picture
from edgevlm.image.plan import Plan, plan
from edgevlm.runtimes.cache import fingerprint
from edgevlm.runtimes.engines import Float
from edgevlm.specs import ImageSpec


@dataclass(frozen=True)
class Bitmap:
    """A picture that was read.

    `made` are embeddings, by their key, that were computed before anybody asked, and `took` are
    milliseconds by the names of Timings' fields, for these and for reading it; the first request
    that is about it counts both as its own. `source` is what it was read from.
    """

    picture: Picture
    made: dict[str, Float] = field(default_factory=dict, compare=False)
    took: dict[str, float] = field(default_factory=dict, compare=False)
    source: ImageSource | None = field(default=None, compare=False)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.picture.rgb.shape[:2]
        return width, height

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.picture)

    def key(self, spec: ImageSpec) -> str:
        """The key of its embeddings; one that is among others may have another plan than alone."""
        return f"{self._fingerprint} {spec}"

    def plan(self, spec: ImageSpec) -> Plan:
        """Its way to the encoder; raises ImageError where there is none."""
        return plan(*self.size, spec)


def read(images: Sequence[ImageSource | Bitmap]) -> list[Bitmap]:
    """The pictures, each read if it was not; raises ImageError."""
    return [
        i if isinstance(i, Bitmap) else Bitmap(read_picture(i), source=_lasting(i)) for i in images
    ]


def _lasting(source: ImageSource) -> ImageSource | None:
    """A source as replies keep it, who may be pickled: a file that was read is at its end."""
    if hasattr(source, "read"):
        return None
    return bytes(source) if isinstance(source, memoryview) else source
