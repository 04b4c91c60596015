"""Pictures that need no file: what an export is tried on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevlm.specs import ImageSpec

# Neither square nor a multiple of a patch: the resize is tried as well.
_HEIGHT, _WIDTH = 300, 400


def scene() -> NDArray[np.uint8]:
    """uint8 [h, w, 3]: a gradient with a disc, a square and some grain."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH].astype(np.float32)
    ground = np.stack([x / _WIDTH, y / _HEIGHT, 1 - x / _WIDTH], axis=-1) * 200 + 30
    ground[(x - 120) ** 2 + (y - 150) ** 2 < 70**2] = (220, 30, 40)
    ground[60:160, 250:350] = (20, 60, 210)
    ground += np.random.default_rng(0).normal(0, 8, ground.shape)
    return ground.clip(0, 255).astype(np.uint8)


def calibration(spec: ImageSpec) -> NDArray[np.float32]:
    """Pixels float32 [3, 3, size, size]: a drawn scene, an empty sheet, noise.

    Even sheets are where trained encoders show their largest activations.
    """
    step = np.arange(spec.size)
    rows, columns = step * _HEIGHT // spec.size, step * _WIDTH // spec.size
    drawn = scene()[rows][:, columns].astype(np.float32)
    noise = np.random.default_rng(1).integers(0, 256, drawn.shape).astype(np.float32)
    batch = np.stack([drawn, np.full_like(drawn, 255), noise]) / 255
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    return np.ascontiguousarray(((batch - mean) / std).transpose(0, 3, 1, 2))
