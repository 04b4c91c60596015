"""Standard streams as a program may find them: closed, full, or in an encoding that lacks what is
to be written.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class _Output(io.FileIO):
    """A descriptor that names itself in the error when it cannot be written. What comes after that
    it drops: Python would write it again at its end, and complain.
    """

    _lost = False

    def write(self, data: Any) -> int:
        try:
            return len(data) if self._lost else super().write(data)
        except OSError as e:
            self._lost = True
            return self._refuse(e, data)

    def _refuse(self, error: OSError, data: Any) -> int:
        raise OSError(error.errno, f"cannot be written ({error.strerror})", "stdout") from None


class _Notes(_Output):
    """An output that drops what cannot be written: notes that nobody reads end no work."""

    def _refuse(self, error: OSError, data: Any) -> int:
        return len(data)


class _Closed(io.StringIO):
    """A stdout that is not there: whoever writes to it is told."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "is closed", "stdout")


@contextmanager
def prepared() -> Iterator[None]:
    """Streams that can be used as they are within the block.

    What an encoding lacks is replaced. Writing to a stdout that is closed is an OSError, like
    writing to one that is full; a stderr that cannot be written takes everything and drops it.
    stdin stays None where it is closed.
    """
    before = sys.stdout, sys.stderr
    _fill_descriptors()
    sys.stdout = _opened(sys.stdout, _Output, 1, "replace") if sys.stdout else _Closed()
    if sys.stderr:
        sys.stderr = _opened(sys.stderr, _Notes, 2, "backslashreplace")
    else:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            flush()
        sys.stdout, sys.stderr = before


def flush() -> None:
    """Writes what is left; raises OSError where stdout does not take it."""
    sys.stderr.flush()
    sys.stdout.flush()


def _fill_descriptors() -> None:
    """Opens standard descriptors that are closed: a file of ours would become one of them, and a
    library's messages would go into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _opened(stream: TextIO, kind: type[_Output], descriptor: int, errors: str) -> TextIO:
    """The stream, of another kind if it is Python's own one on this descriptor, and with `errors`
    in place of a handler that raises.
    """
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    errors = errors if stream.errors in ("strict", "surrogateescape") else stream.errors or errors
    raw = getattr(stream.buffer, "raw", stream.buffer)
    # The console of Windows is another kind of file, and a caller may have put anything here.
    if not isinstance(raw, io.FileIO) or raw.fileno() != descriptor:
        stream.reconfigure(errors=errors)
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(kind(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
    )
