"""edgevlm search"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from edgevlm.cli.dual import DualRun, dual
from edgevlm.cli.signals import Aside, last_words

if TYPE_CHECKING:
    from edgevlm.photos import FoundPhoto, PhotoIndex
    from edgevlm.photos.index import IndexUpdate
    from edgevlm.types import Progress

T = TypeVar("T")

_NAMED = 5


@click.command(cls=Aside)
@click.argument("words", nargs=-1, required=True, metavar="[QUERY] FOLDER")
@click.option(
    "-i", "--image", metavar="IMAGE", help="Picture to look for: path, URL or - for stdin."
)
@click.option(
    "-n",
    "--limit",
    default=10,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="N",
    help="Most pictures to show.",
)
@click.option(
    "--duplicates", is_flag=True, help="Show groups of pictures that are nearly the same."
)
@click.option(
    "--threshold",
    default=0.97,
    show_default=True,
    type=click.FloatRange(-1, 1),
    metavar="COSINE",
    help="Least likeness of --duplicates; 1 is the same picture.",
)
@click.option(
    "--sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw what was found as a contact sheet (.jpg, .png, ...).",
)
@click.option(
    "--index",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File of the index  [default: one in the cache folder]",
)
@click.option("--no-update", is_flag=True, help="Search what is indexed; look for no changes.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of objects with file and score.")
@dual
def search(
    words: tuple[str, ...], image: str | None, limit: int, duplicates: bool, threshold: float,
    sheet: Path | None, path: Path | None, no_update: bool, as_json: bool, run: DualRun,
) -> None:  # fmt: skip
    """Find pictures in FOLDER by words or by another picture, the best first, with their cosines.

    The folder is indexed first, and whenever something in it has changed; stopped, the same
    command goes on. Without a query it is only indexed. Nothing leaves this machine.
    """
    *query, folder = words
    asked = len(query) + (image is not None) + duplicates
    if len(query) > 1 or asked > 1:
        raise click.UsageError("one QUERY, one picture (-i) or --duplicates; quote several words")
    if sheet and not asked:
        raise click.UsageError("--sheet draws what was found; name a QUERY or a picture")
    if sheet:
        _check_sheet(sheet)
    from edgevlm.photos import PhotoIndex

    with run.load() as model, PhotoIndex(folder, model, path=path) as index:
        if not no_update:
            _report(_updated(index))
        if duplicates:
            _show_groups(_compared(index, threshold)[:limit], as_json, sheet)
            return
        if not asked:
            return
        found = index.search(query[0], limit) if query else _similar(index, image or "", limit)
    _show(found, as_json, sheet)


def _similar(index: PhotoIndex, image: str, limit: int) -> list[FoundPhoto]:
    from edgevlm.cli.common import read_sources

    (source,) = read_sources((image,))
    return index.similar(source, limit)


def _updated(index: PhotoIndex) -> IndexUpdate:
    """Updates with one bar; a stop says how to go on."""
    state = {"done": 0, "total": 0}

    def words() -> str:
        done, total = state["done"], state["total"]
        return f"edgevlm: {done} of {total} pictures are indexed; the same command goes on"

    with last_words(words):
        return _barred(index.update, state)


def _compared(index: PhotoIndex, threshold: float) -> list[list[FoundPhoto]]:
    return _barred(lambda progress: index.duplicates(threshold, progress), {})


def _barred(work: Callable[[Callable[[Progress], None]], T], state: dict[str, int]) -> T:
    """Runs work with one bar, which is made once it is known how much there is."""
    from edgevlm.cli.progress import PictureBar

    with ExitStack() as stack:
        bars: list[PictureBar] = []

        def show(progress: Progress) -> None:
            before = state.get("done", 0)
            state.update(done=progress.done, total=progress.total)
            if not bars and progress.done == progress.total:
                return
            if not bars and progress.done:
                bars.append(stack.enter_context(PictureBar(progress.total, progress.done)))
            elif bars:
                for _ in range(progress.done - before):
                    bars[0].advance()

        return work(show)


def _report(update: IndexUpdate) -> None:
    parts = (("new", update.added), ("moved", update.moved), ("gone", update.removed))
    changed = ", ".join(f"{n} {what}" for what, n in parts if n)
    if changed:
        click.echo(f"{update.total} pictures indexed: {changed}.", err=True)
    for file, reason in list(update.failures.items())[:_NAMED]:
        click.echo(f"edgevlm: {file}: {reason}", err=True)
    if (more := len(update.failures) - _NAMED) > 0:
        click.echo(f"edgevlm: and {more} more that cannot be read", err=True)


def _show(found: Sequence[FoundPhoto], as_json: bool, sheet: Path | None) -> None:
    if as_json:
        click.echo(json.dumps([_object(photo) for photo in found]))
    else:
        for photo in found:
            click.echo(f"{photo.score:.4f}  {photo.file}")
    if not found:
        click.echo("Nothing is indexed there.", err=True)
    _draw(found, sheet)


def _show_groups(found: Sequence[Sequence[FoundPhoto]], as_json: bool, sheet: Path | None) -> None:
    if as_json:
        click.echo(json.dumps([[_object(photo) for photo in group] for group in found]))
    else:
        for i, group in enumerate(found):
            click.echo("\n" if i else "", nl=False)
            for photo in group:
                click.echo(f"{photo.score:.4f}  {photo.file}")
    if not found:
        click.echo("No two pictures are that much alike.", err=True)
    _draw([photo for group in found for photo in group], sheet)


def _object(photo: FoundPhoto) -> dict[str, object]:
    return {"file": str(photo.file), "score": round(photo.score, 6)}


def _check_sheet(sheet: Path) -> None:
    from edgevlm.cli.find import check_output

    check_output(sheet)


def _draw(found: Sequence[FoundPhoto], sheet: Path | None) -> None:
    if sheet and found:
        from edgevlm.cli.find import save
        from edgevlm.photos.sheet import contact_sheet

        save(contact_sheet(found), sheet)
        click.echo(sheet, err=True)
