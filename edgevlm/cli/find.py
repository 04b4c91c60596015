"""edgevlm detect, point, segment: objects in a picture by name"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from edgevlm.cli.jsonl import Record
from edgevlm.cli.many import Asked, Many, ask_each, asked_task, each_source, many_options
from edgevlm.cli.signals import Aside
from edgevlm.types import Box

if TYPE_CHECKING:
    from PIL import Image

    from edgevlm.runtimes.session import VLM
    from edgevlm.types import Reply

# What Pillow's writers raise for a picture that their format has no room for.
_REFUSALS = (OSError, ValueError, OverflowError, RuntimeError, struct.error)


def _finding(command: Callable[..., None]) -> Callable[..., None]:
    """Adds what all commands take."""
    for option in (
        json_option,
        many_options,
        answering,
        click.option("-o", "--output", "--out", type=click.Path(path_type=Path), metavar="PICTURE",
                     help="Write the picture with what was found drawn into it."),
        click.argument("objects", nargs=-1, required=True),
    ):  # fmt: skip
        command = option(command)
    return command


_COCO = click.option(
    "--coco",
    "as_coco",
    is_flag=True,
    help="A data set in COCO's format (JSON), of many pictures one for all.",
)


@click.command(cls=Aside)
@_finding
@_COCO
def detect(**given: Any) -> None:
    """Find OBJECTS in a picture, or in each of many: `edgevlm ask --help` says how they are named.

    One line a box: its label, a tab, then x0 y0 x1 y1 in pixels of the upright picture.
    """
    _find("detect", **given)


@click.command(cls=Aside)
@_finding
def point(**given: Any) -> None:
    """Point at OBJECTS in a picture, or in each of many: `edgevlm ask --help` says how they are
    named.

    One line a point: its label, a tab, then x y in pixels of the upright picture. Moondream2 can.
    """
    _find("point", as_coco=False, **given)


@click.command(cls=Aside)
@_finding
@_COCO
def segment(**given: Any) -> None:
    """Find OBJECTS, with their masks, in a picture, or in each of many: `edgevlm ask --help` says
    how they are named.

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
    many: Many,
) -> None:
    if as_json and as_coco:
        raise click.UsageError("--json and --coco are two forms of one output; choose one")
    if (sources_of_many := each_source(images, many)) is not None:
        if output:
            other = "--json has the points" if task == "point" else "--coco has the boxes"
            raise click.UsageError(f"-o draws one picture; {other} of many")
        asked = _each_asked(task, objects, as_coco)
        ask_each(asked, sources_of_many, many, run, as_json=as_json)
        return
    if len(images) > 1:
        raise click.UsageError(f"{task} takes one picture; --each finds in each of many")
    _find_in_one(task, objects, output, images, as_json, as_coco, run)


def _find_in_one(
    task: str,
    objects: tuple[str, ...],
    output: Path | None,
    images: tuple[str, ...],
    as_json: bool,
    as_coco: bool,
    run: Run,
) -> None:
    from edgevlm.drawing import draw
    from edgevlm.image import read_image

    if output:
        check_output(output)
    (source,) = read_pictures(images)
    picture = read_image(source)
    height, width = picture.shape[:2]
    if output:
        _check_sides(output, height, width)
    with run.load([picture]) as vlm:
        reply = vlm.ask(vlm.task(task, objects), picture, **run.sampling)
        reply = _masked(task, vlm, reply)
    record = _as_dict(task, reply)
    if as_json:
        click.echo(json.dumps(record))
    elif as_coco:
        _print_coco([{"file": _name(source), **record}])
    else:
        click.echo("".join(f"{line}\n" for line in _lines(record)), nl=False)
        if not (reply.boxes or reply.points):
            click.echo("Nothing was found.", err=True)
    print_notes(reply, vlm, stats=run.stats)
    _note_masks(task, [record])
    if output:
        save(draw(picture, (*reply.boxes, *reply.points)), output)


def _each_asked(task: str, objects: tuple[str, ...], as_coco: bool) -> Asked:
    def end(records: list[Record]) -> None:
        if as_coco:
            _print_coco(records)
        _note_masks(task, records)

    return asked_task(
        task,
        objects,
        kind=task,
        record=lambda vlm, reply: _as_dict(task, _masked(task, vlm, reply)),
        lines=lambda record: [] if as_coco else _lines(record),
        # Records are kept for the end where it needs them.
        end=end if as_coco or task == "segment" else None,
    )


def _masked(task: str, vlm: VLM, reply: Reply) -> Reply:
    """The reply, whose boxes have their masks where those were asked for."""
    if task != "segment":
        return reply
    assert reply.size is not None  # there was one picture
    return replace(reply, boxes=tuple(vlm.masked(reply.boxes, *reply.size)))


def _as_dict(task: str, reply: Reply) -> Record:
    """The reply, whose boxes or points also stand in shares of the picture's sides; masks as run
    lengths.
    """
    from edgevlm.coco import encoded

    assert reply.size is not None  # there was one picture
    width, height = reply.size
    key = "points" if task == "point" else "boxes"
    data = {"width": width, "height": height, key: [], **as_dict(reply)}
    for found, at in zip(data.get("points", ()), reply.points, strict=True):
        found["normalized"] = [round(share, 6) for share in at.normalized(width, height)]
    for found, box in zip(data.get("boxes", ()), reply.boxes, strict=True):
        found["normalized"] = [round(share, 6) for share in box.normalized(width, height)]
        if box.mask is not None:
            found["mask"] = encoded(box.mask)
    return data


def _boxes(record: Record) -> list[Box]:
    """The boxes of a record as `_as_dict` made it."""
    from edgevlm.coco import decoded

    return [
        Box(
            found["x0"],
            found["y0"],
            found["x1"],
            found["y1"],
            found["label"],
            tuple(found["segment"]),
            decoded(found["mask"]) if "mask" in found else None,
        )
        for found in record["boxes"]
    ]


def _print_coco(records: Sequence[Record]) -> None:
    from edgevlm.coco import CocoSet

    data = CocoSet()
    for record in records:
        data.add(record["file"], record["width"], record["height"], _boxes(record))
    click.echo(json.dumps(data.as_dict()))


def _lines(record: Record) -> list[str]:
    points = [f"{at['label']}\t{at['x']:.0f} {at['y']:.0f}" for at in record.get("points", ())]
    return points or [
        f"{box['label']}\t{box['x0']:.0f} {box['y0']:.0f} {box['x1']:.0f} {box['y1']:.0f}"
        for box in record.get("boxes", ())
    ]


def _note_masks(task: str, records: Sequence[Record]) -> None:
    boxes = (box for record in records for box in record.get("boxes", ()))
    if task == "segment" and any(box["segment"] and "mask" not in box for box in boxes):
        click.echo(
            "Boxes without masks: this bundle has no mask decoder; `edgevlm export "
            "--segment-decoder vae-oid.npz` makes one that has.",
            err=True,
        )


def _name(source: str | bytes) -> str:
    """A picture's file name, for a data set."""
    from edgevlm.image.urls import without_credentials

    if isinstance(source, bytes):
        return "stdin"
    return without_credentials(source).rstrip("/").rpartition("/")[2] or source


def check_output(output: Path) -> None:
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


def save(picture: Image.Image, output: Path) -> None:
    """Writes a picture in the format of its name, whole or not at all."""
    try:
        write_whole(output, _encoded(picture, output))
    except _REFUSALS as e:
        reason = e.strerror if isinstance(e, OSError) else None
        raise click.ClickException(f"{output}: cannot be written ({reason or e})") from None
