"""A folder's pictures beside what an index knows: new, changed, moved, gone."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgevlm.errors import ImageError
from edgevlm.image.listing import extensions
from edgevlm.photos.store import PhotoEntry

# Of a file's start and of its end; together with its size that tells pictures apart.
_SAMPLE_BYTES = 64 << 10

Facts = tuple[int, int]
Failures = Mapping[bytes, tuple[int, int, str]]


@dataclass
class FolderChanges:
    """The difference of a folder and its index.

    todo: pictures to be read, with size and mtime. known: those whose row is there, under their new
    facts. gone: paths that are not there any more. unread: folders that cannot be read, and why;
    what is known of pictures in them stays. unchanged, moved: their numbers.
    """

    todo: dict[bytes, Facts] = field(default_factory=dict)
    known: dict[bytes, PhotoEntry] = field(default_factory=dict)
    gone: list[bytes] = field(default_factory=list)
    unread: dict[bytes, str] = field(default_factory=dict)
    unchanged: int = 0
    moved: int = 0


def listed(folder: Path, unread: dict[bytes, str]) -> Iterator[tuple[bytes, Facts]]:
    """The pictures of a folder and of those in it, by their names: path relative to it, size and
    mtime. Hidden ones are passed over, links to folders not followed; `unread` gets the folders in
    it that cannot be read, with the reason. Raises ImageError where that is the folder itself.
    """
    root = os.fsencode(folder)
    if not os.path.isdir(root):
        raise ImageError(str(folder), "no such folder; name one with pictures")
    known = {os.fsencode(e) for e in extensions()}
    waiting = [b""]
    while waiting:
        inside = waiting.pop()
        try:
            entries = sorted(os.scandir(os.path.join(root, inside)), key=lambda e: e.name)
        except OSError as e:
            reason = f"cannot be read ({e.strerror})"
            if not inside:
                raise ImageError(str(folder), reason) from None
            unread[inside] = reason
            continue
        for entry in entries:
            path = os.path.join(inside, entry.name)
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir(follow_symlinks=False):
                waiting.append(path)
            elif os.path.splitext(entry.name)[1].lower() in known and (facts := _facts(entry)):
                yield path, facts


def _facts(entry: os.DirEntry[bytes]) -> Facts | None:
    """A file's size and mtime; None for what is none, or is gone since it was listed."""
    try:
        about = entry.stat()
    except OSError:
        return None
    return (about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None


def compare(folder: Path, entries: Mapping[bytes, PhotoEntry], failures: Failures) -> FolderChanges:
    """Looks through a folder; only files that are new or changed, and as large as one that is
    known, are opened.
    """
    changes = FolderChanges()
    found = dict(listed(folder, changes.unread))
    hidden = tuple(os.path.join(inside, b"") for inside in changes.unread)
    gone = ({*entries, *failures}) - found.keys()
    changes.gone = [path for path in gone if not path.startswith(hidden)]
    sizes = defaultdict[int, list[tuple[bytes, PhotoEntry]]](list)
    for path, entry in entries.items():
        sizes[entry.size].append((path, entry))
    taken = set[bytes]()
    for path, facts in found.items():
        before = entries.get(path)
        if before and (before.size, before.mtime_ns) == facts:
            changes.unchanged += 1
        elif path in failures and failures[path][:2] == facts:
            changes.unchanged += 1
        elif same := _same(folder, path, facts, sizes.get(facts[0], [])):
            old, entry = same
            changes.known[path] = PhotoEntry(*facts, entry.print, entry.row)
            if old not in found and old not in taken and path != old:
                taken.add(old)
                changes.moved += 1
        else:
            changes.todo[path] = facts
    return changes


def _same(
    folder: Path, path: bytes, facts: Facts, alike: list[tuple[bytes, PhotoEntry]]
) -> tuple[bytes, PhotoEntry] | None:
    """The known picture of the same size that has the same bytes."""
    if not alike:
        return None
    try:
        mine = fingerprint(os.path.join(os.fsencode(folder), path), facts[0])
    except OSError:
        return None  # reading it says why
    return next((known for known in alike if known[1].print == mine), None)


def fingerprint(path: bytes, size: int) -> bytes:
    """A hash of a file's size, start and end; raises OSError."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        digest.update(file.read(_SAMPLE_BYTES))
        if size > _SAMPLE_BYTES:
            file.seek(max(_SAMPLE_BYTES, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
