"""Options that classify, embed and search share: the model, its devices, and pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import edgevlm
from edgevlm import store
from edgevlm.cli.common import Command
from edgevlm.cli.names import InstalledName
from edgevlm.errors import ImageError, PromptError
from edgevlm.manifest import read_manifest
from edgevlm.models import installed, is_dual, resolve

if TYPE_CHECKING:
    from edgevlm.image import ImageSource
    from edgevlm.runtimes.dual import DualEncoder

PULL = "`edgevlm pull siglip2-base-224` gets one, `edgevlm models --all` lists others"
# Failures that are named at the end; the others are counted.
_NAMED = 5
_OPTIONS = (
    click.option("-m", "--model", type=InstalledName(), envvar="EDGEVLM_MODEL", metavar="MODEL",
                 help="Bundle folder or installed name of a CLIP or SigLIP  [env: EDGEVLM_MODEL; "
                 "default: the one that is installed]"),
    click.option("--threads", type=int, metavar="N", help="Threads of the engine  "
                 "[default: cores]"),
    click.option("--device", default="auto", show_default=True, metavar="DEVICE",
                 help="Device for the vision tower: auto, cpu, gpu, npu or one that `edgevlm "
                 "doctor` lists."),
)  # fmt: skip
IMAGES = click.option(
    "-i", "--image", "images", multiple=True, metavar="IMAGE",
    help="Path, URL, folder, pattern or - for stdin; repeatable.",
)  # fmt: skip


@dataclass(frozen=True)
class DualRun:
    """Values of the shared options."""

    model: str | None
    threads: int | None
    device: str

    @property
    def folder(self) -> Path:
        """The bundle's folder; raises PromptError where no dual encoder is named or installed."""
        if self.model is not None:
            folder = resolve(self.model)
            if not read_manifest(folder).text:
                raise PromptError(
                    f"{self.model}: answers questions and embeds no texts; this takes a CLIP or "
                    f"SigLIP: {PULL}"
                )
            return folder
        found = {name: folder for name, folder in installed().items() if is_dual(folder)}
        if (chosen := store.default()) in found:
            return found[chosen]
        if len(found) == 1:
            return next(iter(found.values()))
        if found:
            raise PromptError(f"name one of {', '.join(found)} with -m")
        raise PromptError(f"no CLIP or SigLIP is installed: {PULL}")

    def load(self) -> DualEncoder:
        """Loads the model."""
        return edgevlm.load_dual(self.folder, device=self.device, threads=self.threads)


def dual(command: Command) -> Command:
    """Adds the options of model and device; passes them as `run: DualRun`."""

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        run = DualRun(values.pop("model"), values.pop("threads"), values.pop("device"))
        command(run=run, **values)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def pictures(images: Sequence[str]) -> list[tuple[str, ImageSource]]:
    """Every picture that the words of -i stand for, with its name; raises ImageError for a folder
    or a pattern without any.
    """
    from edgevlm.cli.common import read_sources
    from edgevlm.image.listing import listed
    from edgevlm.image.urls import without_credentials

    found: list[tuple[str, ImageSource]] = []
    for word, source in zip(images, read_sources(tuple(images)), strict=True):
        if isinstance(source, bytes):
            found.append(("stdin", source))
            continue
        paths = None if word.strip()[:5].lower() == "data:" else listed(word, recursive=True)
        if paths == []:
            raise ImageError(word, "no pictures there; name another folder or pattern")
        if paths is None:
            found.append((without_credentials(word), source))
        else:
            found += [(str(path), path) for path in paths]
    return found


class Failures:
    """Pictures that could not be read, which are named at the end."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._count = 0

    def add(self, name: str, error: ImageError) -> None:
        """Notes one."""
        self._count += 1
        if len(self._lines) < _NAMED:
            self._lines.append(f"{name}: {error.reason}")

    def summarize(self) -> None:
        """Says on stderr what failed; raises Exit(1) if anything did."""
        for line in self._lines:
            click.echo(f"edgevlm: {line}", err=True)
        if more := self._count - len(self._lines):
            click.echo(f"edgevlm: and {more} more that failed", err=True)
        if self._count:
            raise click.exceptions.Exit(1)


def each_row(
    model: DualEncoder,
    found: Sequence[tuple[str, ImageSource]],
    failures: Failures,
) -> Iterator[tuple[str, Any]]:
    """The name and the row [d] of every picture that can be read, in turn, with a bar; the others
    go to `failures`. Of a single picture a failure is raised.
    """
    from edgevlm.cli.progress import PictureBar

    with PictureBar(len(found), 0) as bar:
        for name, row in model.rows(found):
            if isinstance(row, ImageError):
                if len(found) == 1:
                    raise row
                failures.add(name, row)
            else:
                with bar.aside():
                    yield name, row
            bar.advance()
