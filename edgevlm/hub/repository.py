"""A repository on the hub, as it is at one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from edgevlm.hub.patience import persistently
from edgevlm.hub.refusals import told

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size in bytes and the hash that the hub states, SHA-256 of a
    large file, git's SHA-1 of another; both are empty where it states none.
    """

    name: str
    bytes: int
    sha256: str = ""
    git_sha1: str = ""


@dataclass(frozen=True)
class Repository:
    """A repository at a commit; `license` is the hub's tag."""

    id: str
    commit: str
    files: tuple[RemoteFile, ...]
    license: str = ""

    @property
    def names(self) -> set[str]:
        """Names of all files, with their folders."""
        return {file.name for file in self.files}


def parse(name: str) -> tuple[str, str | None] | None:
    """Repository and revision of `org/name[@revision]`; None for what is no such name.

    >>> parse("org/name@main")
    ('org/name', 'main')
    """
    match = _ID.fullmatch(name)
    return (match[1], match[2]) if match and not name.startswith(".") else None


def look_up(repo: str, revision: str | None = None) -> Repository:
    """Asks the hub what a repository holds, and whether its files may be had; None is its main
    branch. Raises HubError.
    """
    import huggingface_hub

    def ask() -> Any:
        api = huggingface_hub.HfApi()
        found = api.model_info(repo, revision=revision, files_metadata=True)
        # The listing of a gated repository is public.
        if found.gated:
            api.auth_check(repo)
        return found

    with told(repo, revision):
        info = persistently(ask, pauses=())
    card: Any = info.card_data or {}
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    return Repository(
        id=repo,
        commit=info.sha,
        files=tuple(_file(found) for found in info.siblings or ()),
        license=str(card.get("license") or (tags[0] if tags else "")),
    )


def _file(found: Any) -> RemoteFile:
    stored = found.lfs or {}
    return RemoteFile(
        name=found.rfilename,
        bytes=found.size or 0,
        sha256=stored["sha256"] if stored else "",
        git_sha1="" if stored else found.blob_id or "",
    )
