"""PhotoIndex: a folder of pictures, indexed as it changes and searched."""

from __future__ import annotations

import bisect
import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
import numpy.typing as npt

from edgevlm.errors import EdgeVLMError, ImageError
from edgevlm.manifest import Manifest
from edgevlm.models import cache_directory
from edgevlm.photos.groups import groups
from edgevlm.photos.scan import Facts, FolderChanges, compare, fingerprint
from edgevlm.photos.store import (
    Failure,
    Float,
    FoundPhoto,
    FreshPhoto,
    PhotoEntry,
    PhotoStore,
    relative,
)
from edgevlm.progress import Stage
from edgevlm.types import Progress

if TYPE_CHECKING:
    from typing_extensions import Self

    from edgevlm.image import ImageSource
    from edgevlm.runtimes.dual import DualEncoder

# Pictures that are written together: what a kill may cost.
_TOGETHER = 64


@dataclass(frozen=True)
class IndexUpdate:
    """Counts of an update; `failures` are the reasons of pictures and folders in it that cannot be
    read, by their paths.
    """

    total: int
    added: int
    moved: int
    removed: int
    failures: dict[Path, str]


class PhotoIndex:
    """The pictures of a folder and of those in it, as rows of a dual encoder.

    They lie in one file, `path`, by default in the cache folder. Nothing of it is in memory until
    the first search, which then keeps the rows: 2 KB for a picture where rows have 512 numbers.
    Threads may search while another one updates, and find what is written so far.
    docs/understanding.md has an example.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: DualEncoder,
        *,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder, self.model = Path(folder), model
        key = model_key(model.manifest)
        self.path = Path(path) if path else default_path(self.folder, key)
        self._store, self._lock = PhotoStore(self.path, key, model.spec.width), threading.Lock()
        self._rows: Float | None = None
        self._numbers = np.zeros(0, np.int64)
        self._paths: list[bytes] = []

    def __len__(self) -> int:
        with self._lock:
            return self._store.count()

    def close(self) -> None:
        """Closes the file; the model is its owner's."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def changes(self) -> FolderChanges:
        """Looks for pictures that are new, changed, moved or gone; raises ImageError for a folder
        that cannot be read.
        """
        with self._lock:
            known = self._store.entries(), self._store.failures()
        return compare(self.folder, *known)

    def update(self, progress: Callable[[Progress], None] | None = None) -> IndexUpdate:
        """Brings the index up to date: reads what is new or changed, keeps the rows of what was
        moved, forgets what is gone. What was written stays where it is stopped; the next update
        goes on from there. Pictures that cannot be read are tried again once they change.

        Raises ImageError for a folder that cannot be read, EdgeVLMError where another process is
        at it.
        """
        lock = filelock.FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise EdgeVLMError(
                f"{self.path}: another process is indexing this folder; wait for it"
            ) from None
        try:
            return self._update(progress)
        finally:
            lock.release()

    def _update(self, progress: Callable[[Progress], None] | None) -> IndexUpdate:
        changes = self.changes()
        with self._changing() as store:
            store.put(changes.known, changes.gone)
        total = len(changes.todo) + len(changes.known) + changes.unchanged
        stage = Stage(progress, "index", total, "pictures")
        stage.advance(total - len(changes.todo))
        fresh: list[FreshPhoto] = []
        failed: list[Failure] = []
        added = 0
        for (path, facts, mark), row in self.model.rows(self._todo(changes.todo)):
            if isinstance(row, ImageError):
                failed.append((path, *facts, row.reason))
            else:
                fresh.append(FreshPhoto(path, *facts, mark, row))
                added += 1
            if len(fresh) + len(failed) >= _TOGETHER:
                with self._changing() as store:
                    store.add(fresh, failed)
                fresh, failed = [], []
            stage.advance(1)
        with self._changing() as store:
            if fresh or failed:
                store.add(fresh, failed)
            store.tidy()
            broken = {path: reason for path, (*_, reason) in store.failures().items()}
        reasons = {self._file(path): reason for path, reason in (changes.unread | broken).items()}
        return IndexUpdate(len(self), added, changes.moved, len(changes.gone), reasons)

    @contextmanager
    def _changing(self) -> Iterator[PhotoStore]:
        """The store, to be written; the next search reads its rows anew."""
        with self._lock:
            try:
                yield self._store
            finally:
                self._rows = None

    def _todo(
        self, todo: dict[bytes, Facts]
    ) -> Iterator[tuple[tuple[bytes, Facts, bytes], ImageSource]]:
        for path, facts in todo.items():
            whole = os.path.join(os.fsencode(self.folder), path)
            try:
                mark = fingerprint(whole, facts[0])
            except OSError:
                mark = b""  # reading it says why
            yield (path, facts, mark), Path(os.fsdecode(whole))

    def _file(self, path: bytes) -> Path:
        return self.folder / os.fsdecode(path)

    def search(self, query: str | Float, limit: int = 10) -> list[FoundPhoto]:
        """The pictures nearest to words, or to a row [d] such as `embed_image` makes, the best
        first; as many as the `limit` or all.
        """
        row = self.model.embed_text(query)[0] if isinstance(query, str) else query
        rows, numbers, paths = self._loaded()
        if not paths:
            return []
        cosines = (rows @ np.asarray(row, np.float32))[numbers]
        n = min(limit, len(paths))
        best = np.argpartition(-cosines, n - 1)[:n]
        best = best[np.argsort(-cosines[best], kind="stable")]
        return [FoundPhoto(self._file(paths[i]), float(cosines[i])) for i in best]

    def similar(self, image: ImageSource, limit: int = 10) -> list[FoundPhoto]:
        """The pictures nearest to another one; raises ImageError where that cannot be read."""
        return self.search(self.model.embed_image(image), limit)

    def row(self, file: Path) -> Float | None:
        """The row [d] of a picture in the folder, as the index has it; None where it has none."""
        rows, numbers, paths = self._loaded()
        path = relative(self.folder, file)
        i = bisect.bisect_left(paths, path)
        return rows[numbers[i]] if i < len(paths) and paths[i] == path else None

    def fingerprint(self, file: Path) -> bytes:
        """The hash by which the index knows a picture in the folder, empty where it knows none."""
        entry = self._entry(file)
        return entry.print if entry else b""

    def read(self, file: Path) -> bytes:
        """The content of a picture in the folder as it was indexed. Raises ImageError for one that
        the index does not have, that has changed since or is another file's link now.
        """
        entry = self._entry(file)
        if entry is None:
            raise ImageError(str(file), "is not in the index")
        try:
            if _is_as_indexed(os.stat(file), entry):  # what blocks is not opened
                with open(file, "rb") as opened:
                    if _is_as_indexed(os.fstat(opened.fileno()), entry):
                        return opened.read()
        except OSError as e:
            raise ImageError(str(file), f"cannot be read ({e.strerror})") from None
        raise ImageError(str(file), "has changed since it was indexed; index it again")

    def _entry(self, file: Path) -> PhotoEntry | None:
        with self._lock:
            return self._store.entry(relative(self.folder, file))

    def duplicates(
        self, threshold: float = 0.97, progress: Callable[[Progress], None] | None = None
    ) -> list[list[FoundPhoto]]:
        """Groups of pictures that are nearly the same, the largest group first: each has another
        in its group with a cosine of at least `threshold`, and its score is that to the group's
        first. Every picture is compared with every other.
        """
        rows, numbers, paths = self._loaded()
        stage = Stage(progress, "compare", len(paths), "pictures")
        found = []
        for group in groups(rows[numbers], threshold, stage.advance):
            cosines = rows[numbers[group]] @ rows[numbers[group[0]]]
            files = [self._file(paths[i]) for i in group]
            found.append([FoundPhoto(f, float(c)) for f, c in zip(files, cosines, strict=True)])
        return found

    def _loaded(self) -> tuple[Float, npt.NDArray[np.int64], list[bytes]]:
        """All rows, the number of each picture's, and the pictures' paths, sorted."""
        with self._lock:
            if self._rows is None:
                known = sorted((path, entry.row) for path, entry in self._store.entries().items())
                self._paths = [path for path, _ in known]
                self._numbers = np.array([row for _, row in known], np.int64)
                self._rows = self._store.rows()
            return self._rows, self._numbers, self._paths


def _is_as_indexed(about: os.stat_result, entry: PhotoEntry) -> bool:
    facts = (about.st_size, about.st_mtime_ns)
    return stat.S_ISREG(about.st_mode) and facts == (entry.size, entry.mtime_ns)


def model_key(manifest: Manifest) -> str:
    """A hash of all that a picture's row depends on."""
    files = sorted(r.sha256 for c in manifest.all_components for r in c.files)
    return hashlib.sha256(repr((files, manifest.image)).encode()).hexdigest()[:32]


def default_path(folder: Path, key: str) -> Path:
    """The file of a folder's index for a model, in the cache folder."""
    place = os.path.realpath(folder)
    name = re.sub(r"[^\w.-]", "_", os.path.basename(place))[:40] or "root"
    digest = hashlib.sha256(os.fsencode(place) + key.encode()).hexdigest()[:16]
    return cache_directory() / "search" / f"{name}-{digest}.sqlite"
