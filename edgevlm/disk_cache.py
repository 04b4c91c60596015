"""A folder of what was computed of pictures, so that another process need not compute it again.

Every entry is a file of its own, written aside and renamed, under a hash of its key and contents:
what is half-written, damaged, or of another key reads as nothing, and no process waits for another.
Databases made for this keep pickles, or fail as a whole where their index is damaged. Knows nothing
of what the entries mean.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgevlm.byte_sizes import byte_size
from edgevlm.models import cache_directory

SIZE_VARIABLE = "EDGEVLM_CACHE_SIZE"
# 30 pictures of SmolVLM-256M at 13 tiles with their KV cache, 500 of PaliGemma-3B at 224 px.
MAX_BYTES = 1 << 30

_MAGIC = b"edgevlm cache 1\n"
_HASH_BYTES = 32
_HEAD = len(_MAGIC) + _HASH_BYTES
_ENTRY, _PARTIAL = ".entry", ".part"
# A process that writes one for longer is gone.
_IDLE_S = 3600


@dataclass(frozen=True)
class _File:
    path: Path
    bytes: int
    used_ns: int


class DiskCache:
    """Entries by key in a folder, least recently used ones removed beyond `max_bytes`.

    No call raises OSError: where the folder cannot be read or written there is nothing in it, and
    after a failure nothing more is written by this process. Threads and processes may share one.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._unwritable = False

    def get(self, key: str) -> memoryview | None:
        """The contents of an entry, which counts as used now; None where there is no sound one."""
        path = self._path(key)
        try:
            # A pipe or a device would keep the reader waiting.
            if not path.is_file() or path.stat().st_size > self.max_bytes:
                return None
            data = path.read_bytes()
        except OSError:
            return None
        head, found = memoryview(data)[:_HEAD], memoryview(data)[_HEAD:]
        if head != _MAGIC + _digest(key, [found]):
            return None
        with suppress(OSError):
            os.utime(path)
        return found

    def put(self, key: str, *parts: bytes | memoryview) -> None:
        """Writes an entry of these parts, one after the other, in place of one of the same key.

        Nothing where it is larger than the whole cache may be.
        """
        size = _HEAD + sum(memoryview(part).nbytes for part in parts)
        if self._unwritable or size > self.max_bytes:
            return
        # Not .with_suffix: two processes may write the same key at once.
        partial = self.folder / f"{secrets.token_hex(8)}{_PARTIAL}"
        try:
            _make(self.folder)
            self._make_room(size)
            try:
                with open(partial, "xb", opener=_private) as file:
                    file.write(_MAGIC + _digest(key, parts))
                    for part in parts:
                        file.write(part)
                os.replace(partial, self._path(key))
            except BaseException:
                with suppress(OSError):
                    partial.unlink()
                raise
        except OSError:
            self._unwritable = True

    def bytes(self) -> int:
        """Size of everything in the folder, in bytes."""
        return sum(file.bytes for file in self._files())

    def clear(self) -> None:
        """Removes every entry, and what broken writes left."""
        for file in self._files():
            with suppress(OSError):
                file.path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _make_room(self, size: int) -> None:
        files = sorted(self._files(), key=lambda file: file.used_ns)
        total, now = sum(file.bytes for file in files) + size, time.time_ns()
        for file in files:
            partial = file.path.suffix == _PARTIAL
            dead = partial and now - file.used_ns > _IDLE_S * 1e9
            if dead or (total > self.max_bytes and not partial):
                file.path.unlink(missing_ok=True)
                total -= file.bytes

    def _files(self) -> list[_File]:
        """Our files in the folder; whatever else lies there is nobody's to remove."""
        found = []
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith((_ENTRY, _PARTIAL)) and entry.is_file(follow_symlinks=False):
                    with suppress(OSError):  # another process may remove it meanwhile
                        stat = entry.stat(follow_symlinks=False)
                        found.append(_File(Path(entry.path), stat.st_size, stat.st_mtime_ns))
        return found

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}{_ENTRY}"


def pictures() -> DiskCache | None:
    """The cache of what was computed of pictures, to use; None where its size is set to 0.

    The size is $EDGEVLM_CACHE_SIZE ("500MB") or 1 GiB. Raises PromptError where that is not a size.
    """
    size = byte_size(os.environ.get(SIZE_VARIABLE) or MAX_BYTES, SIZE_VARIABLE)
    return pictures_folder(size) if size else None


def pictures_folder(max_bytes: int = MAX_BYTES) -> DiskCache:
    """The same cache, to look at or clear, whatever its size is set to."""
    return DiskCache(cache_directory() / "pictures", max_bytes)


def _digest(key: str, parts: Sequence[bytes | memoryview]) -> bytes:
    digest = hashlib.sha256(f"{len(key)} {key}".encode())
    for part in parts:
        digest.update(part)
    return digest.digest()


def _make(folder: Path) -> None:
    """Makes the folder where it is missing, for this user's eyes alone."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
