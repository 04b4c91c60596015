"""A contact sheet: found pictures in a grid, each with its score and its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from edgevlm.errors import ImageError
from edgevlm.image import read_image
from edgevlm.photos.store import FoundPhoto

_SIDE, _MARGIN, _LINE = 224, 12, 18
_COLUMNS = 5
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (225, 225, 225)


def contact_sheet(found: Sequence[FoundPhoto]) -> Image.Image:
    """Draws pictures in the order in which they were found; a grey square stands for one that
    cannot be read.
    """
    columns = min(_COLUMNS, max(1, len(found)))
    lines = -(-len(found) // columns)
    cell = _SIDE + 2 * _LINE + _MARGIN
    size = (_MARGIN + columns * (_SIDE + _MARGIN), _MARGIN + max(1, lines) * cell)
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, photo in enumerate(found):
        x = _MARGIN + (i % columns) * (_SIDE + _MARGIN)
        y = _MARGIN + (i // columns) * cell
        small = thumbnail(photo.file, _SIDE)
        sheet.paste(small, (x + (_SIDE - small.width) // 2, y + (_SIDE - small.height) // 2))
        name = photo.file.name.encode("ascii", "replace").decode()
        draw.text((x, y + _SIDE + 3), f"{photo.score:.3f}", _INK, font)
        draw.text((x, y + _SIDE + _LINE), name[:36], _INK, font)
    return sheet


def thumbnail(path: Path, side: int) -> Image.Image:
    """A picture, upright, within a square of `side` pixels; a grey one where it cannot be read."""
    try:
        whole = Image.fromarray(read_image(path))
    except ImageError:
        return Image.new("RGB", (side, side), _FAINT)
    return ImageOps.contain(whole, (side, side), Image.Resampling.BILINEAR)
