"""Temporary folders and child processes: what must not outlive this process.

Each is a context manager, which is enough where an exception ends the work. Not every interrupt
does: native code swallows a KeyboardInterrupt or turns it into another exception. A program that
ends without unwinding, as the command line does, calls `everything` first.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Held while something is made or put into its place, and for good once everything is being removed.
# The thread that holds it may be interrupted and remove everything, so it is re-entrant.
lock = threading.RLock()
# Temporary folders, each with the folders above it that were made for it, the deepest first.
_folders: dict[Path, list[Path]] = {}
_processes: set[subprocess.Popen[Any]] = set()

# A thread that still writes into a folder can make its removal fail; not for long, since nothing
# can be made in a folder that is gone.
_TRIES, _PAUSE_S = 100, 0.01


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new hidden folder in `parent`, which is made where it is missing, or where the system has
    such. It is removed with all it holds, and so are folders above it that nothing else came into.
    """
    with lock:  # The first gettempdir() writes a file to find out whether it can.
        place = Path(tempfile.gettempdir() if parent is None else os.path.abspath(parent))
    path = place / f".edgevlm-{secrets.token_hex(4)}.part"
    made = [folder for folder in (place, *place.parents) if not os.path.lexists(folder)]
    try:
        with lock:
            _folders[path] = made
            place.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700 if parent is None else 0o777)
        yield path
    finally:
        _remove(path, made)
        _folders.pop(path, None)


@contextmanager
def process(
    command: Sequence[str | os.PathLike[str]], **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """A child process, `options` as subprocess.Popen takes them; killed if the block fails.

    Ctrl-C at the terminal does not reach it: this process alone decides what becomes of both.
    """
    with lock:
        child = subprocess.Popen(command, start_new_session=True, **options)
        _processes.add(child)
    try:
        with child:
            try:
                yield child
            except BaseException:
                child.kill()
                raise
    finally:
        _processes.discard(child)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file; where that fails, for want of room, no half of it is left. Raises OSError."""
    try:
        path.write_bytes(data)
    except OSError:
        if path.is_file():
            path.unlink()
        raise


def everything() -> None:
    """Ends all child processes and removes all temporary folders. No new ones can be made: other
    threads that try wait for the end of this process.
    """
    lock.acquire()
    for child in tuple(_processes):
        child.kill()
        # With a limit, since this may be the very thread that waits for it already.
        with suppress(subprocess.TimeoutExpired):
            child.wait(_TRIES * _PAUSE_S)
    for folder, made in tuple(_folders.items()):
        _remove(folder, made)


def _remove(folder: Path, made: Sequence[Path]) -> None:
    for _ in range(_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            break
        time.sleep(_PAUSE_S)
    with suppress(OSError):
        for above in made:
            above.rmdir()
