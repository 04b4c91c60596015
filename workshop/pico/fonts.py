"""The operating system's fonts: more faces for the words of training, and what the files of
assets/ are made of.
"""

from __future__ import annotations

import string
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from edgevlm.benchmarks.scenes.assets import FACE_NAMES, FACES_FILE, SHEET, SHEET_COLUMNS, Face
from edgevlm.benchmarks.scenes.kinds import OBJECTS

FONT_ROOT = Path("/usr/share/fonts")
EMOJI_FONT = "NotoColorEmoji.ttf"
EMOJI_SIZE = 109  # the only size of this bitmap font

# Letters in these families look like letters: no symbols, no script, no thin outline faces.
_TEXT_FAMILIES = (
    "DejaVuSans",
    "DejaVuSerif",
    "Liberation",
    "FreeSans",
    "FreeSerif",
    "FreeMono",
    "Roboto-",
    "OpenSans",
    "Lato-",
)
_UNSUITED = ("Thin", "Hairline", "Light", "Condensed", "Math", "ExtraLight")


@lru_cache(maxsize=1)
def training_faces() -> tuple[Face, ...]:
    """Plain text faces of the operating system, sorted by path; training sees more of them than
    the package holds.
    """
    found = tuple(
        Face(path)
        for path in sorted(FONT_ROOT.rglob("*.ttf"))
        if path.name.startswith(_TEXT_FAMILIES) and not any(w in path.name for w in _UNSUITED)
    )
    if not found:
        raise FileNotFoundError(
            f"no text fonts under {FONT_ROOT}: apt-get install fonts-dejavu fonts-liberation"
        )
    return found


def write_assets() -> tuple[Path, Path]:
    """Makes the files of assets/ from the packages fonts-noto-color-emoji and fonts-dejavu-core;
    needs fonttools.
    """
    SHEET.parent.mkdir(exist_ok=True)
    object_sheet(_find(EMOJI_FONT)).save(SHEET, optimize=True)
    _write_faces([_find(f"{name}.ttf") for name in FACE_NAMES], FACES_FILE)
    return SHEET, FACES_FILE


def object_sheet(emoji_font: Path) -> Image.Image:
    """One drawing of an object to a cell, in the order of kinds.py."""
    font = ImageFont.truetype(str(emoji_font), EMOJI_SIZE)
    drawn = [_drawing(font, symbol) for symbols in OBJECTS.values() for symbol in symbols]
    width, height = (max(d.size[axis] for d in drawn) for axis in (0, 1))
    rows = -(-len(drawn) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SHEET_COLUMNS * width, rows * height))
    for k, picture in enumerate(drawn):
        sheet.paste(picture, (k % SHEET_COLUMNS * width, k // SHEET_COLUMNS * height))
    return sheet


def _drawing(font: ImageFont.FreeTypeFont, symbol: str) -> Image.Image:
    canvas = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(canvas).text((8, 8), symbol, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    assert box is not None, f"the emoji font has no drawing of {symbol!r}"
    return canvas.crop(box)


def _write_faces(files: list[Path], target: Path) -> None:
    """Writes a collection of the faces with nothing but the letters of words and a space."""
    from fontTools import subset, ttLib

    options: Any = subset.Options(
        layout_features=[], legacy_kern=True, drop_tables=["GDEF", "GPOS", "GSUB", "MATH"]
    )
    made = ttLib.TTCollection()
    for file in files:
        face = ttLib.TTFont(file, recalcTimestamp=False)
        subsetter = subset.Subsetter(options)
        subsetter.populate(text=string.ascii_letters + " ")
        subsetter.subset(face)
        made.fonts.append(face)
    made.save(target)


def _find(name: str) -> Path:
    for path in sorted(FONT_ROOT.rglob(name)):
        return path
    raise FileNotFoundError(
        f"{name} not found under {FONT_ROOT}: apt-get install fonts-noto-color-emoji "
        "fonts-dejavu-core"
    )
