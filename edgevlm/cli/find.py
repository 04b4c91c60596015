"""edgevlm detect, segment: objects in a picture by name"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cleanup import write_whole
from edgevlm.cli.common import (
    Run,
    answering,
    as_dict,
    json_option,
    print_notes,
    read_pictures,
)
from edgevlm.cli.signals import Aside

if TYPE_CHECKING:
    from PIL import Image

    from edgevlm.types import Box, Reply

# What Pillow's writers raise for a picture that their format has no room for.
_REFUSALS = (OSError, ValueError, OverflowError, RuntimeError, struct.error)


def _finding(command: Callable[..., None]) -> Callable[..., None]:
    """Adds what both commands take."""
    for option in (
        json_option,
        click.option("--coco", "as_coco", is_flag=True, help="A data set in COCO's format (JSON)."),
        answering,
        click.option("-o", "--output", "--out", type=click.Path(path_type=Path), metavar="PICTURE",
                     help="Write the picture with what was found drawn into it."),
        click.argument("objects", nargs=-1, required=True),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command(cls=Aside)
@_finding
def detect(**given: Any) -> None:
    """Find OBJECTS in a picture.

    One line a box: its label, a tab, then x0 y0 x1 y1 in pixels of the upright picture.
    """
    _find("detect", **given)


@click.command(cls=Aside)
@_finding
def segment(**given: Any) -> None:
    """Find OBJECTS in a picture, with their masks.

    One line a box, as detect has it; --json, --coco and -o have the masks. A bundle needs a mask
    decoder for them, see `edgevlm export --segment-decoder`; without one there are boxes.
    """
    _find("segment", **given)


def _find(
    task: str,
    objects: tuple[str, ...],
    output: Path | None,
    images: tuple[str, ...],
    as_json: bool,
    as_coco: bool,
    run: Run,
) -> None:
    from edgevlm.coco import coco
    from edgevlm.drawing import draw
    from edgevlm.image import read_image

    if as_json and as_coco:
        raise click.UsageError("--json and --coco are two forms of one output; choose one")
    if output:
        _check_output(output)
    sources = read_pictures(images)
    if len(sources) > 1:
        raise click.UsageError(f"{task} takes one picture")
    picture = read_image(sources[0])
    height, width = picture.shape[:2]
    if output:
        _check_sides(output, height, width)
    with run.load([picture]) as vlm:
        reply = vlm.ask(vlm.task(task, objects), picture, **run.sampling)
        boxes = vlm.masked(reply.boxes, width, height) if task == "segment" else reply.boxes
    if as_json:
        click.echo(json.dumps(_as_dict(reply, boxes, width, height)))
    elif as_coco:
        click.echo(json.dumps(coco(boxes, width, height, _name(sources[0]))))
    else:
        _print_boxes(boxes)
    print_notes(reply, vlm, stats=run.stats)
    if task == "segment" and any(box.segment and box.mask is None for box in boxes):
        click.echo(
            "Boxes without masks: this bundle has no mask decoder; `edgevlm export "
            "--segment-decoder vae-oid.npz` makes one that has.",
            err=True,
        )
    if output:
        _save(draw(picture, boxes), output)


def _as_dict(reply: Reply, boxes: Sequence[Box], width: int, height: int) -> dict[str, Any]:
    """The reply, whose boxes also stand in shares of the picture's sides; masks as run lengths."""
    from edgevlm.coco import run_lengths

    data = {"width": width, "height": height, "boxes": [], **as_dict(reply)}
    for found, box in zip(data["boxes"], boxes, strict=True):
        found["normalized"] = [round(share, 6) for share in box.normalized(width, height)]
        if box.mask is not None:
            found["mask"] = {"counts": run_lengths(box.mask), "size": [height, width]}
    return data


def _name(source: str | bytes) -> str:
    """A picture's file name, for a data set."""
    from edgevlm.image.urls import without_credentials

    if isinstance(source, bytes):
        return "stdin"
    return without_credentials(source).rstrip("/").rpartition("/")[2] or source


def _print_boxes(boxes: Sequence[Box]) -> None:
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
