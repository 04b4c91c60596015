"""Files of a repository, downloaded whole or not at all.

Large files are written by this module, which goes on where a broken download ended; newer releases
of the hub client begin them anew. They end in the hub's cache in its documented layout, which the
client and other programs share, or in a plain folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgevlm.errors import HubError
from edgevlm.hub.patience import persistently
from edgevlm.hub.refusals import told
from edgevlm.hub.repository import RemoteFile, Repository
from edgevlm.progress import Report, Stage

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PART = ".edgevlm.part"
_BLOCK = 1 << 20
# Left free beside what is downloaded.
_SPARE_BYTES = 64 << 20


class _WrongHash(Exception):
    """A file that is not what the hub says."""


def storage(repo: str) -> Path:
    """The folder of a repository in the hub's cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def missing_bytes(repository: Repository, files: Iterable[RemoteFile]) -> int:
    """Bytes of these files that are not in the hub's cache yet."""
    blobs = storage(repository.id) / "blobs"
    return sum(f.bytes for f in files if not (blobs / (f.sha256 or f.git_sha1 or ".")).is_file())


def snapshot(
    repository: Repository,
    files: Sequence[RemoteFile],
    *,
    revision: str | None = None,
    report: Report | None = None,
) -> Path:
    """Downloads files into the hub's cache; returns the folder that holds them.

    `revision` is the name by which the commit was looked up, so that it is found again offline.
    Raises HubError.
    """
    import filelock

    place = storage(repository.id)
    with told(repository.id, revision):
        place.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(place / ".edgevlm.lock"):
            _check_room(repository.id, place, missing_bytes(repository, files))
            (place / "blobs").mkdir(exist_ok=True)
            transfer = _Transfer(repository, files, report)
            for file in files:
                transfer.get(file, place / "blobs" / file.sha256, None)
            reference = place / "refs" / (revision or "main")
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(repository.commit, encoding="utf-8")
    return place / "snapshots" / repository.commit


def cached(repo: str, revision: str | None = None) -> Path | None:
    """The folder in the hub's cache of what was downloaded of a revision; asks nobody."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def into(
    folder: Path, repository: Repository, files: Sequence[RemoteFile], report: Report | None = None
) -> None:
    """Downloads files into a folder, going on with what an earlier call left. Raises HubError."""
    with told(repository.id, repository.commit):
        there = [folder / f.name for f in files if (folder / f.name).is_file()]
        _check_room(
            repository.id,
            folder,
            sum(f.bytes for f in files) - sum(path.stat().st_size for path in there),
        )
        transfer = _Transfer(repository, files, report)
        for file in files:
            transfer.get(file, folder / file.name, folder)
        # The client's notes about the files that it downloaded.
        shutil.rmtree(folder / ".cache", ignore_errors=True)


def _check_room(repo: str, folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need + _SPARE_BYTES:
        raise HubError(
            f"{repo}: the download needs {need / 1e9:.2f} GB in {folder}, {free / 1e9:.2f} GB are "
            "free; make room, or let HF_HOME and EDGEVLM_HOME name folders on another disk"
        )


class _Transfer:
    """Downloads the files of a repository one by one and counts their bytes."""

    def __init__(
        self, repository: Repository, files: Sequence[RemoteFile], report: Report | None
    ) -> None:
        self._repository = repository
        self._report = report
        self._stage = Stage(report, "download", sum(f.bytes for f in files), "B")
        self._before = 0

    def get(self, file: RemoteFile, target: Path, folder: Path | None) -> None:
        """Downloads a file: a large one to `target`, and the client finds it there in the cache;
        one that is stored in git by the client, into its cache or `folder`.
        """
        if file.sha256 and not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + PART)
            self._retried(lambda: self._large(file, part), part)
            os.replace(part, target)
        if not file.sha256 or folder is None:
            self._retried(lambda: self._by_client(file, folder))
        self._before += file.bytes
        self._stage.reach(self._before)

    def _retried(self, action: Callable[[], None], part: Path | None = None) -> None:
        """A wrong hash may come of a bad line, once."""
        for last in (False, True):
            try:
                return persistently(action, self._report, lambda: _size(part) if part else 0)
            except _WrongHash as e:
                if last:
                    raise HubError(str(e)) from None

    def _large(self, file: RemoteFile, part: Path) -> None:
        from huggingface_hub import hf_hub_url, utils
        from huggingface_hub.file_download import get_hf_file_metadata, http_get

        # The client re-exports this without saying so to type checkers.
        headers: Any = utils
        have = _size(part)
        if have > file.bytes:
            part.unlink()
            have = 0
        if have < file.bytes:
            repository = self._repository
            url = hf_hub_url(repository.id, file.name, revision=repository.commit)
            found = get_hf_file_metadata(url)
            with _Counted(part, lambda n: self._stage.reach(self._before + n)) as f:
                # A signed address of another host wants no token.
                http_get(
                    found.location,
                    f,
                    resume_size=have,
                    headers=headers.build_hf_headers() if found.location == url else None,
                    expected_size=file.bytes,
                )
        self._check(file, part, _sha256(part))

    def _by_client(self, file: RemoteFile, folder: Path | None) -> None:
        import huggingface_hub

        path = Path(
            huggingface_hub.hf_hub_download(
                self._repository.id,
                file.name,
                revision=self._repository.commit,
                local_dir=folder,
            )
        )
        if file.git_sha1:
            self._check(file, path.resolve(), _git_sha1(path))

    def _check(self, file: RemoteFile, path: Path, found: str) -> None:
        if found not in (file.sha256, file.git_sha1):
            path.unlink()
            raise _WrongHash(
                f"{self._repository.id}: {file.name} is not what the hub says it is (its hash "
                "differs); pull again, or tell its publisher"
            )


class _Counted(io.BufferedWriter):
    """A file that is appended to; `told` gets its size in bytes after every write."""

    def __init__(self, path: Path, told: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self._size_told = told

    def write(self, data: ReadableBuffer) -> int:
        """See io.BufferedWriter."""
        n = super().write(data)
        self._size_told(self.tell())
        return n


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return _digest(f, hashlib.sha256())


def _git_sha1(path: Path) -> str:
    """The name that git gives a file's content."""
    header = f"blob {path.stat().st_size}\0".encode()
    with path.open("rb") as f:
        return _digest(f, hashlib.sha1(header, usedforsecurity=False))


def _digest(file: BinaryIO, digest: hashlib._Hash) -> str:
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
