"""Answers about many pictures in a file, a JSON object a line, which a later run goes on with."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import click

from edgevlm import cleanup, schema

Record = dict[str, Any]

# The beginning of every line that is written here; a crash may have cut the last one off.
_HEAD = b'{"file": '


def placed(file: str) -> str:
    """The absolute path of a record's file, or its URL."""
    return file if re.match(r"https?:", file, re.IGNORECASE) else os.path.abspath(file)


class AnswerFile:
    """The file that answers are written to, each as soon as it is there.

    Raises click.BadParameter for a name that cannot be written, before anything is changed.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))
        self._name = str(path)
        if self.path.is_dir():
            raise click.BadParameter(f"{path}: is a folder; name a file in it")
        if not self.path.parent.is_dir():
            raise click.BadParameter(f"{path}: the folder {path.parent} does not exist")
        if self.path.exists() and not self.path.is_file():
            raise click.BadParameter(f"{path}: not a regular file; --json writes to stdout")
        if not os.access(self.path if self.path.exists() else self.path.parent, os.W_OK):
            raise click.BadParameter(f"{path}: cannot be written; name another file")

    def records(self) -> Iterator[Record]:
        """The records that are there, without a last one that a crash cut off.

        Raises click.ClickException for a file of anything else.
        """
        return (record for _, record in self._lines() if record)

    def _lines(self) -> Iterator[tuple[bytes, Record | None]]:
        """(line, record) of every line, None for the record of one that a crash cut off."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):  # Not a picture's bytes, in search of a line's end.
                raise self._foreign(1)
            file.seek(0)
            for number, line in enumerate(file, 1):
                record = _parsed(line)
                cut = not line.endswith(b"\n") and _HEAD.startswith(line[: len(_HEAD)])
                if not record and not cut:
                    raise self._foreign(number)
                yield line, record

    def _foreign(self, number: int) -> click.ClickException:
        return click.ClickException(
            f"{self._name}: line {number} is not an answer that edgevlm's --jsonl wrote; name "
            "another file"
        )

    @contextmanager
    def writing(self, keep: Callable[[Record], bool]) -> Iterator[Callable[[Record], None]]:
        """A function that adds a record; those that are there stay where `keep` says so.

        Raises click.ClickException where another process writes to the file.
        """
        file = self._locked()
        try:
            if not self._is_whole(keep):
                file.close()
                self._rewrite(keep)
                file = self._locked()
            yield lambda record: self._add(file, record)
        finally:
            file.close()

    def _locked(self) -> IO[bytes]:
        """The file, opened for one process alone where the system can do that."""
        file = self.path.open("ab", buffering=0)
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                there = os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
            except BlockingIOError:
                there = False
            except OSError:  # A file system without locks.
                there = True
            if not there:
                file.close()
                raise click.ClickException(
                    f"{self._name}: another edgevlm writes to it; wait for that or name another "
                    "file"
                )
        return file

    def _is_whole(self, keep: Callable[[Record], bool]) -> bool:
        """True if every byte of the file stays."""
        lines = self._lines()
        return all(record and keep(record) and line.endswith(b"\n") for line, record in lines)

    def _rewrite(self, keep: Callable[[Record], bool]) -> None:
        with cleanup.temporary_folder(self.path.parent) as folder:
            new = folder / self.path.name
            with new.open("wb") as file:
                file.writelines(_line(record) for record in self.records() if keep(record))
            shutil.copymode(self.path, new)
            os.replace(new, self.path)

    def _add(self, file: IO[bytes], record: Record) -> None:
        """Writes a line, whole: a signal's handler waits for the lock, and a full disk gets none of
        it.
        """
        with cleanup.lock:
            start, line = os.fstat(file.fileno()).st_size, memoryview(_line(record))
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError as e:
                with suppress(OSError):
                    file.truncate(start)
                raise OSError(e.errno, e.strerror, self._name) from None


def _line(record: Record) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _parsed(line: bytes) -> Record | None:
    """A line's record; None for a line that is not one."""
    try:
        record = schema.parsed(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    texts = [record.get("file"), record.get("asked"), record.get("text", record.get("error"))]
    return record if all(isinstance(text, str) for text in texts) else None
