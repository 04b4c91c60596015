"""The models directory: bundles under short names, put there and removed in one step.

models/NAME/          a bundle
models/.NAME.pull/    one on its way there: kept for the same pull to go on, or removed by `gc`
models/.locks/        held by whoever changes NAME
models/.checkpoints/  names of checkpoints that a pull put into the hub's cache, for `gc`
default               the name of the model that `edgevlm ask` takes, beside models/
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgevlm import cleanup
from edgevlm.errors import BundleError
from edgevlm.manifest import MANIFEST
from edgevlm.models import BUILT_IN, default_file, directory, installed, unknown

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_ON_ITS_WAY = ".pull"
_CHECKPOINTS = ".checkpoints"
# As edgevlm.cleanup names them.
_TEMPORARY = ".edgevlm-*.part"
_IDLE_S = 24 * 3600


@dataclass(frozen=True)
class Leftover:
    """Remains of a broken pull or export in the models directory, and their size in bytes."""

    path: Path
    bytes: int


def check_name(name: str) -> str:
    """A name that a model can have; raises BundleError for another."""
    if not _NAME.fullmatch(name) or name == BUILT_IN:
        raise BundleError(
            f"{name!r}: a model cannot go by this name; use letters, digits, dots and dashes"
            + (" (pico is the built-in one)" if name == BUILT_IN else "")
        )
    return name


@contextmanager
def locked(name: str, *, wait: bool = True) -> Iterator[None]:
    """Holds the right to change the model `name`; waits for another process that holds it, or
    raises BundleError.
    """
    import filelock  # no command that answers needs it

    folder = directory() / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f"{name}.lock")
        lock.acquire(blocking=wait)
    except filelock.Timeout:
        raise BundleError(f"{name}: is being changed by another process; wait for it") from None
    except OSError as e:
        raise BundleError(
            f"{directory()}: cannot be written ({e.strerror or e}); EDGEVLM_HOME names another "
            "folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def on_its_way(name: str) -> Path:
    """The folder for a bundle that is going to be `name`; made where it is missing. Call it with
    the lock held: what is in it comes of an earlier attempt.
    """
    folder = directory() / f".{name}{_ON_ITS_WAY}"
    folder.mkdir(exist_ok=True)
    return folder


def install(bundle: Path, name: str) -> Path:
    """Makes a whole bundle, which lies in `on_its_way(name)`, the model `name`; returns its folder.

    Who looks in between finds the old model, none, or the new one, never a mixed one.
    """
    folder, work = directory() / name, directory() / f".{name}{_ON_ITS_WAY}"
    with cleanup.lock:
        if os.path.lexists(folder):
            old = work / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        bundle.rename(folder)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def remove(name: str) -> int:
    """Removes a model; returns the bytes that this freed. Raises BundleError."""
    if name == BUILT_IN:
        raise BundleError(f"{name}: is built in and cannot be removed")
    if name not in installed():
        raise unknown(name)
    with locked(name, wait=False):
        folder = directory() / name
        freed = 0 if folder.is_symlink() else folder_bytes(folder)
        with cleanup.lock:
            if folder.is_symlink():
                folder.unlink()
            else:
                # Without its manifest it is no model any more, whatever becomes of the rest.
                (folder / MANIFEST).unlink()
                shutil.rmtree(folder)
        if default() == name:
            set_default(None)
    return freed


def leftovers() -> list[Leftover]:
    """Lists what broken pulls and exports left, without that of processes that are at work."""
    found = []
    for path in sorted(directory().glob(".*")):
        name = path.name.removeprefix(".").removesuffix(_ON_ITS_WAY)
        dead = path.name.endswith(_ON_ITS_WAY) and _free(name)
        if dead or (path.match(_TEMPORARY) and _idle(path)):
            found.append(Leftover(path, folder_bytes(path)))
    return found


def remove_leftover(found: Leftover) -> None:
    """Removes what `leftovers` found."""
    shutil.rmtree(found.path)


def _idle(folder: Path) -> bool:
    """True where nothing was written for so long that no export can be at work."""
    newest = max(p.lstat().st_mtime for p in (folder, *folder.rglob("*")))
    return time.time() - newest > _IDLE_S


def checkpoint_key(repo: str, commit: str) -> str:
    """The name of a checkpoint's note, and of the lock of whoever reads or removes it."""
    return f"{repo.replace('/', '--')}@{commit}"


def note_checkpoint(repo: str, commit: str) -> None:
    """Writes down that a pull put a checkpoint into the hub's cache."""
    folder = directory() / _CHECKPOINTS
    folder.mkdir(exist_ok=True)
    (folder / checkpoint_key(repo, commit)).touch()


def forget_checkpoint(repo: str, commit: str) -> None:
    """Takes `note_checkpoint` back."""
    (directory() / _CHECKPOINTS / checkpoint_key(repo, commit)).unlink(missing_ok=True)


def noted_checkpoints() -> list[tuple[str, str]]:
    """Repository and commit of the checkpoints that pulls put into the hub's cache, without those
    that are in use.
    """
    names = [path.name for path in sorted((directory() / _CHECKPOINTS).glob("*@*"))]
    free = (name.rpartition("@") for name in names if _free(name))
    return [(repo.replace("--", "/", 1), commit) for repo, _, commit in free]


def _free(name: str) -> bool:
    try:
        with locked(name, wait=False):
            return True
    except BundleError:
        return False


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder, in bytes; links are not followed."""
    sizes = (p.lstat().st_size for p in folder.rglob("*") if p.is_file() or p.is_symlink())
    return sum(sizes)


def default() -> str | None:
    """The name that `edgevlm use` chose, None for the built-in model."""
    try:
        return default_file().read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def set_default(name: str | None) -> None:
    """Makes an installed model the default one, None or pico the built-in one. Raises
    BundleNotFound.
    """
    if name is not None and name != BUILT_IN and name not in installed():
        raise unknown(name)
    path = default_file()
    if name is None or name == BUILT_IN:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into its place: two commands at once leave one of both names.
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    cleanup.write_whole(fresh, f"{name}\n".encode())
    os.replace(fresh, path)
