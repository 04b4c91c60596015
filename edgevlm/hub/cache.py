"""Checkpoints in the hub's cache: their size, and their end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgevlm.hub.download import PART, storage


def checkpoint_bytes(repo: str, commit: str) -> int:
    """Bytes on disk of a commit's files, and of what broken downloads of its repository left."""
    blobs = _blobs(storage(repo) / "snapshots" / commit) | _broken(repo)
    return sum(path.stat().st_size for path in blobs)


def remove_checkpoint(repo: str, commit: str) -> int:
    """Removes a commit's files from the hub's cache, but those of other commits; returns the bytes
    that this freed.
    """
    import huggingface_hub

    place, freed = storage(repo), 0
    for path in _broken(repo):
        freed += path.stat().st_size
        path.unlink()
    if not place.parent.is_dir():
        return freed
    found: Any = huggingface_hub.scan_cache_dir(place.parent)
    strategy = found.delete_revisions(commit)
    freed += int(strategy.expected_freed_size)
    strategy.execute()
    if not any((place / "snapshots").glob("*")):
        shutil.rmtree(place, ignore_errors=True)
    return freed


def _blobs(snapshot: Path) -> set[Path]:
    return {path.resolve() for path in snapshot.rglob("*") if path.is_file()}


def _broken(repo: str) -> set[Path]:
    return {*(storage(repo) / "blobs").glob(f"*{PART}")}
