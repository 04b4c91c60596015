"""A second, plain drawing routine: pictures as a user's short script would draw them, for held-
out measurements.

It shares no drawing code with scenes.py, so that a score on it says how pico does on pictures it
was not taught with.
"""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from edgevlm.benchmarks.scenes.assets import WORD_FACES, font, object_bitmaps
from edgevlm.benchmarks.scenes.kinds import COLOURS, OBJECTS, SHAPES, WORDS
from edgevlm.benchmarks.scenes.textured_scenes import Scene, Thing, Word

RGB: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "orange": (255, 140, 0),
    "purple": (128, 0, 128),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}
GROUNDS = (
    (128, 128, 128),
    (200, 200, 200),
    (200, 230, 240),
    (90, 110, 100),
    (235, 220, 200),
    (255, 192, 203),
)
SIZES = (
    (128, 128),
    (224, 224),
    (320, 240),
    (240, 320),
    (512, 512),
    (640, 360),
    (300, 400),
    (768, 768),
)


def simple_scene(rng: Random) -> Scene:
    """Shapes in half of the scenes, objects in the others, a word alone in every fifth."""
    draw = rng.random()
    if draw < 0.2:
        return word_scene(rng)
    return grid_scene(rng, objects=0.0 if draw < 0.65 else 1.0 if draw < 0.85 else 0.4)


def grid_scene(rng: Random, objects: float) -> Scene:
    """One to four things in different cells of a 2 x 2 or 3 x 3 grid, with ImageDraw at full
    size.
    """
    size = rng.choice(SIZES)
    canvas = _ground(size, rng)
    cells = rng.choice((2, 3))
    places = rng.sample([(x, y) for x in range(cells) for y in range(cells)], rng.randint(1, 4))
    cell_w, cell_h = size[0] / cells, size[1] / cells
    things = []
    repeat = rng.random() < 0.4
    last: tuple[str, str | None] | None = None
    for x, y in places:
        if rng.random() < objects:
            kind, colour = rng.choice(tuple(OBJECTS)), None
        else:
            kind, colour = rng.choice(SHAPES), rng.choice(COLOURS)
        if repeat and last and rng.random() < 0.6:
            kind = last[0]
            colour = rng.choice((last[1], rng.choice(COLOURS))) if last[1] else None
        last = (kind, colour)
        radius = min(cell_w, cell_h) * rng.uniform(0.27, 0.42)
        slack_x, slack_y = cell_w / 2 - radius - 1, cell_h / 2 - radius - 1
        cx = (x + 0.5) * cell_w + rng.uniform(-slack_x, slack_x)
        cy = (y + 0.5) * cell_h + rng.uniform(-slack_y, slack_y)
        box = _draw(canvas, kind, colour, cx, cy, radius)
        shares = (box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1])
        things.append(Thing(kind, colour, shares))
    return Scene(canvas, tuple(things))


def word_scene(rng: Random) -> Scene:
    """A word in DejaVu Sans, dark on light or light on dark."""
    text = (
        rng.choice(WORDS)
        if rng.random() < 0.5
        else "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 5)))
    )
    text = rng.choice((text, text.upper()))
    size = rng.choice(SIZES)
    dark, light = (
        rng.choice(((0, 0, 0), (0, 0, 120), (120, 0, 0))),
        rng.choice(((255, 255, 255), (250, 240, 200))),
    )
    ground, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    canvas = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(canvas)
    wide = size[0] * rng.uniform(0.5, 0.85) * min(1.0, 0.3 + len(text) * 0.2)
    points = 10
    letters = font(WORD_FACES[0], points)
    while letters.getlength(text) < wide and points < size[1] * 0.6:
        points += 2
        letters = font(WORD_FACES[0], points)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=letters)
    x = rng.uniform(2, max(2, size[0] - right - 2))
    y = rng.uniform(2 - top, max(2 - top, size[1] - bottom - 2))
    draw.text((x, y), text, fill=ink, font=letters)
    box = ((x + left) / size[0], (y + top) / size[1], (x + right) / size[0], (y + bottom) / size[1])
    return Scene(canvas, (), Word(text, box, ()))


def _ground(size: tuple[int, int], rng: Random) -> Image.Image:
    canvas = Image.new("RGB", size, rng.choice(GROUNDS))
    draw = rng.random()
    if draw < 0.25:
        noise = np.random.default_rng(rng.getrandbits(32)).integers(-18, 19, (size[1], size[0], 3))
        return Image.fromarray(np.clip(np.asarray(canvas) + noise, 0, 255).astype(np.uint8))
    if draw < 0.4:
        pen = ImageDraw.Draw(canvas)
        tone = tuple(int(c * 0.9) for c in canvas.getpixel((0, 0)))  # type: ignore[union-attr]
        for x in range(0, size[0], 24):
            pen.rectangle((x, 0, x + 11, size[1]), fill=tone)
    return canvas


def _draw(
    canvas: Image.Image, kind: str, colour: str | None, cx: float, cy: float, r: float
) -> tuple[float, float, float, float]:
    pen = ImageDraw.Draw(canvas)
    if colour is None:
        stamp = object_bitmaps()[kind][0].copy()
        stamp.thumbnail((int(2 * r), int(2 * r)))
        if max(stamp.size) < int(2 * r) - 1:
            scale = 2 * r / max(stamp.size)
            stamp = stamp.resize((int(stamp.width * scale), int(stamp.height * scale)))
        x, y = int(cx - stamp.width / 2), int(cy - stamp.height / 2)
        canvas.paste(stamp, (x, y), stamp)
        return x, y, x + stamp.width, y + stamp.height
    if kind == "circle":
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=RGB[colour])
        return cx - r, cy - r, cx + r, cy + r
    if kind == "square":
        half = r * 0.88
        pen.rectangle((cx - half, cy - half, cx + half, cy + half), fill=RGB[colour])
        return cx - half, cy - half, cx + half, cy + half
    if kind == "triangle":
        corners = [(cx, cy - r), (cx - r, cy + r), (cx + r, cy + r)]
    else:
        corners = []
        for k in range(10):
            reach = r if k % 2 == 0 else r * 0.45
            angle = -math.pi / 2 + k * math.pi / 5
            corners.append((cx + reach * math.cos(angle), cy + reach * math.sin(angle)))
    pen.polygon(corners, fill=RGB[colour])
    xs, ys = [c[0] for c in corners], [c[1] for c in corners]
    return min(xs), min(ys), max(xs), max(ys)
