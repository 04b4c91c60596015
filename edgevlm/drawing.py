"""Boxes, points, labels and masks drawn into a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.image import RGB
from edgevlm.types import Box, Point

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont
    from PIL.ImageFont import ImageFont as BitmapFont

# Okabe and Ito's, which the colour-blind tell apart; in turn for each new label.
_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (238, 238, 238),
)
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
# The share of a mask's colour in what is seen.
_OPACITY = 0.5

Colour = tuple[int, int, int]


def draw(rgb: RGB, things: Sequence[Box | Point]) -> Image:
    """A copy of the picture with every box, its mask, every point and their labels drawn into it,
    one colour a label.
    """
    from PIL import Image, ImageDraw, ImageFont

    boxes = [thing for thing in things if isinstance(thing, Box)]
    labels = list(dict.fromkeys(thing.label for thing in things))
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(labels)}
    seen = rgb.copy()
    for box in boxes:
        if box.mask is not None:
            mixed = seen[box.mask] * (1 - _OPACITY) + np.array(colours[box.label]) * _OPACITY
            seen[box.mask] = mixed.round().astype(np.uint8)
    picture = Image.fromarray(seen)
    canvas = ImageDraw.Draw(picture)
    line = max(2, round(min(picture.size) / 200))
    font = ImageFont.load_default(max(12, round(min(picture.size) / 30)))
    for box in boxes:
        corners = (*sorted((box.x0, box.x1)), *sorted((box.y0, box.y1)))
        x0, x1, y0, y1 = corners
        # A dark edge on both sides, so that the line is seen on a ground of its own colour.
        canvas.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=_BLACK, width=line + 2)
        canvas.rectangle((x0, y0, x1, y1), outline=colours[box.label], width=line)
    for thing in things:
        if isinstance(thing, Point):
            _mark(canvas, thing, colours[thing.label], 3 * line)
    for thing in things:
        if thing.label:
            around = thing if isinstance(thing, Box) else _around(thing, 3 * line)
            _write(canvas, font, around, colours[thing.label], picture.size)
    return picture


def _around(point: Point, radius: int) -> Box:
    """The box of a point's mark, which its label stands above."""
    x, y = point.x, point.y
    return Box(x - radius, y - radius, x + radius, y + radius, point.label)


def _mark(canvas: ImageDraw, point: Point, colour: Colour, radius: int) -> None:
    """A disc with a dark edge and a white ring, and a dark middle."""
    for r, ink in ((radius, _BLACK), (radius - 1, _WHITE), (radius * 0.8, colour)):
        canvas.ellipse((point.x - r, point.y - r, point.x + r, point.y + r), fill=ink)
    r = max(1.0, radius / 4)
    canvas.ellipse((point.x - r, point.y - r, point.x + r, point.y + r), fill=_BLACK)


def _write(
    canvas: ImageDraw, font: FreeTypeFont | BitmapFont, box: Box, colour: Colour,
    size: tuple[int, int],
) -> None:  # fmt: skip
    """The label above its box, or inside where the picture ends, on a ground of its colour."""
    left, top, right, bottom = canvas.textbbox((0, 0), box.label, font=font)
    pad = max(2, round((bottom - top) / 6))
    width, height = right - left + 2 * pad, bottom - top + 2 * pad
    x = max(0, min(min(box.x0, box.x1), size[0] - width))
    y = min(box.y0, box.y1) - height
    y = max(0, min(y if y >= 0 else min(box.y0, box.y1), size[1] - height))
    canvas.rectangle((x, y, x + width, y + height), fill=colour, outline=_BLACK)
    # Rec. 601's luma: black on light colours, white on dark ones.
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = _BLACK if light > 128 else _WHITE
    canvas.text((x + pad - left, y + pad - top), box.label, fill=ink, font=font)
