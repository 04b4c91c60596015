"""Pictures -> pixels float32 [tiles, 3, size, size], as the original models' processors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.image.plan import limited, plan
from edgevlm.image.planned import Plan
from edgevlm.image.read import RGB, Picture
from edgevlm.image.squeeze import squeezed
from edgevlm.specs import ImageSpec

Pixels = npt.NDArray[np.float32]

_STRIP_PIXELS = 1 << 22

# Pillow's filters by the names of specs.
RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def preprocess(picture: RGB | Picture, spec: ImageSpec) -> Pixels:
    """The whole picture as one square, float32 [3, size, size], or in its own shape; see `cut`."""
    square: Pixels = cut(picture, limited(spec, 1))[0]
    return square


def cut(picture: RGB | Picture, spec: ImageSpec) -> Pixels:
    """A picture, or its RGB uint8 [h, w, 3] -> pixels float32 [tiles, 3, size, size], bit for bit
    as transformers' slow processors (4.57: SiglipImageProcessor, CLIPImageProcessor,
    LlavaImageProcessor, Idefics3ImageProcessor, GotOcr2ImageProcessor, LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor, DeepseekVLImageProcessor, Gemma3ImageProcessor,
    Qwen2VLImageProcessor, whose patches these are in rows and columns), Phi-3-Vision's own and
    moondream's prepare_crops: resized as 8-bit, then scaled in float64, normalised in float32, or
    both in bfloat16.

    Raises ImageError for a picture that cannot be planned.
    """
    given = picture if isinstance(picture, Picture) else Picture(picture)
    height, width = given.rgb.shape[:2]
    planned, drawn = plan(width, height, spec), Image.fromarray(given.rgb)
    resample = RESAMPLE[spec.resample]
    if spec.rgb == "last" and given.indexed:
        resample = Image.Resampling.NEAREST
    elif spec.rgb == "last" and given.alpha is not None:
        drawn.putalpha(Image.fromarray(given.alpha))
    canvas = _canvas(drawn, planned, spec, resample)
    if spec.tiles and spec.tiles.overview_of == "pixels":
        return _cut_pixels(_normalised(canvas, spec), planned, spec.size)
    parts = [canvas.crop(tile) for tile in planned.tiles]
    side = planned.canvas if spec.native else (spec.size, spec.size)
    squares = [p if p.size == side else p.resize(side, resample) for p in parts]
    if planned.overview != "none":
        assert spec.tiles
        source = canvas if spec.tiles.overview_of == "canvas" else drawn
        whole = source.resize(side, resample)
        squares.insert(0 if planned.overview == "first" else len(squares), whole)
    pixels: Pixels = np.stack([_normalised(square, spec) for square in squares])
    return pixels


def _cut_pixels(canvas: Pixels, planned: Plan, side: int) -> Pixels:
    """The tiles of a canvas of pixels [3, height, width], its overview first where it has one."""
    parts = [canvas[:, y : y + side, x : x + side] for x, y, _, _ in planned.tiles]
    if planned.overview != "none":
        parts.insert(0, squeezed(canvas, *planned.grid))
    return np.stack(parts)


def _canvas(
    picture: Image.Image, planned: Plan, spec: ImageSpec, resample: Image.Resampling
) -> Image.Image:
    if spec.fit == "pad":
        return _pad(picture, spec, planned.canvas[0])
    # Pillow rounds between the columns and the rows: which come first makes a difference.
    if planned.turned:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    if planned.resized:
        picture = picture.resize(planned.resized, resample)
    if planned.turned:
        picture = picture.transpose(Image.Transpose.TRANSPOSE)
    if planned.at is None:
        # Resizing only the tile of a crop (Pillow's `box`) rounds its weights otherwise: not the
        # same pixels.
        return picture.resize(planned.canvas, resample)
    colour = _background(spec) if spec.fit == "letterbox" or not spec.tiles else spec.tiles.fill
    canvas = Image.new("RGB", planned.canvas, colour)
    canvas.paste(picture, planned.at)
    return canvas


def _normalised(square: Image.Image, spec: ImageSpec) -> Pixels:
    if square.mode == "RGBA":
        white = Image.new("RGBA", square.size, (255, 255, 255))
        square = Image.alpha_composite(white, square).convert("RGB")
    if spec.exact == "bfloat16":
        return np.ascontiguousarray(_bfloat16_levels(spec)[np.asarray(square)].transpose(2, 0, 1))
    scaled = (np.asarray(square).astype(np.float64) * spec.rescale).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))


def _bfloat16_levels(spec: ImageSpec) -> Pixels:
    """The value of every byte, float32 [256]; each step is rounded to bfloat16. Mean and deviation
    are those of the first channel.
    """
    scaled = _bfloat16(np.arange(256, dtype=np.float32) / np.float32(round(1 / spec.rescale)))
    return _bfloat16(_bfloat16(scaled - np.float32(spec.mean[0])) / np.float32(spec.std[0]))


def _bfloat16(values: Pixels) -> Pixels:
    """Float32 rounded to the nearest bfloat16, halves to the even one."""
    bits = values.view(np.uint32)
    rounded: Pixels = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(
        np.float32
    )
    return rounded


def _background(spec: ImageSpec) -> tuple[int, ...]:
    """The colour of what a square has beside the picture."""
    return spec.fill or tuple(int(x * 255) for x in spec.mean)


def _pad(picture: Image.Image, spec: ImageSpec, side: int) -> Image.Image:
    """The picture in the middle of a square of one colour, as LLaVA's expand2square, resized.

    Pillow resizes the columns first and rows after that, each rounded to 8 bits, and every row by
    itself: done strip by strip the result is the same, and the square is never in memory.
    """
    width, height = picture.size
    long, resample = max(width, height), RESAMPLE[spec.resample]
    left, top = (long - width) // 2, (long - height) // 2
    background = _background(spec)
    narrow = Image.new("RGB", (side, long), background)
    rows = max(1, _STRIP_PIXELS // long)
    for y in range(0, height, rows):
        n = min(rows, height - y)
        strip = Image.new("RGB", (long, n), background)
        strip.paste(picture.crop((0, y, width, y + n)), (left, 0))
        narrow.paste(strip.resize((side, n), resample), (0, top + y))
    return narrow.resize((side, side), resample)
