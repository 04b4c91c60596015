"""Finds a source: a folder on this machine, or a model on the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path

from edgevlm.bundle import check_path
from edgevlm.errors import BundleError, HubError, SourceError
from edgevlm.export.checkpoint import published
from edgevlm.export.checkpoint.published import ANY, Choice
from edgevlm.export.checkpoint.source import stated_base
from edgevlm.hub.download import cached, snapshot
from edgevlm.hub.repository import RemoteFile, Repository, look_up, parse
from edgevlm.progress import Report

# What an export reads; everything else of a repository stays where it is.
PATTERNS = [
    "*.json",
    "*.safetensors",
    "tokenizer.model",
    "spiece.model",
    "merges.txt",
    "chat_template.jinja",
    "conversation.py",
    "moondream.py",
    "README.md",
    "non_lora_trainables.bin",
    "mm_projector.bin",
]
# Weights in torch's format, taken from a repository that has no others.
PICKLES = [
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "adapter_model.bin",
    "open_clip_pytorch_model.bin",
]
# The same model a second time, where a repository has it in transformers' layout, too.
_TWICE = re.compile(r"open_clip_(?:pytorch_)?model\..+")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_REVISION = re.compile("[0-9a-f]{40}")


def locate(
    source: str | os.PathLike[str], report: Report | None = None, choice: Choice = ANY
) -> tuple[Path, str]:
    """The checkpoint's folder and the model's name, of a folder or of `org/name[@revision]`.

    A model on the hub is downloaded into the hub's cache; `choice` is for one that is published as
    several GGUF files. Raises SourceError.
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
    return _download(repo, revision, choice, report), repo.split("/")[1]


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


def settings_of(folder: Path, report: Report | None) -> Path:
    """The folder with the config, tokenizer and picture processor of published GGUF files: their
    own, or that of the original which their card names, from the hub. Raises SourceError.
    """
    if published.has_settings([p.name for p in folder.iterdir()]):
        return folder
    repo = original_of(folder, str(folder))
    try:
        repository = look_up(repo)
    except HubError:
        if found := cached(repo):
            return found
        raise
    return snapshot(repository, settings(repository), report=report)


def original_of(folder: Path, where: str) -> str:
    """The original's id on the hub that the card in a folder names; raises SourceError, of
    `where`, without one.
    """
    if base := stated_base(folder):
        return base
    raise SourceError(
        f"{where}: has GGUF files without the model's config.json, tokenizer and picture "
        "processor, and no card that names one base_model; copy those from the original's page"
    )


def settings(repository: Repository) -> list[RemoteFile]:
    """The files of an original that say what the model is, none of its weights."""
    return [f for f in wanted(repository) if not published.has_weights([f.name])]


def _download(repo: str, revision: str | None, choice: Choice, report: Report | None) -> Path:
    """The folder in the hub's cache of a checkpoint's files, where the hub cannot be reached as
    far as they were downloaded before.
    """
    try:
        repository = look_up(repo, revision)
    except HubError:
        if found := cached(repo, revision):
            return found
        raise
    files = wanted(repository, choice)
    return snapshot(repository, files, revision=revision, report=report)


def wanted(repository: Repository, choice: Choice = ANY) -> list[RemoteFile]:
    """The files that an export reads, of a repository without a checkpoint's weights the chosen
    GGUF files. Raises SourceError as `published.choose`.
    """
    names = repository.names
    patterns = PATTERNS if fnmatch.filter(names, "*.safetensors") else PATTERNS + PICKLES
    root = [f for f in repository.files if "/" not in f.name]
    twice = any(name in names for name in _WEIGHTS)
    files = [
        f
        for f in root
        if any(fnmatch.fnmatch(f.name, p) for p in patterns)
        and not (twice and _TWICE.fullmatch(f.name))
    ]
    if published.has_weights([f.name for f in files]):
        return files
    chosen = published.choose(names, choice, repository.id)
    return [*files, *(f for f in root if chosen and f.name in (chosen.decoder, chosen.mmproj))]
