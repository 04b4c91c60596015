"""Pictures that need no file: what an export is tried on."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevlm.errors import ImageError
from edgevlm.image import RGB, preprocess, read_image
from edgevlm.specs import ImageSpec

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_MOST = 64

# Neither square nor a multiple of a patch: the resize is tried as well.
_HEIGHT, _WIDTH = 300, 400


def scene() -> RGB:
    """uint8 [h, w, 3]: a gradient with a disc, a square and some grain."""
    return _drawn()[0].copy()


def _scene() -> RGB:
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH].astype(np.float32)
    ground = np.stack([x / _WIDTH, y / _HEIGHT, 1 - x / _WIDTH], axis=-1) * 200 + 30
    ground[(x - 120) ** 2 + (y - 150) ** 2 < 70**2] = (220, 30, 40)
    ground[60:160, 250:350] = (20, 60, 210)
    ground += np.random.default_rng(0).normal(0, 8, ground.shape)
    return ground.clip(0, 255).astype(np.uint8)


def calibration(spec: ImageSpec, folder: Path | None = None) -> NDArray[np.float32]:
    """Pixels float32 [pictures, 3, size, size] on which a precision is calibrated and judged: drawn
    ones, and those of a folder; all of one size where the model keeps a picture's.

    Raises ImageError for a folder without pictures or a picture that cannot be read.
    """
    found = all_pictures(folder)
    if spec.native:
        found = [np.asarray(Image.fromarray(p).resize((_WIDTH, _HEIGHT))) for p in found]
    return np.stack([preprocess(picture, spec) for picture in found])


def all_pictures(folder: Path | None) -> list[RGB]:
    """The drawn pictures and those of a folder; raises ImageError."""
    return [*drawn(), *map(read_image, check_folder(folder))]


def drawn() -> list[RGB]:
    """Pictures with what towers find hard: the scene, even sheets, where trained ones have their
    largest activations, noise, fine lines, and soft clouds like a photograph's.
    """
    return [picture.copy() for picture in _drawn()]


@functools.cache
def _drawn() -> tuple[RGB, ...]:
    rng = np.random.default_rng(1)
    sheet = np.full((_HEIGHT, _WIDTH, 3), 255, np.uint8)
    noise = rng.integers(0, 256, (_HEIGHT, _WIDTH, 3), np.uint8)
    lines = sheet.copy()
    lines[::7] = 0
    lines[:, ::11] = (200, 30, 30)
    seen = _scene()
    return seen, sheet, noise, np.zeros_like(sheet), lines, _clouds(rng), 255 - seen


def _clouds(rng: np.random.Generator) -> RGB:
    """Noise of every scale, coarse ones the strongest, as in photographs."""
    total = np.zeros((_HEIGHT, _WIDTH, 3))
    for side in (2, 4, 8, 16, 32, 64):
        patch = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        total += np.asarray(patch.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC)) / side
    clouds: RGB = (255 * (total - total.min()) / np.ptp(total)).astype(np.uint8)
    return clouds


def check_folder(folder: Path | None) -> list[Path]:
    """The pictures of a calibration folder; raises ImageError where there is none."""
    if folder is None:
        return []
    if not folder.is_dir():
        raise ImageError(str(folder), "is not a folder of calibration pictures")
    names = sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not names:
        raise ImageError(str(folder), f"holds no picture; it needs some ({', '.join(_SUFFIXES)})")
    # More pictures than this change no range that matters and cost a run each.
    return names[:: -(-len(names) // _MOST)]
