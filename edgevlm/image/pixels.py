"""RGB uint8 [h, w, 3] -> pixels float32 [3, size, size], as the original models' processors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.image.plan import plan
from edgevlm.image.read import RGB
from edgevlm.specs import ImageSpec

Pixels = npt.NDArray[np.float32]

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

    Raises ImageError for a picture that cannot be planned.
    """
    planned, picture = plan(rgb.shape[1], rgb.shape[0], spec), Image.fromarray(rgb)
    if spec.fit == "pad":
        canvas = _pad(picture, spec, planned.canvas[0])
    else:
        # Resizing only the tile of a crop (Pillow's `box`) rounds its weights otherwise: not the
        # same pixels.
        canvas = picture.resize(planned.canvas, _RESAMPLE[spec.resample])
    (tile,) = planned.tiles
    scaled = (np.asarray(canvas.crop(tile)).astype(np.float64) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


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
