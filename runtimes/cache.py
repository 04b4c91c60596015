"""Image embeddings of pictures seen lately, by what the pictures hold."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from edgevlm.image import Picture

Float = npt.NDArray[np.float32]

# Room for 128 pictures of PaliGemma-3B at 224 px (2 MiB each), 8 at 896 px.
MAX_BYTES = 256 << 20


def fingerprint(picture: Picture) -> str:
    """A hash of a picture's pixels and shape; the encoder is the session's own."""
    digest = hashlib.sha256(repr((picture.rgb.shape, picture.indexed)).encode())
    digest.update(np.ascontiguousarray(picture.rgb).data)
    if picture.alpha is not None:
        digest.update(np.ascontiguousarray(picture.alpha).data)
    return digest.hexdigest()


class EmbeddingCache:
    """Least recently used embeddings float32 [tokens, n_embd], up to `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[str, Float] = OrderedDict()

    def get(self, key: str) -> Float | None:
        """The embeddings of a picture, or None."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def clear(self) -> None:
        """Forgets every picture."""
        self._rows.clear()

    def put(self, key: str, rows: Float) -> None:
        """Keeps the embeddings of a picture; the oldest ones go when there is no room."""
        self._rows[key] = rows
        while len(self._rows) > 1 and sum(r.nbytes for r in self._rows.values()) > self._max_bytes:
            self._rows.popitem(last=False)
