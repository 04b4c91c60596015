"""edgevlm caption, detect, ocr: a model's own tasks by name"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgevlm.cli.common import (
    Run,
    answering,
    as_dict,
    json_option,
    print_stats,
    read_sources,
    show,
)

if TYPE_CHECKING:
    from edgevlm.types import Box


@click.command()
@click.option("-l", "--language", default="en", show_default=True, help="Language code.")
@answering
@json_option
def caption(language: str, images: tuple[str, ...], as_json: bool, run: Run) -> None:
    """Describe a picture."""
    _run_task("caption", language, _needed(images), as_json, run)


@click.command()
@answering
@json_option
def ocr(images: tuple[str, ...], as_json: bool, run: Run) -> None:
    """Read the text in a picture."""
    _run_task("ocr", "en", _needed(images), as_json, run)


def _run_task(task: str, language: str, images: list[str | bytes], as_json: bool, run: Run) -> None:
    with run.load() as vlm:
        prompt = vlm.task(task, language=language)
        show(vlm.stream(prompt, images, **run.sampling), as_json=as_json, stats=run.stats_of(vlm))


@click.command()
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

    _check_output(output)
    sources = _needed(images)
    if len(sources) > 1:
        raise click.UsageError("detect takes one picture")
    picture = read_image(sources[0])
    with run.load() as vlm:
        reply = vlm.ask(vlm.task("detect", objects), picture, **run.sampling)
    if output:
        _save(draw(picture, reply.boxes), output)
    if as_json:
        click.echo(json.dumps({"boxes": [], **as_dict(reply)}))
    else:
        _print_boxes(reply.boxes)
    if run.stats:
        print_stats(reply, vlm.devices)


def _needed(images: tuple[str, ...]) -> list[str | bytes]:
    if not images:
        raise click.UsageError("name a picture with -i")
    return read_sources(images)


def _print_boxes(boxes: tuple[Box, ...]) -> None:
    for box in boxes:
        click.echo(f"{box.label}\t{box.x0:.0f} {box.y0:.0f} {box.x1:.0f} {box.y1:.0f}")
    if not boxes:
        click.echo("Nothing was found.", err=True)


def _check_output(output: Path | None) -> None:
    """Refuses a picture that could not be written, before anything is computed."""
    if output is None:
        return
    from PIL import Image

    Image.init()
    if Image.EXTENSION.get(output.suffix.lower()) not in Image.SAVE:
        raise click.BadParameter(
            f"{output}: Pillow writes no {output.suffix or 'such'} pictures; use .png"
        )
    if not output.parent.is_dir():
        raise click.BadParameter(f"{output}: the folder {output.parent} does not exist")


def _save(picture: object, output: Path) -> None:
    from PIL import Image

    assert isinstance(picture, Image.Image)
    try:
        picture.save(output)
    except OSError as e:
        output.unlink(missing_ok=True)
        raise click.ClickException(f"{output}: cannot be written ({e.strerror or e})") from None
