"""Image embeddings of pictures seen lately, by what the pictures hold; in memory and on disk."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgevlm.disk_cache import DiskCache
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


class Shelf:
    """The entries of one engine on a disk, shared with other processes.

    `facts` are all that its results depend on beside the key of an entry. After `forget` only what
    was put since is there.
    """

    def __init__(self, disk: DiskCache, *facts: str) -> None:
        self._disk, self._facts = disk, "\n".join(facts)
        self.max_bytes = disk.max_bytes
        self._since: set[str] | None = None

    def get(self, key: str) -> memoryview | None:
        """The contents of an entry; None where there is no sound one."""
        if self._since is not None and key not in self._since:
            return None
        return self._disk.get(self._key(key))

    def put(self, key: str, *parts: bytes | memoryview) -> None:
        """Writes an entry."""
        self._disk.put(self._key(key), *parts)
        if self._since is not None:
            self._since.add(key)

    def forget(self) -> None:
        """Reads no more of what there is."""
        self._since = set()

    def _key(self, key: str) -> str:
        return f"{self._facts}\n{key}"


class EmbeddingCache:
    """Least recently used embeddings float32 [tokens, n_embd], up to `max_bytes`.

    What is not there any more, or never was in this process, may be on a `shelf`. New ones are
    written there by `keep`, which is called when nobody waits. Threads may share it.
    """

    def __init__(self, shelf: Shelf | None = None, max_bytes: int = MAX_BYTES) -> None:
        self._shelf, self._max_bytes = shelf, max_bytes
        self._rows: OrderedDict[str, Float] = OrderedDict()
        self._fresh: dict[str, Float] = {}
        self._lock = threading.Lock()

    def get(self, key: str, shape: Sequence[int]) -> Float | None:
        """The embeddings of a picture, of this shape, or None."""
        with self._lock:
            if key in self._rows:
                self._rows.move_to_end(key)
                return self._rows[key]
        data = self._shelf.get(key) if self._shelf else None
        if data is None or data.nbytes != 4 * shape[0] * shape[1]:
            return None
        rows: Float = np.frombuffer(data, np.float32).reshape(shape)
        self._remember(key, rows)
        return rows

    def put(self, key: str, rows: Float) -> None:
        """Keeps the embeddings of a picture; the oldest ones go when there is no room."""
        self._remember(key, rows)
        if self._shelf:
            with self._lock:
                self._fresh[key] = rows

    def _remember(self, key: str, rows: Float) -> None:
        with self._lock:
            self._rows[key] = rows
            while len(self._rows) > 1 and self._n_bytes > self._max_bytes:
                self._rows.popitem(last=False)

    @property
    def _n_bytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows.values())

    def keep(self) -> None:
        """Writes what was put since the last call to the shelf."""
        if self._shelf:
            with self._lock:
                fresh, self._fresh = self._fresh, {}
            for key, rows in fresh.items():
                self._shelf.put(key, np.ascontiguousarray(rows).data.cast("B"))

    def clear(self) -> None:
        """Forgets every picture, and those on the shelf."""
        with self._lock:
            self._rows.clear()
            self._fresh.clear()
        if self._shelf:
            self._shelf.forget()
