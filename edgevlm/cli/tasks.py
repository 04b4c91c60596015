"""edgevlm caption, detect, ocr: a model's own tasks by name"""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cleanup import write_whole
from edgevlm.cli.common import (
    Run,
    answering,
    as_dict,
    json_option,
    print_notes,
    read_sources,
    show,
    tile_progress,
)
from edgevlm.cli.forms import forms
from edgevlm.cli.signals import Aside
from edgevlm.sampling import task_options

if TYPE_CHECKING:
    from PIL import Image

    from edgevlm.types import Box

# What Pillow's writers raise for a picture that their format has no room for.
_REFUSALS = (OSError, ValueError, OverflowError, RuntimeError, struct.error)


@click.command(cls=Aside)
@click.option("-l", "--language", default="en", show_default=True, help="Language code.")
@answering
@forms
@json_option
def caption(language: str, images: tuple[str, ...], as_json: bool, run: Run) -> None:
    """Describe a picture."""
    _run_task("caption", language, images, as_json, run)


@click.command(cls=Aside)
@answering
@forms
@json_option
def ocr(images: tuple[str, ...], as_json: bool, run: Run) -> None:
    """Read the text in a picture."""
    _run_task("ocr", "en", images, as_json, run)


def _run_task(task: str, language: str, images: tuple[str, ...], as_json: bool, run: Run) -> None:
    sources = _needed(images)
    with run.load(sources) as vlm:
        prompt = vlm.task(task, language=language)
        options = task_options(task, vlm.manifest.answer) | run.sampling
        answer = vlm.stream(prompt, sources, progress=tile_progress, **options)
        show(answer, vlm, as_json=as_json, stats=run.stats)


@click.command(cls=Aside)
@click.argument("objects", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="PICTURE",
              help="Write the picture with the boxes drawn into it.")  # fmt: skip
@answering
@json_option
def detect(
    objects: tuple[str, ...],
    output: Path | None,
    images: tuple[str, ...],
    as_json: bool,
    run: Run,
) -> None:
    """Find OBJECTS in a picture.

    One line a box: its label, a tab, then x0 y0 x1 y1 in pixels of the upright picture.
    """
    from edgevlm.boxes import draw
    from edgevlm.image import read_image

    if output:
        _check_output(output)
    sources = _needed(images)
    if len(sources) > 1:
        raise click.UsageError("detect takes one picture")
    picture = read_image(sources[0])
    if output:
        _check_sides(output, *picture.shape[:2])
    with run.load([picture]) as vlm:
        reply = vlm.ask(vlm.task("detect", objects), picture, **run.sampling)
    if as_json:
        click.echo(json.dumps({"boxes": [], **as_dict(reply)}))
    else:
        _print_boxes(reply.boxes)
    print_notes(reply, vlm, stats=run.stats)
    if output:
        _save(draw(picture, reply.boxes), output)


def _needed(images: tuple[str, ...]) -> list[str | bytes]:
    if not images:
        raise click.UsageError("name a picture with -i")
    return read_sources(images)


def _print_boxes(boxes: tuple[Box, ...]) -> None:
    for box in boxes:
        click.echo(f"{box.label}\t{box.x0:.0f} {box.y0:.0f} {box.x1:.0f} {box.y1:.0f}")
    if not boxes:
        click.echo("Nothing was found.", err=True)


def _check_output(output: Path) -> None:
    """Refuses a picture that could not be written, before anything is read or computed."""
    from PIL import Image

    Image.init()
    try:
        _encoded(Image.new("RGB", (1, 1)), output)
    except (KeyError, *_REFUSALS):
        raise click.BadParameter(
            f"{output}: Pillow writes no {output.suffix or 'such'} pictures in colour; use .png"
        ) from None
    if not output.parent.is_dir():
        raise click.BadParameter(f"{output}: the folder {output.parent} does not exist")
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise click.BadParameter(f"{output}: cannot be written; name another file")


def _check_sides(output: Path, height: int, width: int) -> None:
    """Refuses sides that are too long for the format: one line of pixels has them as well."""
    from PIL import Image

    for size in ((width, 1), (1, height)):
        try:
            _encoded(Image.new("RGB", size), output)
        except _REFUSALS as e:
            raise click.BadParameter(
                f"{output}: Pillow writes no {output.suffix} picture of {width} x {height} pixels "
                f"({e}); use .png"
            ) from None


def _encoded(picture: Image.Image, output: Path) -> bytes:
    """The file's bytes in the format of its name; raises one of _REFUSALS, or KeyError for a name
    that belongs to none.
    """
    from PIL import Image

    file = io.BytesIO()
    picture.save(file, Image.EXTENSION[output.suffix.lower()])
    return file.getvalue()


def _save(picture: Image.Image, output: Path) -> None:
    try:
        write_whole(output, _encoded(picture, output))
    except _REFUSALS as e:
        reason = e.strerror if isinstance(e, OSError) else None
        raise click.ClickException(f"{output}: cannot be written ({reason or e})") from None
