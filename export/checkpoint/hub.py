"""Finds a source: a folder on this machine, or a model on the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path

from edgevlm.bundle import check_path
from edgevlm.errors import BundleError, HubError, SourceError
from edgevlm.hub.download import cached, snapshot
from edgevlm.hub.repository import RemoteFile, Repository, look_up, parse
from edgevlm.progress import Report

# What an export reads; everything else of a repository stays where it is.
PATTERNS = [
    "*.json",
    "*.safetensors",
    "tokenizer.model",
    "merges.txt",
    "chat_template.jinja",
    "conversation.py",
    "README.md",
    "non_lora_trainables.bin",
    "mm_projector.bin",
]
# Weights in torch's format, taken from a repository that has no others.
PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin"]
_REVISION = re.compile("[0-9a-f]{40}")


def locate(source: str | os.PathLike[str], report: Report | None = None) -> tuple[Path, str]:
    """The checkpoint's folder and the model's name, of a folder or of `org/name[@revision]`.

    A model on the hub is downloaded into the hub's cache. Raises SourceError.
    """
    if not os.fspath(source):
        raise SourceError("the source's name is empty; name a folder, or a model on the hub")
    folder = Path(source)
    if folder.is_dir():
        try:
            check_path(folder.absolute())
        except BundleError as e:
            raise SourceError(str(e)) from None
        return folder, _name(folder.resolve())
    if folder.exists():
        raise SourceError(f"{folder}: is a file; name the checkpoint's folder")
    found = parse(os.fspath(source))
    if found is None:
        raise SourceError(f"{source}: no such folder; name one, or a model on the hub as org/name")
    repo, revision = found
    return _download(repo, revision, report), repo.split("/")[1]


def _name(folder: Path) -> str:
    """The model's name: the folder's, or the repository's where it lies in the hub's cache."""
    return origin(folder).partition("@")[0].split("/")[-1] or folder.name


def origin(folder: Path) -> str:
    """`org/name@COMMIT` of a folder in the hub's cache, which calls folders
    models--org--name/snapshots/COMMIT; empty for others.
    """
    repository, revision = folder.parent.parent.name, folder.name
    if folder.parent.name != "snapshots" or not _REVISION.fullmatch(revision):
        return ""
    return f"{repository.removeprefix('models--').replace('--', '/', 1)}@{revision}"


def _download(repo: str, revision: str | None, report: Report | None) -> Path:
    """The folder in the hub's cache of a checkpoint's files, where the hub cannot be reached as
    far as they were downloaded before.
    """
    try:
        repository = look_up(repo, revision)
    except HubError:
        if found := cached(repo, revision):
            return found
        raise
    return snapshot(repository, wanted(repository), revision=revision, report=report)


def wanted(repository: Repository) -> list[RemoteFile]:
    """The files that an export reads."""
    names = repository.names
    patterns = PATTERNS if fnmatch.filter(names, "*.safetensors") else PATTERNS + PICKLES
    root = [f for f in repository.files if "/" not in f.name]
    return [f for f in root if any(fnmatch.fnmatch(f.name, p) for p in patterns)]
