"""The file of an index: SQLite, with the rows in blocks. Knows no model.

    pictures   path relative to the folder (bytes), size, mtime, fingerprint, the number of its row
    failed     what could not be read, so that it is not tried again until it changes
    blocks     rows float32 [n, width] from the number `first` on

A block is written once, with the pictures that it is of; who is killed loses the block that was
being made. Pictures with the same bytes share a row.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgevlm.errors import BundleError, EdgeVLMError

Float = npt.NDArray[np.float32]
# Path, size, mtime and reason of a picture that cannot be read.
Failure = tuple[bytes, int, int, str]

_FORMAT = "1"
# Rows that nobody refers to any more, as a share of all, from which on the file is written anew.
_LOOSE = 0.25
_BLOCK_ROWS = 1024
_PATIENCE_S = 30.0
_TABLES = """
create table if not exists about (key text primary key, value text not null);
create table if not exists pictures (
    path blob primary key, size integer not null, mtime_ns integer not null,
    print blob not null, row integer not null
) without rowid;
create index if not exists by_size on pictures (size);
create table if not exists failed (
    path blob primary key, size integer not null, mtime_ns integer not null, reason text not null
) without rowid;
create table if not exists blocks (first integer primary key, rows blob not null);
"""


@dataclass(frozen=True)
class FoundPhoto:
    """A picture of an index and how near it is: the cosine, 1 for the same picture."""

    file: Path
    score: float


@dataclass(frozen=True)
class PhotoEntry:
    """A picture as the index knows it: its facts when it was read, its fingerprint, its row."""

    size: int
    mtime_ns: int
    print: bytes
    row: int


@dataclass(frozen=True)
class FreshPhoto:
    """A picture that is to be written: its path relative to the folder, its facts, and its row."""

    path: bytes
    size: int
    mtime_ns: int
    print: bytes
    values: Float


class PhotoStore:
    """An index's file, opened or made; raises EdgeVLMError for a file that is something else, and
    where it was made with another model.
    """

    def __init__(self, path: Path, model: str, width: int) -> None:
        self.path, self.width = path, width
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=_PATIENCE_S, check_same_thread=False)
            with self._db:
                self._db.executescript(_TABLES)
            self._check({"format": _FORMAT, "model": model, "width": str(width)})
        except (sqlite3.Error, OSError) as e:
            raise EdgeVLMError(
                f"{path}: is not an index that can be used ({e}); remove it, or name another "
                "(--index)"
            ) from None

    def _check(self, wanted: Mapping[str, str]) -> None:
        found = dict(self._db.execute("select key, value from about"))
        if not found:
            with self._db:
                self._db.executemany("insert into about values (?, ?)", wanted.items())
        elif found != wanted:
            self._db.close()
            raise BundleError(
                f"{self.path}: was made with another model or by another edgevlm; remove it, or "
                "name another (--index)"
            )

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def entries(self) -> dict[bytes, PhotoEntry]:
        """Every picture by its path."""
        found = self._db.execute("select path, size, mtime_ns, print, row from pictures")
        return {path: PhotoEntry(*facts) for path, *facts in found}

    def entry(self, path: bytes) -> PhotoEntry | None:
        """The facts, fingerprint and row of one picture; None where it is not there."""
        found = self._db.execute(
            "select size, mtime_ns, print, row from pictures where path = ?", (path,)
        ).fetchone()
        return PhotoEntry(*found) if found else None

    def failures(self) -> dict[bytes, tuple[int, int, str]]:
        """Pictures that could not be read: size, mtime and reason by path."""
        found = self._db.execute("select path, size, mtime_ns, reason from failed")
        return {path: (size, mtime, reason) for path, size, mtime, reason in found}

    def count(self) -> int:
        """Number of pictures."""
        return int(self._db.execute("select count(*) from pictures").fetchone()[0])

    def add(
        self, fresh: Sequence[FreshPhoto], failed: Sequence[tuple[bytes, int, int, str]]
    ) -> None:
        """Writes pictures with a block of their rows, and failures, all or nothing."""
        with self._writing() as db:
            first = self._n_rows()
            if fresh:
                rows = np.stack([f.values for f in fresh]).astype("<f4")
                db.execute("insert into blocks values (?, ?)", (first, rows.tobytes()))
            for i, f in enumerate(fresh):
                self._put(f.path, PhotoEntry(f.size, f.mtime_ns, f.print, first + i))
            db.executemany("insert or replace into failed values (?, ?, ?, ?)", failed)
            gone = [(path,) for path, *_ in failed]
            db.executemany("delete from pictures where path = ?", gone)

    def put(self, entries: Mapping[bytes, PhotoEntry], gone: Sequence[bytes]) -> None:
        """Writes what is known of pictures whose rows are there, and forgets those that are gone,
        all or nothing.
        """
        with self._writing() as db:
            paths = [(path,) for path in gone]
            db.executemany("delete from pictures where path = ?", paths)
            db.executemany("delete from failed where path = ?", paths)
            for path, entry in entries.items():
                self._put(path, entry)

    def _put(self, path: bytes, e: PhotoEntry) -> None:
        self._db.execute("delete from failed where path = ?", (path,))
        self._db.execute(
            "insert or replace into pictures values (?, ?, ?, ?, ?)",
            (path, e.size, e.mtime_ns, e.print, e.row),
        )

    def _n_rows(self) -> int:
        """Rows of all blocks, those that nobody refers to any more among them."""
        last = self._db.execute(
            "select first, length(rows) from blocks order by first desc limit 1"
        )
        first, n_bytes = last.fetchone() or (0, 0)
        return int(first) + int(n_bytes) // (4 * self.width)

    def rows(self) -> Float:
        """All rows by their number, float32 [n, width]."""
        rows = np.empty((self._n_rows(), self.width), np.float32)
        for first, data in self._db.execute("select first, rows from blocks order by first"):
            block = np.frombuffer(data, "<f4").reshape(-1, self.width)
            rows[first : first + len(block)] = block
        return rows

    def tidy(self) -> None:
        """Writes the rows anew where many of them are nobody's."""
        used = [
            row for (row,) in self._db.execute("select distinct row from pictures order by row")
        ]
        n_rows = self._n_rows()
        if n_rows - len(used) <= _LOOSE * n_rows:
            return
        numbers = {old: new for new, old in enumerate(used)}
        kept = self.rows()[used].astype("<f4")
        with self._writing() as db:
            db.execute("delete from blocks")
            for first in range(0, len(kept), _BLOCK_ROWS):
                data = kept[first : first + _BLOCK_ROWS].tobytes()
                db.execute("insert into blocks values (?, ?)", (first, data))
            changed = [(numbers[e.row], path) for path, e in self.entries().items()]
            db.executemany("update pictures set row = ? where path = ?", changed)
        self._db.execute("vacuum")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._db:
                self._db.execute("begin immediate")
                yield self._db
        except sqlite3.Error as e:
            raise EdgeVLMError(f"{self.path}: cannot be written ({e}); make room") from None


def relative(folder: Path, path: Path) -> bytes:
    """A path as the index has it: relative to its folder, in the system's bytes."""
    return os.fsencode(os.path.relpath(path, folder))
