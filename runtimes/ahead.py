"""Pictures of the first request, encoded while the decoder loads.

They are read before anything is loaded, and handed out once, to the request that is about them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from edgevlm.image import ImageSource
from edgevlm.image.plan import among
from edgevlm.runtimes.bitmaps import Bitmap, Shown, ShownSource, read, still
from edgevlm.runtimes.engines import Cancelled, Float
from edgevlm.runtimes.model import Engines, Stopwatch
from edgevlm.runtimes.request import encode
from edgevlm.specs import ImageSpec
from edgevlm.types import Progress


class Ahead:
    """Pictures that are going to be asked about. Raises ImageError where one cannot be read."""

    def __init__(
        self,
        images: Sequence[ImageSource] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self._images, self._progress = images, progress
        self._bitmaps: list[Bitmap] = []
        self._stopped = threading.Event()
        for image in images:
            watch = Stopwatch()
            with watch.timed("image_decode_ms"):
                bitmap = still(read([image]))
            bitmap.took.update(watch.ms)
            self._bitmaps.append(bitmap)

    def n_tiles(self, spec: ImageSpec) -> int:
        """Squares that the encoder is going to see of them; raises ImageError."""
        spec = among(spec, len(self._bitmaps)) if self._bitmaps else spec
        return sum(bitmap.plan(spec).n_tiles for bitmap in self._bitmaps)

    def encode(self, model: Engines) -> None:
        """Encodes what the model does not know, in this thread. Raises ImageError, Cancelled."""
        spec = model.manifest.image
        if len(self._bitmaps) > spec.max_pictures:
            return  # the request is going to be refused
        spec, made = among(spec, len(self._bitmaps)), set[str]()
        for bitmap in self._bitmaps:
            watch, key = Stopwatch(), bitmap.key(spec)
            if key not in made and model.known(bitmap, spec) is None:
                rows = encode(model, bitmap, spec, watch, self._progress, self._run)
                bitmap.made[key] = rows
                bitmap.took.update(watch.ms)
                made.add(key)

    def _run(self, call: Callable[[], Float], _: Callable[[], None]) -> Float:
        if self._stopped.is_set():
            raise Cancelled
        return call()

    def stop(self) -> None:
        """Ends `encode` before its next tile."""
        self._stopped.set()

    def read(self, images: Sequence[ShownSource]) -> list[Shown]:
        """Pictures as `bitmaps.read` does; those that are there are not read again, once."""
        there, self._bitmaps = self._bitmaps, []
        same = len(images) == len(there) and all(
            a is b for a, b in zip(images, self._images, strict=True)
        )
        return [*there] if same else read(images)
