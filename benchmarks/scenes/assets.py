"""Pictures of objects and faces for words, files of this package: scenes that are measured are
drawn with nothing of the machine's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image, ImageFont

from edgevlm.benchmarks.scenes.kinds import OBJECTS

ASSETS = Path(__file__).parent / "assets"
SHEET = ASSETS / "objects.png"
SHEET_COLUMNS = 8
FACES_FILE = ASSETS / "words.ttc"
FACE_NAMES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
)


class Face(NamedTuple):
    """One face of a font file."""

    file: Path
    number: int = 0


WORD_FACES = tuple(Face(FACES_FILE, number) for number in range(len(FACE_NAMES)))


def random_face(faces: Sequence[Face], rng: Random) -> Face | None:
    """One of the faces, now and then Pillow's own (``None``)."""
    return None if rng.random() < 0.12 else rng.choice(faces)


@lru_cache(maxsize=512)
def font(face: Face | None, size: int) -> ImageFont.FreeTypeFont:
    """A face at a size in pixels; ``None`` is the one built into Pillow.

    Letters stand where Pillow's basic layout puts them: Raqm, the other, needs a library of the
    machine's and sets letters elsewhere.
    """
    if face is None:
        default = ImageFont.load_default(size)
        assert isinstance(default, ImageFont.FreeTypeFont)
        return default
    return ImageFont.truetype(
        str(face.file), size, index=face.number, layout_engine=ImageFont.Layout.BASIC
    )


@lru_cache(maxsize=1)
def object_bitmaps() -> dict[str, tuple[Image.Image, ...]]:
    """Every drawing of every object: tightly cropped RGBA pictures, about 120 pixels wide."""
    with Image.open(SHEET) as opened:
        sheet = opened.convert("RGBA")
    rows = -(-sum(map(len, OBJECTS.values())) // SHEET_COLUMNS)
    width, height = sheet.width // SHEET_COLUMNS, sheet.height // rows
    cells = (
        sheet.crop((x, y, x + width, y + height))
        for y in range(0, rows * height, height)
        for x in range(0, SHEET_COLUMNS * width, width)
    )
    drawn = (cell.crop(cell.getchannel("A").getbbox()) for cell in cells)
    return {kind: tuple(next(drawn) for _ in symbols) for kind, symbols in OBJECTS.items()}
