"""Draws the parts of a scene on a Pillow canvas: backgrounds, shapes, emoji, words, and what a
camera or a file adds.

Everything is drawn at the picture's own size, as a user's program would. It knows nothing of
questions.
"""

from __future__ import annotations

import colorsys
import io
import math
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from edgevlm.benchmarks.scenes.kinds import HSV_RANGES, PURE_COLOURS

Rgb = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels

BACKGROUNDS = ("plain", "gradient", "noise", "stripes", "checker", "dots", "blobs", "grid")
_BACKGROUND_WEIGHTS = (50, 12, 13, 7, 6, 5, 4, 3)


def named_rgb(colour: str, rng: Random) -> Rgb:
    """A value that everyone would call by this name: often the textbook one, else a draw from its
    range.
    """
    if rng.random() < 0.45:
        return rng.choice(PURE_COLOURS[colour])
    hue, saturation, value = (rng.uniform(*span) for span in HSV_RANGES[colour])
    return hsv_rgb(hue, saturation, value)


def hsv_rgb(hue: float, saturation: float, value: float) -> Rgb:
    """Degrees, 0..1, 0..1 -> 0..255 each."""
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def distance(one: Rgb, other: Rgb) -> float:
    """Distance of two colours: Euclidean, with green weighted as the eye does."""
    return math.sqrt(
        sum(w * (a - b) ** 2 for w, a, b in zip((0.8, 1.4, 0.8), one, other, strict=True))
    )


def background_rgb(rng: Random) -> Rgb:
    """White, grey, pastel, dark or saturated."""
    draw = rng.random()
    if draw < 0.22:
        return (255, 255, 255)
    if draw < 0.42:
        grey = rng.randint(0, 255)
        return (grey, grey, grey)
    if draw < 0.68:
        return hsv_rgb(rng.uniform(0, 360), rng.uniform(0.05, 0.35), rng.uniform(0.8, 1.0))
    if draw < 0.82:
        return hsv_rgb(rng.uniform(0, 360), rng.uniform(0.1, 0.8), rng.uniform(0.05, 0.35))
    return hsv_rgb(rng.uniform(0, 360), rng.uniform(0.2, 1.0), rng.uniform(0.35, 1.0))


def background(size: tuple[int, int], tones: tuple[Rgb, Rgb], rng: Random) -> Image.Image:
    """A plain or textured ground of two tones."""
    style = rng.choices(BACKGROUNDS, _BACKGROUND_WEIGHTS)[0]
    canvas = Image.new("RGB", size, tones[0])
    if style == "gradient":
        return _gradient(size, tones, rng)
    if style == "noise":
        return add_noise(canvas, rng.uniform(4, 32), rng)
    if style == "blobs":
        cells = np.asarray(Image.new("RGB", (6, 6), tones[0])).copy()
        cells[np.random.default_rng(rng.getrandbits(32)).random((6, 6)) < 0.4] = tones[1]
        return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
    if style != "plain":
        _pattern(canvas, style, tones[1], rng)
    return canvas


def _gradient(size: tuple[int, int], tones: tuple[Rgb, Rgb], rng: Random) -> Image.Image:
    corners = np.array([[tones[0], tones[0]], [tones[1], tones[1]]], np.uint8)
    if rng.random() < 0.4:
        corners = corners.transpose(1, 0, 2)
    elif rng.random() < 0.3:
        middle = tuple((a + b) // 2 for a, b in zip(*tones, strict=True))
        corners = np.array([[tones[0], middle], [middle, tones[1]]], np.uint8)
    return Image.fromarray(np.ascontiguousarray(corners)).resize(size, Image.Resampling.BILINEAR)


def _pattern(canvas: Image.Image, style: str, tone: Rgb, rng: Random) -> None:
    draw = ImageDraw.Draw(canvas)
    width, height = canvas.size
    step = max(3, round(min(width, height) * rng.uniform(0.04, 0.2)))
    if style == "checker":
        for row, y in enumerate(range(0, height, step)):
            for x in range(row % 2 * step, width, 2 * step):
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=tone)
    elif style == "dots":
        radius = step * rng.uniform(0.1, 0.22)
        for y in range(step // 2, height + step, step):
            for x in range(step // 2, width + step, step):
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tone)
    elif style == "grid":
        for x in range(0, width, step):
            draw.line((x, 0, x, height), fill=tone, width=max(1, step // 12))
        for y in range(0, height, step):
            draw.line((0, y, width, y), fill=tone, width=max(1, step // 12))
    else:
        slant = rng.choice((0, 0, height, -height))
        thickness = max(1, round(step * rng.uniform(0.15, 0.5)))
        if rng.random() < 0.35:
            for y in range(0, height, step):
                draw.line((0, y, width, y), fill=tone, width=thickness)
        else:
            for x in range(-abs(slant), width + abs(slant), step):
                draw.line((x, 0, x + slant, height), fill=tone, width=thickness)


def outline_points(shape: str, rng: Random) -> list[Point] | None:
    """The corners of a shape around (0, 0), at most 1 away from it; ``None`` is a circle."""
    if shape == "circle":
        return None
    if shape == "square":
        turn = rng.uniform(-15, 15) if rng.random() < 0.45 else 0.0
        return _turned([(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)], turn)
    if shape == "triangle":
        lean = rng.uniform(-0.25, 0.25) if rng.random() < 0.3 else 0.0
        tall = rng.uniform(0.75, 1.0)
        draw = rng.random()
        turn = 0.0 if draw < 0.5 else rng.uniform(-25, 25) if draw < 0.75 else rng.uniform(0, 360)
        if 0.9 < draw:
            turn = rng.choice((180.0, 90.0, -90.0))
        return _turned([(lean, -tall), (0.87, tall * 0.7), (-0.87, tall * 0.7)], turn)
    points = rng.choices((5, 4, 6), (86, 7, 7))[0]
    inner = {4: rng.uniform(0.28, 0.45), 5: rng.uniform(0.33, 0.52), 6: rng.uniform(0.42, 0.58)}[
        points
    ]
    turn = 0.0 if rng.random() < 0.5 else rng.uniform(-20, 20)
    return star_points(points, inner, turn)


def star_points(points: int, inner: float, turn: float) -> list[Point]:
    """A star with its first point up; ``inner`` is the radius of its notches."""
    angles = [math.pi * k / points - math.pi / 2 + math.radians(turn) for k in range(2 * points)]
    radii = [1.0 if k % 2 == 0 else inner for k in range(2 * points)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _turned(points: list[Point], degrees: float) -> list[Point]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def extent(points: list[Point] | None, centre: Point, radius: float) -> Box:
    """The box around a shape placed at ``centre``, in pixels."""
    x, y = centre
    if points is None:
        return x - radius, y - radius, x + radius, y + radius
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    return x + radius * min(xs), y + radius * min(ys), x + radius * max(xs), y + radius * max(ys)


def draw_shape(
    canvas: Image.Image,
    points: list[Point] | None,
    centre: Point,
    radius: float,
    fill: Rgb,
    rng: Random,
) -> None:
    """Fills a shape: jagged or smooth, sometimes with a thin outline or a slight gradient."""
    edge = None
    if rng.random() < 0.22:
        level = rng.choice((0, 0, 20, 60, 255))
        edge = (
            (level, level, level)
            if distance((level,) * 3, fill) > 60
            else tuple(int(c * 0.6) for c in fill)
        )
    width = max(1, round(radius * rng.uniform(0.03, 0.11)))
    if rng.random() < 0.5:
        _polygon(ImageDraw.Draw(canvas), points, centre, radius, fill, edge, width)
        return
    scale = 3 if radius < 80 else 2
    left, top, right, bottom = (round(v) for v in extent(points, centre, radius))
    left, top, right, bottom = left - 2, top - 2, right + 3, bottom + 3
    local = ((centre[0] - left) * scale, (centre[1] - top) * scale)
    large = ((right - left) * scale, (bottom - top) * scale)
    mask = Image.new("L", large, 0)
    _polygon(ImageDraw.Draw(mask), points, local, radius * scale, 255, None, 0)
    paint = Image.new("RGB", large, fill)
    if rng.random() < 0.25:
        darker = tuple(int(c * rng.uniform(0.86, 0.97)) for c in fill)
        paint = _gradient(large, (fill, darker), rng)  # type: ignore[arg-type]
    if edge is not None:
        _polygon(ImageDraw.Draw(paint), points, local, radius * scale, None, edge, width * scale)
    box = (right - left, bottom - top)
    canvas.paste(
        paint.resize(box, Image.Resampling.BOX), (left, top), mask.resize(box, Image.Resampling.BOX)
    )


def _polygon(
    draw: ImageDraw.ImageDraw,
    points: list[Point] | None,
    centre: Point,
    radius: float,
    fill: Rgb | int | None,
    edge: Rgb | tuple[int, ...] | None,
    width: int,
) -> None:
    if points is None:
        draw.ellipse(
            extent(None, centre, radius), fill=fill, outline=edge, width=width if edge else 1
        )
        return
    corners = [(centre[0] + radius * x, centre[1] + radius * y) for x, y in points]
    draw.polygon(corners, fill=fill)
    if edge is not None:
        draw.line([*corners, corners[0], corners[1]], fill=edge, width=width, joint="curve")


def finish(picture: Image.Image, rng: Random) -> Image.Image:
    """Now and then what files and cameras do: blur, noise, JPEG blocks."""
    draw = rng.random()
    if draw < 0.06:
        picture = picture.filter(
            ImageFilter.GaussianBlur(min(picture.size) * rng.uniform(0.002, 0.008))
        )
    elif draw < 0.14:
        picture = add_noise(picture, rng.uniform(2, 14), rng)
    if rng.random() < 0.15 and max(picture.size) <= 512:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=rng.randint(35, 92))
        picture = Image.open(buffer).convert("RGB")
    return picture


def add_noise(picture: Image.Image, strength: float, rng: Random) -> Image.Image:
    """Pixel noise of this standard deviation (of 255), grey or coloured."""
    width, height = picture.size
    left, top = rng.randrange(64), rng.randrange(64)
    repeat = (height // 448 + 1, width // 448 + 1, 1)
    grain = np.tile(_grain()[left : left + 448, top : top + 448], repeat)[:height, :width]
    if rng.random() < 0.5:
        grain = grain[:, :, :1]
    noisy = np.asarray(picture, np.int16) + (grain * int(strength * 4) // 256)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    """Fixed normal noise with standard deviation 64: cutting it anywhere is far cheaper than
    drawing it anew.
    """
    return (np.random.default_rng(7).standard_normal((512, 512, 3)) * 64).astype(np.int16)
