"""Greys of other depths -> 8 bits, where Pillow's own conversion would clip them.

A file says how deep its integers are, and that decides, whatever the largest of them. Nothing says
where white lies in floats and in integers of 32 bits: there all values but the brightest hundredth
decide, so that a highlight is clipped and never darkens the rest. docs/models.md states the rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

# What 8, 10, 12, 14 and 16 bits can hold.
_FULL_SCALES = (255, 1023, 4095, 16383, 65535)
# Floats of up to two stops over 1 are a scene in 0..1 with highlights.
_HIGHLIGHTS = 4.0
# Enough values to know where the brightest hundredth begins.
_SAMPLE = 1 << 20
# TIFF's tags and what they say.
_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2

Values = npt.NDArray[Any]


def eight_bit(picture: Image.Image) -> Image.Image:
    """A loaded picture with greys of 8 bits; one that has no deeper or signed greys as it is."""
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    signed = tags.get(_FORMAT, (1,))[0] == _SIGNED
    deep = picture.mode in ("I", "F") or picture.mode.startswith("I;16")
    if not deep and not (signed and picture.mode == "L"):
        return picture
    values, bits = np.asarray(picture), _bits(picture, tags)
    if picture.mode == "L":
        values = values.view(np.int8)  # Pillow reads them as unsigned, as it does those of 32 bits.
    elif bits == 32 and picture.mode == "I" and not signed:
        values = values.view(np.uint32)
    known = picture.mode != "F" and 0 < bits <= 16
    black, white = _range(values, bits, signed) if known else (0.0, _white(values))
    grey = _scaled(values, black, white)
    # Those of 8 bits and less Pillow turns round itself.
    if deep and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey)


def _bits(picture: Image.Image, tags: Mapping[int, Any]) -> int:
    """Bits of a value in the file; 0 where nothing says it."""
    if _BITS in tags:
        return int(tags[_BITS][0])
    return 16 if picture.mode != "I" or picture.format in ("PNG", "PPM") else 0


def _range(values: Values, bits: int, signed: bool) -> tuple[float, float]:
    """Black and white of integers of known depth; signed ones without a negative begin at 0."""
    if not signed:
        return 0.0, 2.0**bits - 1
    half = 2.0 ** (bits - 1)
    return (-half if values.min() < 0 else 0.0), half - 1


def _white(values: Values) -> float:
    """The value that becomes white where only the values can tell."""
    sample = values.ravel()[:: max(1, values.size // _SAMPLE)]
    lit = sample[(sample > 0) & np.isfinite(sample)]
    if not lit.size:
        return 1.0
    middle, bright = (float(x) for x in np.quantile(lit, (0.5, 0.99), method="lower"))
    whole = bool(np.all(lit == np.rint(lit)))
    if bright <= 1 or middle < 1 or (bright <= _HIGHLIGHTS and not whole):
        return 1.0
    return next((float(scale) for scale in _FULL_SCALES if bright <= scale), bright)


def _scaled(values: Values, black: float, white: float) -> npt.NDArray[np.uint8]:
    exact = np.float64 if values.dtype.itemsize > 2 and values.dtype.kind in "iu" else np.float32
    grey = np.nan_to_num(values.astype(exact), nan=black, posinf=white, neginf=black)
    grey = np.clip(np.rint((grey - black) * (255 / (white - black))), 0, 255)
    eight: npt.NDArray[np.uint8] = grey.astype(np.uint8)
    return eight
