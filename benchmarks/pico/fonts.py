"""Finds the fonts that draw pictures of objects and words; nothing of them is stored in the
repository.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from edgevlm.benchmarks.pico.kinds import OBJECTS

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
)
_TEXT_FAMILIES_MORE = ("OpenSans", "Lato-")
_UNSUITED = ("Thin", "Hairline", "Light", "Condensed", "Math", "ExtraLight")


def find_emoji_font() -> Path:
    """The colour-emoji font of the operating system (package fonts-noto-color-emoji)."""
    for path in sorted(FONT_ROOT.rglob(EMOJI_FONT)):
        return path
    raise FileNotFoundError(
        f"{EMOJI_FONT} not found under {FONT_ROOT}: apt-get install fonts-noto-color-emoji"
    )


@lru_cache(maxsize=1)
def text_fonts() -> tuple[Path, ...]:
    """Plain text fonts for printed words, sorted by path."""
    names = (*_TEXT_FAMILIES, *_TEXT_FAMILIES_MORE)
    found = [
        path
        for path in sorted(FONT_ROOT.rglob("*.ttf"))
        if path.name.startswith(names) and not any(word in path.name for word in _UNSUITED)
    ]
    if not found:
        raise FileNotFoundError(
            f"no text fonts under {FONT_ROOT}: apt-get install fonts-dejavu fonts-liberation"
        )
    return tuple(found)


@lru_cache(maxsize=512)
def text_font(path: Path | None, size: int) -> ImageFont.FreeTypeFont:
    """A text font at a size in pixels; ``None`` is the face built into Pillow."""
    if path is None:
        default = ImageFont.load_default(size)
        assert isinstance(default, ImageFont.FreeTypeFont)
        return default
    return ImageFont.truetype(str(path), size)


@lru_cache(maxsize=1)
def emoji_bitmaps() -> dict[str, tuple[Image.Image, ...]]:
    """Every drawing of every object: tightly cropped RGBA pictures, about 130 pixels wide."""
    font = ImageFont.truetype(str(find_emoji_font()), EMOJI_SIZE)
    return {
        kind: tuple(_render(font, symbol) for symbol in symbols)
        for kind, symbols in OBJECTS.items()
    }


def _render(font: ImageFont.FreeTypeFont, symbol: str) -> Image.Image:
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((8, 8), symbol, font=font, embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    assert box is not None, f"the emoji font has no drawing of {symbol!r}"
    return canvas.crop(box)
