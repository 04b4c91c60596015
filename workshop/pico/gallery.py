"""Pictures for the examples folder, drawn plainly and fixed by hand."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw

from edgevlm.benchmarks.scenes.assets import font, object_bitmaps

SCALE = 4  # drawn larger, then reduced: smooth edges


def write_examples(folder: Path) -> list[Path]:
    """Writes every picture and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "shapes.png": shapes(),
        "garden.png": garden(),
        "street.jpg": street(),
        "sign.png": sign(),
    }
    for name, picture in pictures.items():
        picture.save(folder / name, quality=88, optimize=True)
    return [folder / name for name in pictures]


def shapes() -> Image.Image:
    """A red circle, a blue square and a yellow triangle under two green stars, 480 x 360."""
    canvas = Image.new("RGB", (480 * SCALE, 360 * SCALE), "#f3ede2")
    pen = ImageDraw.Draw(canvas)
    _ellipse(pen, 105, 110, 62, "#e02020")
    pen.rectangle([v * SCALE for v in (305, 55, 415, 165)], fill="#1f4fe0")
    pen.polygon([v * SCALE for v in (120, 215, 52, 325, 188, 325)], fill="#ffd800")
    _star(pen, 355, 272, 62, "#1f9d3a")
    return canvas.resize((480, 360), Image.Resampling.LANCZOS)


def garden() -> Image.Image:
    """A cat under a tree beside a flower, on pale green."""
    canvas = Image.new("RGB", (448, 448), "#dcefd8")
    _object(canvas, "tree", 130, 125, 190)
    _object(canvas, "cat", 320, 310, 170)
    _object(canvas, "flower", 105, 345, 120)
    return canvas


def street() -> Image.Image:
    """A car and a bus, on grey."""
    canvas = Image.new("RGB", (640, 360), "#d6dde4")
    _object(canvas, "car", 170, 235, 190)
    _object(canvas, "bus", 470, 120, 170)
    return canvas


def sign() -> Image.Image:
    """OPEN in white on green, 400 x 240."""
    canvas = Image.new("RGB", (400 * SCALE, 240 * SCALE), "#155c32")
    letters = font(None, 92 * SCALE)
    ImageDraw.Draw(canvas).text(
        (200 * SCALE, 120 * SCALE), "OPEN", font=letters, fill="#ffffff", anchor="mm"
    )
    return canvas.resize((400, 240), Image.Resampling.LANCZOS)


def _ellipse(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: str) -> None:
    pen.ellipse([v * SCALE for v in (x - radius, y - radius, x + radius, y + radius)], fill=fill)


def _star(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: str) -> None:
    corners = []
    for k in range(10):
        reach = radius * (1.0 if k % 2 == 0 else 0.42)
        angle = -math.pi / 2 + k * math.pi / 5
        corners.append(
            ((x + reach * math.cos(angle)) * SCALE, (y + reach * math.sin(angle)) * SCALE)
        )
    pen.polygon(corners, fill=fill)


def _object(canvas: Image.Image, kind: str, x: int, y: int, size: int) -> None:
    stamp = object_bitmaps()[kind][0]
    scale = size / max(stamp.size)
    stamp = stamp.resize(
        (round(stamp.width * scale), round(stamp.height * scale)), Image.Resampling.LANCZOS
    )
    canvas.paste(stamp, (x - stamp.width // 2, y - stamp.height // 2), stamp)
