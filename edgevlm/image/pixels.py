"""RGB uint8 [h, w, 3] -> pixels float32 [3, size, size], as the original models' processors."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.errors import ImageError
from edgevlm.image.read import RGB
from edgevlm.specs import Fit, ImageSpec

Pixels = npt.NDArray[np.float32]

# What a long and narrow picture may become on the way to a square: half a gigabyte, enough for one
# of 1 x 1000 pixels whose short side becomes 336.
MAX_RESIZED = 1 << 27
_STRIP_PIXELS = 1 << 22

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def preprocess(rgb: RGB, spec: ImageSpec) -> Pixels:
    """RGB uint8 [h, w, 3] -> pixels float32 [3, size, size], bit for bit as transformers' slow
    processors (4.57: SiglipImageProcessor, CLIPImageProcessor, LlavaImageProcessor): resized as
    8-bit, then scaled in float64, normalised in float32.

    Raises ImageError for a picture so long and narrow that "pad" or "crop" would swell it.
    """
    side = spec.resize or spec.size
    _check_fit(rgb.shape[1], rgb.shape[0], spec.fit, side)
    picture = _middle(_FIT[spec.fit](Image.fromarray(rgb), spec, side), spec.size)
    scaled = (np.asarray(picture).astype(np.float64) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def _check_fit(width: int, height: int, fit: Fit, side: int) -> None:
    long = max(width, height)
    # Pillow holds 4 bytes a pixel. A pad has only strips of its square in memory, but goes through
    # every row at full width.
    swollen = {
        "stretch": 0,
        "crop": math.prod(_covering(width, height, side)),
        "pad": max(long * side, long * height // 4),
    }
    if swollen[fit] > MAX_RESIZED:
        raise ImageError(
            f"the picture of {width} x {height} pixels",
            "is too long and narrow for this model; cut out a part of it",
        )


def _stretch(picture: Image.Image, spec: ImageSpec, side: int) -> Image.Image:
    return picture.resize((side, side), _RESAMPLE[spec.resample])


def _cover(picture: Image.Image, spec: ImageSpec, side: int) -> Image.Image:
    """The picture with a short side of `side`.

    Resizing only its middle (Pillow's `box`) rounds its weights otherwise: not the same pixels.
    """
    return picture.resize(_covering(*picture.size, side), _RESAMPLE[spec.resample])


def _covering(width: int, height: int, side: int) -> tuple[int, int]:
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


def _middle(picture: Image.Image, size: int) -> Image.Image:
    """The middle of a picture, as CLIPImageProcessor cuts it out."""
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _pad(picture: Image.Image, spec: ImageSpec, side: int) -> Image.Image:
    """The picture in the middle of a square of one colour, as LLaVA's expand2square, resized.

    Pillow resizes the columns first and rows after that, each rounded to 8 bits, and every row by
    itself: done strip by strip the result is the same, and the square is never in memory.
    """
    width, height = picture.size
    long, resample = max(width, height), _RESAMPLE[spec.resample]
    left, top = (long - width) // 2, (long - height) // 2
    background = spec.fill or tuple(int(x * 255) for x in spec.mean)
    narrow = Image.new("RGB", (side, long), background)
    rows = max(1, _STRIP_PIXELS // long)
    for y in range(0, height, rows):
        n = min(rows, height - y)
        strip = Image.new("RGB", (long, n), background)
        strip.paste(picture.crop((0, y, width, y + n)), (left, 0))
        narrow.paste(strip.resize((side, n), resample), (0, top + y))
    return narrow.resize((side, side), resample)


_FIT = {"stretch": _stretch, "pad": _pad, "crop": _cover}
