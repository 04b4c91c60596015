"""Finds a source: a folder on this machine, or a model on the Hugging Face hub."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgevlm.bundle import check_path
from edgevlm.errors import BundleError, SourceError
from edgevlm.export.progress import Report, Stage

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
# A full disk names no file.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


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
    match = _HUB_ID.fullmatch(os.fspath(source))
    if not match or os.fspath(source).startswith("."):
        raise SourceError(f"{source}: no such folder; name one, or a model on the hub as org/name")
    return _download(match[1], match[2], report), match[1].split("/")[1]


def _name(folder: Path) -> str:
    """The model's name: the folder's, or the repository's where it lies in the hub's cache, which
    calls folders models--org--name/snapshots/REVISION.
    """
    repository, revision = folder.parent.parent.name, folder.name
    if folder.parent.name == "snapshots" and _REVISION.fullmatch(revision):
        return repository.split("--")[-1]
    return folder.name


def _download(repo: str, revision: str | None, report: Report | None) -> Path:
    from huggingface_hub import errors

    where = f"{repo}@{revision}" if revision else repo
    try:
        with _quiet():
            found = _snapshot(repo, revision, PATTERNS, report)
            if not any(found.glob("*.safetensors")):
                found = _snapshot(repo, revision, PATTERNS + PICKLES, report)
            return found
    except errors.GatedRepoError:
        raise SourceError(
            f"{where}: access is restricted; accept its licence at https://huggingface.co/{repo} "
            "and log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{where}: has no such revision; leave out the part after @") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{where}: is neither a folder here nor a model on the hub; check the spelling, or log "
            "in with `hf auth login` if it is private"
        ) from None
    except errors.HFValidationError as e:
        raise SourceError(f"{where}: is not a valid name on the hub ({_line(e)})") from None
    except (OSError, errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as e:
        if getattr(e, "filename", None) or getattr(e, "errno", None) in _FULL:
            raise SourceError(
                f"{where}: cannot be kept in the hub's cache ({_line(e)}); "
                "HF_HOME names another folder"
            ) from None
        # requests' and httpx's errors are OSErrors in one release of the hub client, not in all.
        raise SourceError(
            f"{where}: cannot be downloaded ({_line(e)}); check the network or name a folder"
        ) from None


def _snapshot(repo: str, revision: str | None, patterns: list[str], report: Report | None) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, tqdm_class=_counter(report)
        )
    )


def _counter(report: Report | None) -> Any:
    """A stand-in for the hub client's bar over files that tells `report` instead of stderr."""
    from huggingface_hub import utils

    base: Any = utils.tqdm  # type: ignore[attr-defined]

    class Counter(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._stage = Stage(report, "download", kwargs.get("total") or 0, "files")

        # tqdm's pools told their bar by iterating over it until 4.67, and tell it so since then.
        def update(self, n: float | None = 1) -> None:
            self._stage.advance(int(n or 0))

        def __iter__(self) -> Iterator[Any]:
            for item in self.iterable:
                self._stage.advance(1)
                yield item

    return Counter


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub client's own progress bars and warnings on stderr."""
    from huggingface_hub import utils

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    # The client re-exports these without saying so to type checkers.
    bars: Any = utils
    silent = bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not silent:
            bars.enable_progress_bars()
